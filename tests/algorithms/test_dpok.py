"""DPOK: its losses by literal numbers, an iteration against a plain loop, its value function, and whether it learns."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from configs import dpok as dpok_config
from diffexp_jax import parallel
from diffexp_jax.algorithms import Batch, Inputs, Policy, Setup, dpok
from diffexp_jax.errors import InputError
from diffexp_jax.run.checkpoint import Checkpoints
from diffexp_jax.sampling import Context, load_process, step_log_prob
from diffexp_jax.settings import checked, parsed
from tests.support.tiny import SCHEDULER, network_of

PROCESS = load_process(SCHEDULER)
T, N, SHAPE = 4, 6, (2, 2, 3)
STEPS = PROCESS.make_steps(PROCESS.timesteps(T), np.full(T, 3.0, np.float32), eta=1.0)
CONTEXT = Context(np.zeros((N, 1, 1), np.float32), np.zeros((N, 1, 1), np.float32))
LORA = {"a": jnp.float32(0.4), "b": jnp.float32(-0.1)}
SETTINGS = dict(n_prompts=3, n_steps=T, n_updates=1, n_chunks=1, inner_epochs=1, clip=1e-4, reward_weight=10.0)
SETTINGS |= dict(kl_weight=0.01, value_baseline=False, value_lr=1e-2, value_steps=5, value_batches=5)
SETTINGS |= dict(value_key=jax.random.key(0))


@pytest.mark.parametrize(
    "log_ratio, adv, loss, slope",
    [
        (0.0, 2.0, -2.0, -2.0),
        (0.05, 2.0, -2 * np.exp(0.05), -2 * np.exp(0.05)),
        (0.2, 2.0, -2.2, 0.0),  # above the clip
        (-0.2, 2.0, -1.8, 0.0),  # below it, where DDPO would still learn
        (0.2, -2.0, 2.2, 0.0),  # and here too
        (-0.2, -2.0, 1.8, 0.0),
    ],
)
def test_clamped_ratio_literal(log_ratio, adv, loss, slope):
    new, old, adv = (np.full(3, x, np.float32) for x in (log_ratio - 1.0, -1.0, adv))
    found, gradient = jax.jit(jax.value_and_grad(partial(dpok.clamped_ratio_loss, clip=0.1)))(new, old, adv)
    assert found == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(gradient, slope / 3, rtol=1e-5)


def test_divergence_literal():
    assert dpok.divergence(jnp.array([1.0, 2.0]).reshape(1, 1, 1, 2), jnp.array([0.0, 5.0]).reshape(1, 1, 1, 2)) == 5.0


def test_divergence_is_the_kl_but_for_a_factor():
    """Of the two Gaussians of a step: |mu - mu_0|^2 / (2 std^2) over |eps - eps_0|^2 is one number for a step."""
    rng = np.random.default_rng(0)
    x_t, out, untuned = (rng.standard_normal((2, *SHAPE)).astype(np.float32) for _ in range(3))
    step = jax.tree.map(lambda column: column[1], STEPS)
    (mean, std), (mean_0, _) = (PROCESS.transition(x_t, x, step) for x in (out, untuned))
    factors = np.asarray(jnp.square(mean - mean_0) / (2 * std**2) / jnp.square(out - untuned))
    np.testing.assert_allclose(factors, factors.flat[0], rtol=1e-3)


# ---------------------------------------------------------------------------- an iteration, on a network of two numbers


def linear(frozen, lora):
    """Without a LoRA the network is 0.3 x."""
    a, b = (0.3, 0.0) if lora is None else (0.3 + lora["a"], lora["b"])
    return lambda x_t, step, context: a * x_t + b


POLICY = Policy(
    network=network_of(linear),
    decode=lambda frozen, x_0: jax.nn.sigmoid(x_0),
    score=lambda frozen, images, tokens: (10.0 * images.mean((1, 2, 3)), {}),
    latent_shape=SHAPE,
    process=PROCESS,
)


def iterate(optimizer, **changes):
    """(state before, samples, state after, metrics) of one iteration."""
    algorithm = dpok.dpok(POLICY, optimizer, **SETTINGS | changes)
    ids = np.arange(N, dtype=np.int32) % 3
    batch = parallel.shard(Batch(ids, CONTEXT, ids, parallel.sample_keys(jax.random.key(3), N)), N)
    state, frozen, steps, key = parallel.replicate((algorithm.init(LORA), {}, STEPS, jax.random.key(0)))
    samples = parallel.pmap(algorithm.sample)(state, frozen, batch, steps)
    after, metrics = parallel.pmap(algorithm.update)(state, frozen, Inputs(batch, steps, key, samples))
    return parallel.first(state), parallel.first(samples), parallel.first(after), parallel.first(metrics)


@pytest.mark.parametrize(
    "n_chunks, kl_weight, n_trained",
    [
        pytest.param(1, 0.5, None, marks=pytest.mark.slow),
        pytest.param(3, 0.5, None, marks=pytest.mark.slow),
        (3, 0.0, None),
        (3, 0.5, 2),
    ],
)
def test_an_iteration_is_the_plain_loop(n_chunks, kl_weight, n_trained):
    _, samples, after, metrics = iterate(optax.sgd(0.1), n_chunks=n_chunks, kl_weight=kl_weight, n_trained=n_trained)
    kept, n = samples.trajectory, n_trained or T
    x_t = jax.jit(jax.vmap(lambda kept: jax.vmap(kept.x_t)(jnp.arange(n))))(kept)
    tr = jax.tree.map(lambda x: np.asarray(x).swapaxes(0, 1).reshape(n, N, *SHAPE), (x_t, kept.x_tm1))

    def objective(lora):
        total = 0.0
        for i in range(n):
            step = jax.tree.map(lambda column, i=i: column[i], STEPS)
            log_prob = step_log_prob(PROCESS, linear({}, lora), tr[0][i], tr[1][i], step, CONTEXT)
            ratio = jnp.exp(log_prob - jax.lax.stop_gradient(log_prob))
            gap = linear({}, lora)(tr[0][i], step, None) - linear({}, None)(tr[0][i], step, None)
            total += -10.0 * (samples.rewards * ratio).mean() + kl_weight * jnp.square(gap).mean()
        return total / n

    value, grads = jax.jit(jax.value_and_grad(objective))(LORA)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    for name, gradient in grads.items():
        assert float(after.lora[name]) == pytest.approx(float(LORA[name] - 0.1 * gradient), rel=1e-4)


def test_the_penalty_alone_leads_back_to_the_untuned_model():
    """With no reward to gain: a LoRA of nothing is where it ends."""
    algorithm_settings = dict(reward_weight=0.0, kl_weight=1.0, clip=1e9)
    lora = dict(LORA)
    for _ in range(3):
        algorithm = optax.sgd(0.3)
        before, _, after, _ = iterate(algorithm, **algorithm_settings)
    assert all(abs(after.lora[name]) < abs(lora[name]) for name in lora)
    assert before.extra is None


# ------------------------------------------------------------------------------------------------------ value function


def test_value_is_the_published_network():
    """relu(factor_t (x W + b)) three times, then a linear layer: of the state and the prompt's vector."""
    torch = pytest.importorskip("torch")
    params = jax.jit(dpok.init_value, static_argnums=(1, 2, 3))(jax.random.key(0), 12, 3, T)
    x_t = np.random.default_rng(0).standard_normal((5, *SHAPE)).astype(np.float32)
    ids = np.array([0, 2, 1, 1, 0])
    x = torch.cat([torch.tensor(x_t).flatten(1), torch.tensor(np.asarray(params["prompt"])[ids])], dim=1)
    for layer in params["layers"]:
        weight, bias, factor = (torch.tensor(np.asarray(layer[name])) for name in ("kernel", "bias", "factor"))
        x = torch.relu(factor[2] * torch.nn.functional.linear(x, weight.T, bias))
    last = params["last"]
    want = torch.nn.functional.linear(
        x, torch.tensor(np.asarray(last["kernel"])).T, torch.tensor(np.asarray(last["bias"]))
    )
    ours = jax.jit(dpok.value)(params, x_t, ids, np.int32(2))
    np.testing.assert_allclose(ours, want[:, 0].numpy(), rtol=1e-4, atol=1e-4)


def test_the_value_function_learns_and_is_the_baseline():
    """Its error falls; a sample's weight is its reward less what is expected."""
    before, samples, after, metrics = iterate(optax.sgd(0.0), value_baseline=True, value_steps=200, kl_weight=0.0)
    rewards, values = np.asarray(samples.rewards), jax.jit(dpok.values)
    trajectory, ids = samples.trajectory, np.arange(N, dtype=np.int32)[None] % 3
    error = {
        name: float(np.square(values(state.extra.value, trajectory, ids) - rewards).mean())
        for name, state in (("before", before), ("after", after))
    }
    assert error["before"] == pytest.approx(float(metrics["value/error"]), rel=1e-4)
    assert error["after"] < 0.1 * error["before"]
    expected = rewards - values(after.extra.value, trajectory, ids)
    assert float(metrics["loss"]) == pytest.approx(-10.0 * float(expected.mean()), abs=1e-3)


def test_the_states_of_minibatches():
    """Three minibatches of 256 of 600 states: each state at most once in one; of few states, all of them."""
    drawn = np.asarray(dpok.shares_drawn(jax.random.key(0), 600, n_batches=3)) * 3 * 256
    np.testing.assert_allclose(drawn, drawn.round(), atol=1e-3)
    assert drawn.sum() == pytest.approx(3 * 256) and drawn.max() == pytest.approx(3) and (drawn < 0.5).any()
    np.testing.assert_allclose(dpok.shares_drawn(jax.random.key(0), 24, n_batches=5), 1 / 24, rtol=1e-6)


def test_the_states_that_are_drawn_do_not_depend_on_the_devices(monkeypatch):
    monkeypatch.setattr(dpok, "MINIBATCH", 8)

    def shares(devices, chunks, group=1):
        of_device = partial(dpok.own_shares, shape=(chunks, T, N // devices // chunks), n_batches=2, group=group)
        found = jax.vmap(lambda _, key: of_device(key), (0, None), axis_name=dpok.AXIS, axis_size=devices)
        found = np.asarray(jax.jit(found)(np.arange(devices), jax.random.key(1)))
        return found.swapaxes(2, 3).reshape(devices, -1, group, T).swapaxes(0, 1).reshape(N, T)

    alone = shares(1, 1)
    assert alone.sum() == pytest.approx(1) and (alone == 0).any()
    for split in ((2, 1), (3, 2), (3, 1, 2), (1, 2, 3)):
        np.testing.assert_array_equal(shares(*split), alone)


def test_the_value_function_is_fitted_as_published(monkeypatch):
    """torch's AdamW with its default decay: one step, by the gradients of minibatches, each divided by their number."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(dpok, "MINIBATCH", 8)
    lr, n_batches = 1e-2, 3
    before, samples, after, metrics = iterate(
        optax.sgd(0.0), value_baseline=True, value_lr=lr, value_steps=1, value_batches=n_batches
    )
    kept, rewards = jax.tree.map(lambda x: x[0], samples.trajectory), torch.tensor(np.asarray(samples.rewards))
    states = np.stack([np.asarray(kept.x_t(i)) for i in range(T)], 1).reshape(N * T, -1)  # sample by sample
    params = jax.tree.map(lambda x: torch.tensor(np.asarray(x), requires_grad=True), before.extra.value)

    def value(rows):
        prompt = params["prompt"][torch.tensor(rows // T % 3)]
        x = torch.cat([torch.tensor(states[rows]), prompt], dim=1)
        for layer in params["layers"]:
            x = torch.relu(layer["factor"][torch.tensor(rows % T)] * (x @ layer["kernel"] + layer["bias"]))
        return (x @ params["last"]["kernel"] + params["last"]["bias"])[:, 0]

    optimizer, total = torch.optim.AdamW(jax.tree.leaves(params), lr=lr), 0.0
    (key,) = jax.random.split(jax.random.key(0), 1)  # of the update's only step
    for draw in jax.random.split(key, n_batches):
        rows = np.asarray(jax.random.permutation(draw, N * T))[:8]
        loss = torch.nn.functional.mse_loss(value(rows), rewards[torch.tensor(rows // T)]) / n_batches
        loss.backward()
        total += float(loss.detach())
    optimizer.step()
    assert float(metrics["value/error"]) == pytest.approx(total, rel=1e-4)
    for found, want in zip(jax.tree.leaves(after.extra.value), jax.tree.leaves(params), strict=True):
        want = want.detach().numpy()
        moved = np.abs(np.asarray(found) - want)
        assert (moved <= 1e-5).mean() > 0.99 and moved.max() < 2.1 * lr  # Adam turns the sign of a gradient near zero


def test_passes():
    """Each pass over the samples evaluates the untuned model too."""
    method = dpok.DPOK(inner_epochs=3, timestep_fraction=0.5)
    assert method.passes(10, True) == {"to sample": 1.0, "with a gradient": 1.5, "of the untuned model": 1.5}


def test_the_seed_starts_the_value_function():
    def params(seed):
        setup = Setup(POLICY, optax.sgd(0.1), N, 1, 3, T, False, 2, True, partial(parallel.stream, seed))
        return dpok.DPOK().make(setup).init(LORA).extra.value

    same, other = (jax.tree.map(np.array_equal, params(0), params(seed)) for seed in (0, 1))
    assert all(jax.tree.leaves(same)) and not other["last"]["kernel"] and not other["prompt"]


def test_a_checkpoint_of_an_older_version_goes_on(tmp_path):
    """It has the state of Adam, which knows no decay."""
    before = dpok.dpok(POLICY, optax.adam(1e-3), **SETTINGS | dict(value_baseline=True)).init(LORA)
    older = before.replace(extra=dpok.Extra(before.extra.value, optax.adam(1e-4).init(before.extra.value)))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, jax.device_get(older))
        step, found = checkpoints.restore_newest(jax.device_get(before))
    assert step == 3 and jax.tree.structure(found) == jax.tree.structure(before)
    jax.tree.map(np.testing.assert_array_equal, found, before)


@pytest.mark.parametrize("devices, samples", [(1, 64), (2, 64), (8, 256)])
def test_settings_that_can_learn_at_sds_size(devices, samples):
    """As published: 10,000 updates and 2,000 steps of the value function, of 20,000 images."""
    config = dpok_config.get_config("model=sd15")
    numbers = config.batch.samples, config.dpok.updates, config.dpok.value_steps
    assert [config.iterations * n for n in numbers] == pytest.approx([20_000, 10_000, 2_000], rel=0.07)
    assert (config.optim.lr, config.dpok.value_lr, config.dpok.value_batches) == (1e-5, 1e-4, 5)
    config.batch.samples = samples
    split = parsed(config).split_among(devices)
    assert split.updates == 32 and split.chunks // split.updates * split.per_forward * devices == samples // 32


@pytest.mark.slow
def test_learns_brightness():
    """On samples never trained on; the penalty holds it back."""
    n, risen = 64, {}
    steps, key = parallel.replicate((STEPS, jax.random.key(0)))
    context = Context(np.zeros((n, 1, 1), np.float32), np.zeros((n, 1, 1), np.float32))

    def batch(it):
        ids, keys = np.arange(n, dtype=np.int32) % 3, parallel.sample_keys(parallel.stream(0, "noise", it), n)
        return parallel.shard(Batch(ids, context, ids, keys), n)

    for name, kl_weight in (("up", 0.0), ("held", 100.0)):
        settings = SETTINGS | dict(value_baseline=True, value_steps=20, clip=1e-2, kl_weight=kl_weight)
        algorithm = dpok.dpok(POLICY, optax.adam(1e-2), **settings)
        state = parallel.replicate(algorithm.init({"a": jnp.float32(0.0), "b": jnp.float32(0.0)}))
        frozen = parallel.replicate({})
        sample, update = parallel.pmap(algorithm.sample), parallel.pmap(algorithm.update)
        before = sample(state, frozen, batch(1000), steps).rewards.mean()
        for it in range(20):
            samples = sample(state, frozen, batch(it), steps)
            state, _ = update(state, frozen, Inputs(batch(it), steps, key, samples))
        risen[name] = float(sample(state, frozen, batch(1000), steps).rewards.mean() - before)
    assert risen["up"] > 0.1 and abs(risen["held"]) < 0.3 * risen["up"], risen


@pytest.mark.parametrize("key, bad", [("updates", 0), ("value_steps", 0), ("kl_weight", -1.0), ("old_log_prob", "x")])
def test_bad_settings(key, bad):
    config = base.default()
    config.algorithm = "dpok"
    config.dpok[key] = bad
    with pytest.raises(InputError, match=f"dpok.{key}"):
        checked(config)
