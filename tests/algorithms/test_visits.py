"""The schedule of visits; losses that couple samples, or read a second LoRA; groups across devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffexp_jax.algorithms.algorithm import Algorithm, across_devices, chunked
from diffexp_jax.algorithms.policy_gradient import PolicyGradient, sample, slopes_of, updated, weighted_log_prob
from diffexp_jax.algorithms.state import TrainState
from diffexp_jax.algorithms.visits import schedule
from diffexp_jax.sampling import Network
from tests.support.two_numbers import CONTEXT, GROUP, LORA, POLICY, N, T, iteration, log_probs, network

NO, YES = False, True


@pytest.mark.parametrize(
    "epochs, recomputes, weighs, rows",
    [
        (1, NO, NO, [(0, YES, NO), (1, YES, NO)]),
        (1, YES, NO, [(1, NO, YES), (0, YES, YES), (1, YES, NO)]),
        (2, YES, NO, [(1, NO, YES), (0, YES, YES), (1, YES, NO), (0, YES, NO), (1, YES, NO)]),
        (1, NO, YES, [(0, YES, NO), (1, NO, NO), (1, YES, NO)]),
        (1, YES, YES, [(1, NO, YES), (0, YES, YES), (1, NO, NO), (1, YES, NO)]),
    ],
)
def test_the_visits_of_two_updates(epochs, recomputes, weighs, rows):
    """(minibatch, learns, notes old), in order."""
    found = schedule(2, epochs, recomputes=recomputes, weighs=weighs)
    assert list(zip(*(column.tolist() for column in found), strict=True)) == rows


# ------------------------------------------------------------------------------------------------------- coupled losses


def iterate(rule, extra=None, next_extra=None, **updates):
    """(samples, state after it, metrics) of one iteration, in two chunks a device and update."""
    updates = dict(clip=1e-4, n_updates=1, inner_epochs=1, old_log_prob="sampled") | updates
    n_chunks = 2 * updates["n_updates"]

    def update(state, frozen, inputs):
        weight = chunked(inputs.samples.rewards, n_chunks)
        return updated(rule, state, frozen, inputs.samples, weight, next_extra, **updates)

    def init(lora):
        return TrainState(jnp.zeros((), jnp.int32), lora, rule.optimizer.init(lora), extra)

    return iteration(Algorithm(init, lambda *args: sample(POLICY, *args, n_chunks=n_chunks), update))


def pairs(log_prob, old_log_prob, rewards):
    """PRDP's: the chains' log-ratios of two samples of a prompt are to differ as their rewards do."""
    gap = (log_prob - old_log_prob).sum(0).reshape(-1, GROUP)
    wanted = rewards[0].reshape(-1, GROUP)
    return jnp.square((gap[:, 0] - gap[:, 1]) - (wanted[:, 0] - wanted[:, 1])).mean()


def whole_group(log_prob, old_log_prob, rewards):
    """Steps and samples are coupled, and nothing is linear."""
    ratio = jnp.exp((log_prob - old_log_prob).mean(0)).reshape(-1, GROUP)
    return -(jax.nn.softmax(ratio * rewards[0].reshape(-1, GROUP), axis=1)[:, 0] * ratio.sum(1)).mean()


RATE = 0.05


@pytest.mark.parametrize(
    "loss, old_log_prob, n_updates",
    [(pairs, "sampled", 1), (pairs, "recomputed", 2), (whole_group, "sampled", 2), (whole_group, "current", 2)],
)
def test_a_coupled_loss_is_followed_as_a_whole(loss, old_log_prob, n_updates):
    """Against jax.grad of the loss itself, update by update: its groups in one chunk or in two, on any devices."""
    rule = PolicyGradient(POLICY, optax.sgd(RATE), weighted_log_prob, weigh=slopes_of(loss))
    samples, state, metrics = iterate(rule, n_updates=n_updates, old_log_prob=old_log_prob)

    @jax.jit
    def followed(lora, old_lora, rows):
        old = log_probs(old_lora, samples, rows)
        rewards = jnp.broadcast_to(jnp.asarray(samples[3])[rows], old.shape)
        grads = jax.grad(lambda lora: loss(log_probs(lora, samples, rows), old, rewards))(lora)
        return jax.tree.map(lambda x, g: x - RATE * g, lora, grads)

    expected = LORA
    for rows in np.split(np.arange(N), n_updates):
        expected = followed(expected, expected if old_log_prob == "current" else LORA, rows)
    for name, start in LORA.items():
        assert abs(float(expected[name] - start)) > 1e-4
        assert float(state.lora[name] - start) == pytest.approx(float(expected[name] - start), rel=2e-3)
    if n_updates == 1 or old_log_prob == "current":
        assert float(metrics["ratio/max_abs_log"]) < 1e-5


def test_a_groups_samples_are_weighed_together():
    """What `weigh` gets: the prompts' samples side by side, as they follow each other in the global index."""
    seen = []

    def weigh(log_prob, old_log_prob, weight):
        jax.debug.callback(lambda *x: seen.append(x), log_prob, old_log_prob, weight)
        return weight

    rule = PolicyGradient(POLICY, optax.sgd(0.0), weighted_log_prob, weigh=weigh)
    samples, _, _ = iterate(rule)
    jax.effects_barrier()
    learnt = [x for x in seen if np.abs(x[0]).max() > 0]  # not before the first visit
    rewards = np.concatenate([weight[0].reshape(-1, GROUP) for _, _, weight in learnt])
    expected = samples[3].reshape(-1, GROUP)
    assert {tuple(row) for row in rewards.tolist()} == {tuple(row) for row in expected.tolist()}
    for log_prob, old, weight in learnt:
        np.testing.assert_allclose(log_prob, old, atol=1e-5)
        np.testing.assert_array_equal(weight, np.broadcast_to(weight[0], weight.shape))


@pytest.mark.parametrize("extra, reference", [({"a": 0.9, "b": 0.2}, lambda extra: extra), (None, lambda extra: None)])
def test_a_second_lora_is_the_networks_own_output_by_it(extra, reference):
    """A loss of the distance to it alone, against jax.grad; the update reads the tree that there was before it."""

    def loss(log_prob, outputs, transition):
        distance = jnp.square(outputs[0] - outputs[1]).mean()
        return distance, {"twice": 2 * distance}

    extra = extra and jax.tree.map(jnp.float32, extra)
    rule = PolicyGradient(POLICY, optax.sgd(RATE), loss, reference=reference)
    samples, state, metrics = iterate(rule, extra=extra, next_extra=extra and jax.tree.map(jnp.zeros_like, extra))
    x_t = np.concatenate([samples[0], samples[1][:-1]])

    def by_hand(lora):
        out = [network({}, lora, x, None, CONTEXT) - network({}, extra, x, None, CONTEXT) for x in x_t]
        return jnp.square(jnp.stack(out)).mean()

    value, grads = jax.jit(jax.value_and_grad(by_hand))(LORA)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-4) and value > 1e-3
    assert float(metrics["twice"]) == pytest.approx(2 * float(metrics["loss"]), rel=1e-6)
    for name, gradient in grads.items():
        assert float(state.lora[name]) == pytest.approx(float(LORA[name] - RATE * gradient), rel=1e-4)
    assert state.extra == (extra and {"a": 0.0, "b": 0.0})


def test_a_visit_that_does_not_learn_evaluates_no_second_lora():
    """Of two updates and one that only finds old log-probs: 3 steps and 2 chunks, twice."""
    seen = []

    def counted(frozen, lora, x_t, step, context):
        if lora is None:
            jax.debug.callback(lambda: seen.append(1))
        return network(frozen, lora, x_t, step, context)

    def loss(log_prob, outputs, transition):
        return jnp.square(outputs[0] - outputs[1]).mean(), {}

    policy = POLICY._replace(network=Network(counted))
    rule = PolicyGradient(policy, optax.sgd(RATE), loss, reference=lambda extra: None)
    iterate(rule, n_updates=2, old_log_prob="recomputed")
    jax.effects_barrier()
    assert len(seen) == 2 * 2 * T * jax.device_count()


# --------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("devices", [1, 2])
def test_all_devices_samples_in_the_global_order(group, devices):
    index = np.arange(8)
    rows = np.stack([index[(index // group) % devices == d] for d in range(devices)])
    found = jax.vmap(lambda x: across_devices(x, group), axis_name="data")(rows)
    np.testing.assert_array_equal(found, np.broadcast_to(index, (devices, 8)))
