"""PRDP: its loss by literal numbers, an iteration against a plain loop, its first gradient, and whether it learns."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import prdp as prdp_config
from diffexp_jax.algorithms.prdp import PRDP, Compared, pair_loss, prdp
from diffexp_jax.errors import InputError
from diffexp_jax.sampling import Network
from diffexp_jax.settings import checked, parsed
from tests.support import two_numbers
from tests.support.two_numbers import GROUP, LORA, POLICY, N, iteration, log_probs

# ------------------------------------------------------------------------------------------------------------- the loss

# Four samples of a prompt, three steps
UNTUNED = np.array([[0.1, 0.2, 0.3], [0.0, -0.1, 0.2], [0.3, 0.1, 0.0], [0.2, 0.2, 0.2]], np.float32).T
OLD = UNTUNED + np.array([[0.01, 0, -0.01], [0, 0.02, 0], [0, 0, 0], [-0.01, 0, 0.01]], np.float32).T
MOVED = np.array([[0.05, -0.001, 0], [-0.05, 0, 0.002], [0.001, 0, 0], [0, 0.003, -0.02]], np.float32).T
REWARDS = np.array([0.3, 0.1, 0.2, 0.6], np.float32)
SLOPES = [  # of each sample, step by step: none where the clip holds
    [0.069111, 0.002630, 0.002630],
    [0.0, 0.179, 0.179],
    [0.088852, 0.088852, 0.088852],
    [-0.270482, -0.270482, -0.158667],
]


def compared(rewards, untuned=UNTUNED):
    return Compared(np.broadcast_to(np.asarray(rewards, np.float32), untuned.shape), untuned)


def test_loss_literal():
    of_pairs = partial(pair_loss, group=4, beta=0.5, clip=0.01)
    value, slopes = jax.jit(jax.value_and_grad(of_pairs))(OLD + MOVED, OLD, compared(REWARDS))
    assert float(value) == pytest.approx(0.381741, abs=1e-6)
    np.testing.assert_allclose(slopes.T, SLOPES, atol=2e-6)


def by_hand(log_prob, old, rewards, untuned, *, group, beta, clip):
    """App. G in loops, in float64; arguments [T, B] and [B]."""
    n_steps, n = log_prob.shape
    ratio, clipped = np.zeros(n), np.zeros(n)
    for i in range(n):
        for t in range(n_steps):
            step, before = float(log_prob[t, i]) - float(untuned[t, i]), float(old[t, i]) - float(untuned[t, i])
            ratio[i] += step / n_steps
            clipped[i] += min(max(step, before - clip), before + clip) / n_steps
    losses = []
    for start in range(0, n, group):
        of_pairs = []
        for i in range(start, start + group):
            for j in range(start, start + group):
                if rewards[i] > rewards[j]:
                    wanted = (float(rewards[i]) - float(rewards[j])) / beta
                    m, c = (r[i] - r[j] - wanted for r in (ratio, clipped))
                    of_pairs.append(max(m * m, c * c))
        losses.append(np.mean(of_pairs) if of_pairs else 0.0)
    return np.mean(losses)


@pytest.mark.parametrize("group, beta", [(2, 0.5), (3, 3.0), (6, 0.01)])
def test_loss_is_the_plain_loops(group, beta):
    rng = np.random.default_rng(group)
    untuned, old, log_prob = (x.astype(np.float32) for x in rng.normal(0, [[[1.0]], [[0.1]], [[0.1]]], (3, 5, 12)))
    old, log_prob = untuned + old, untuned + log_prob
    rewards = rng.choice([0.1, 0.2, 0.5], 12).astype(np.float32)  # some are equal
    found = jax.jit(partial(pair_loss, group=group, beta=beta, clip=0.05))(log_prob, old, compared(rewards, untuned))
    want = by_hand(log_prob, old, rewards, untuned, group=group, beta=beta, clip=0.05)
    assert want > 0 and float(found) == pytest.approx(want, rel=1e-4)


def test_equal_rewards_say_nothing():
    """A prompt without a pair has no loss and no gradient, beside one that has, and alone."""
    of_pairs = jax.jit(jax.value_and_grad(partial(pair_loss, group=2, beta=0.5, clip=0.01)))
    value, slopes = of_pairs(OLD, OLD, compared([0.1, 0.1, 0.2, 0.6]))
    slopes = np.asarray(slopes)
    assert np.isfinite(slopes).all() and (slopes[:, :2] == 0).all() and (slopes[:, 2:] != 0).all() and value > 0
    value, slopes = of_pairs(OLD, OLD, compared([0.1] * 4))
    assert value == 0 and not np.any(slopes)


@pytest.mark.parametrize("beta, clip, difference", [(3e-5, 1e-6, 0.03), (3e-6, 1e-4, 0.01), (3e-5, 3e-3, 7.0)])
@pytest.mark.parametrize("moved", [1.5, 5.0, 30.0])
def test_the_clip_holds_where_float32_sees_no_difference(beta, clip, difference, moved):
    """By the published numbers: a step that moved towards the rewards, farther than the clip, stops; others do not."""
    slopes_of_loss = jax.jit(jax.grad(partial(pair_loss, group=2, beta=beta, clip=clip)))
    rewards = compared([difference, 0.0, difference, 0.0])
    towards = np.zeros_like(OLD)
    towards[0], towards[1] = moved * clip * np.array([1, -1, -1, 1]), 0.5 * clip
    slopes = np.asarray(slopes_of_loss(jnp.asarray(OLD + towards), OLD, rewards))
    size = 2 * difference / beta / len(OLD) / 2  # of one step: the loss is a mean over two prompts, R one over steps
    np.testing.assert_array_equal(slopes[0, :2], 0.0)
    np.testing.assert_allclose(slopes[1:, :2], size * np.array([[-1, 1]] * (len(OLD) - 1)), rtol=1e-4)
    np.testing.assert_allclose(slopes[:, 2:], size * np.array([[-1, 1]] * len(OLD)), rtol=1e-4)


@pytest.mark.parametrize("group", [4, 2])
def test_the_first_gradient_is_a_policy_gradient_with_the_groups_baseline(group):
    """At theta = old = untuned: d loss / d R_i = -4 / ((B - 1) beta) (r_i - mean r) of a group, over the prompts."""
    of_pairs, beta = partial(pair_loss, group=group, beta=3e-5, clip=1e-6), 3e-5
    rewards = np.array([0.3, 0.1, 0.2, 0.7], np.float32)
    slopes = jax.jit(jax.grad(of_pairs))(UNTUNED, UNTUNED, compared(rewards))
    slopes = np.asarray(slopes).sum(0).reshape(-1, group)
    of_prompt = rewards.reshape(-1, group)
    above = of_prompt - of_prompt.mean(1, keepdims=True)
    np.testing.assert_allclose(slopes, -4 / ((group - 1) * beta) * above / len(of_prompt), rtol=1e-5)


# --------------------------------------------------------------------------------------------------------- an iteration

RATE = 0.005
SETTINGS = dict(n_chunks=2, n_updates=1, inner_epochs=1, beta=2.0, clip=0.02, group=GROUP)


@pytest.mark.parametrize("n_updates, inner_epochs, old_log_prob", [(1, 3, "sampled"), (2, 2, "recomputed")])
def test_an_iteration_is_the_plain_loop(n_updates, inner_epochs, old_log_prob):
    """Update by update against the gradient of the loss itself, of prompts in one chunk or in two."""
    split = dict(n_updates=n_updates, inner_epochs=inner_epochs, old_log_prob=old_log_prob, n_chunks=2 * n_updates)
    samples, state, metrics = iteration(prdp(POLICY, optax.sgd(RATE), **SETTINGS | split))

    @jax.jit
    def followed(lora, rows):
        old, untuned = (log_probs(tree, samples, rows) for tree in (LORA, None))
        rewards = jnp.broadcast_to(jnp.asarray(samples[3])[rows], old.shape)

        def loss(lora):
            options = dict(group=GROUP, beta=2.0, clip=0.02)
            return pair_loss(log_probs(lora, samples, rows), old, Compared(rewards, untuned), **options)

        value, grads = jax.value_and_grad(loss)(lora)
        return value, jax.tree.map(lambda x, g: x - RATE * g, lora, grads)

    expected, losses = LORA, []
    for _ in range(inner_epochs):
        for rows in np.split(np.arange(N), n_updates):
            value, expected = followed(expected, rows)
            losses.append(value)
    for name, start in LORA.items():
        assert abs(float(expected[name] - start)) > 1e-4
        assert float(state.lora[name] - start) == pytest.approx(float(expected[name] - start), rel=2e-3)
    everything = np.arange(N)
    path = (log_probs(LORA, samples, everything) - log_probs(None, samples, everything)).sum(0).mean()
    assert float(metrics["kl/path"]) == pytest.approx(float(path), rel=1e-3)
    if n_updates == 1:
        assert float(metrics["loss"]) == pytest.approx(float(losses[0]), rel=1e-4)


def shifting(frozen, lora, x_t, step, context):
    """A network whose LoRA can make all images brighter."""
    a, b = (0.0, 0.0) if lora is None else (lora["a"], lora["b"])
    return (0.3 + a) * x_t + b


def test_learns_brightness():
    """On samples never trained on; a larger beta holds it nearer to the untuned model."""
    policy, nothing = POLICY._replace(network=Network(shifting)), jax.tree.map(jnp.zeros_like, LORA)
    learnt = {}
    for beta in (1e-2, 1e3):
        settings = SETTINGS | {"beta": beta, "inner_epochs": 2, "n_chunks": 1, "n_trained": 1}
        learnt[beta] = two_numbers.learnt(prdp(policy, optax.adam(0.02), **settings), nothing)
    assert learnt[1e-2] > 0.5 and abs(learnt[1e3]) < 0.1, learnt


# ------------------------------------------------------------------------------------------------------------- settings


def test_the_published_settings():
    found = parsed(prdp_config.get_config("model=sd15,reward=hpsv2:x,prompts=animals"))
    assert found.method == PRDP(beta=3e-5, clip=1e-6, inner_epochs=10, updates=1)
    assert (found.batch.samples, found.batch.group, found.iterations) == (32 * 16, 16, 100)
    assert (found.sampling.steps, found.sampling.guidance, found.sampling.eta) == (50, 5.0, 1.0)
    assert (found.optim.weight_decay, found.optim.grad_clip) == (1e-4, 1.0)


def test_what_it_costs():
    """Sampling, the untuned model once, and log-probs before each update but the first."""
    passes = {"to sample": 1.0, "with a gradient": 3.0, "of the untuned model": 1.0, "to weigh": 2.0}
    assert PRDP(inner_epochs=3).passes(10, True) == passes
    passes = PRDP(inner_epochs=1, timestep_fraction=0.5).passes(10, True)
    assert passes == {"to sample": 1.0, "with a gradient": 0.5, "of the untuned model": 0.5}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"batch.group": 1}, "batch.group=1: prdp compares samples of a prompt; wants at least 2"),
        ({"sampling.eta": 0.0}, r"sampling.eta=0: prdp needs steps with noise \(their log-probability\)"),
        ({"prdp.beta": 0.0}, "prdp.beta=0.0: wants more than 0"),
        ({"prdp.clip": float("nan")}, "prdp.clip=nan: wants more than 0"),
        ({"prdp.inner_epochs": 0}, "prdp.inner_epochs=0: wants 1..4096"),
        ({"batch.group": 3}, "batch.samples=8: wants a multiple of batch.group=3"),
    ],
)
def test_bad_settings(make_config, changes, said):
    with pytest.raises(InputError, match=said):
        checked(make_config("prdp", {"batch.group": 2} | changes))
