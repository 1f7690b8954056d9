"""DRaFT: its gradient in closed form, against AlignProp's and a plain loop, and whether it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffexp_jax import parallel
from diffexp_jax.algorithms import METHODS, Batch, Inputs, Policy
from diffexp_jax.algorithms.alignprop import alignprop
from diffexp_jax.algorithms.draft import DRaFT, draft, last_step_again
from diffexp_jax.errors import InputError
from diffexp_jax.experiment import Experiment
from diffexp_jax.models.lora import init_lora
from diffexp_jax.sampling import Context, initial_latents, load_process, step_noise
from diffexp_jax.sampling.flow import SCHEDULER as FLOW
from diffexp_jax.settings import checked
from tests.support.tiny import network_of, nonzero_lora, policy_of

SHAPE, N, T = (2, 2, 3), 8, 4
DDIM = {"beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1}
PROCESSES = {"ddim": load_process(DDIM), "flow": load_process({"_class_name": FLOW})}
RATE = 100.0  # the gradients are small, and a difference of LoRAs is rounded
LORA = {"a": jnp.float32(0.7), "b": jnp.float32(-0.2)}


def linear(frozen, lora):
    return lambda x_t, step, context: lora["a"] * x_t + lora["b"] * jnp.cos(x_t)


def policy(process):
    return Policy(
        network=network_of(linear),
        decode=lambda frozen, x_0: jax.nn.sigmoid(x_0),
        score=lambda frozen, images, tokens: (jnp.square(images).mean((1, 2, 3)), {}),
        latent_shape=SHAPE,
        process=process,
    )


def steps_of(process, n=T):
    return process.make_steps(process.timesteps(n), np.full(n, 2.0, np.float32), eta=0.0)


KEYS = parallel.sample_keys(jax.random.key(3), N)


def update(algorithm, steps):
    """One update by gradient descent of rate RATE: (what it takes from the LoRA / RATE, metrics)."""
    cond = np.zeros((N, 1, 1), np.float32)
    batch = parallel.shard(Batch(np.zeros(N, np.int32), Context(cond, cond), None, KEYS), N)
    state = parallel.replicate(algorithm.init(LORA))
    inputs = Inputs(batch, *parallel.replicate((steps, jax.random.key(0))))
    state, metrics = parallel.pmap(algorithm.update)(state, parallel.replicate({}), inputs)
    change = jax.tree.map(lambda before, after: float(before - after) / RATE, LORA, parallel.first(state.lora))
    return change, parallel.first(metrics)


def by_hand(process, steps, k, lv_samples):
    """As the paper puts it: the latent itself is cut off before the last k steps."""

    def objective(lora):
        denoise, x = linear({}, lora), initial_latents(KEYS, SHAPE)

        def step(x, i):
            row = jax.tree.map(lambda column: column[i], steps)
            return process.transition(x, denoise(x, row, None), row)[0]

        def reward(x_0):
            return jnp.square(jax.nn.sigmoid(x_0)).mean()

        for i in range(T):
            x = step(jax.lax.stop_gradient(x) if i == T - k else x, i)
        total = reward(x)
        last = jax.tree.map(lambda column: column[-1], steps)
        for draw in range(lv_samples):
            noise = step_noise(KEYS, jnp.int32(T + draw), SHAPE)
            total += reward(step(process.add_noise(jax.lax.stop_gradient(x), noise, last), T - 1))
        return total

    value, grads = jax.jit(jax.value_and_grad(objective))(LORA)
    return float(value), jax.tree.map(lambda g: -float(g), grads)


LONG = [pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0, 1), (2, 0, 2), (T, 0, 1), (1, 2, 1))]


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("k, lv_samples, n_chunks", [(1, 3, 4), *LONG])
def test_an_update_is_the_plain_loops(name, k, lv_samples, n_chunks):
    process = PROCESSES[name]
    steps = steps_of(process)
    value, grads = by_hand(process, steps, k, lv_samples)
    change, metrics = update(
        draft(policy(process), optax.sgd(RATE), n_chunks=n_chunks, k=k, lv_samples=lv_samples), steps
    )
    assert change == pytest.approx(grads, rel=1e-3)
    assert float(metrics["loss"]) == pytest.approx(-value, rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(np.hypot(*grads.values()), rel=1e-3)


def test_draft_k_is_alignprop_of_fixed_k():
    """With the plain mean reward and no coefficient: AlignProp cuts the network's outputs, DRaFT the latent."""
    process, steps = PROCESSES["ddim"], steps_of(PROCESSES["ddim"])
    settings = dict(n_chunks=1, loss_coefficient=1.0, reward_target=None, truncation="fixed", truncation_k=2)
    theirs, _ = update(alignprop(policy(process), optax.sgd(RATE), **settings), steps)
    ours, _ = update(draft(policy(process), optax.sgd(RATE), n_chunks=1, k=2, lv_samples=0), steps)
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=list(PROCESSES))
def test_the_last_level_is_the_forward_processes(process):
    """x_1 = signal x_0 + noise eps of the last row, literally."""
    last = jax.tree.map(lambda column: column[-1], steps_of(process, 10))
    x_0, eps = np.full((1, *SHAPE), 2.0, np.float32), np.full((1, *SHAPE), -1.0, np.float32)
    found = float(process.add_noise(x_0, eps, last)[0, 0, 0, 0])
    if process is PROCESSES["ddim"]:
        assert found == pytest.approx(2 * np.sqrt(0.99979736) - np.sqrt(1 - 0.99979736), rel=1e-5)
    else:
        assert found == pytest.approx(2 * 0.999 - 0.001, rel=1e-5)


@pytest.mark.parametrize("ends_without_noise, times", [(True, 1.0), (False, 3.4)])
def test_lv_is_the_papers_where_the_chain_ends_without_noise(ends_without_noise, times):
    """There its x_0 is (x_1 - sigma_1 eps) / alpha_1; by SD's schedule the paper's follows eps 3.4 times as much."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012}
    process = load_process(DDIM | betas | {"set_alpha_to_one": ends_without_noise})
    steps, x_0 = steps_of(process, 50), np.full((N, *SHAPE), 2.0, np.float32)
    chunk = Batch(np.zeros(N, np.int32), None, None, KEYS)

    def ours(eps):
        return last_step_again(policy(process), lambda x, step, context: jnp.full_like(x, eps), x_0, chunk, steps, 0)

    noise, a_1 = step_noise(KEYS, 50, SHAPE), 0.99829603  # alpha_bar of t = 1
    x_1 = np.sqrt(a_1) * x_0 + np.sqrt(1 - a_1) * noise
    slope = float((ours(1.0) - ours(0.0)).mean())
    assert -np.sqrt((1 - a_1) / a_1) / slope == pytest.approx(times, rel=0.01)
    if ends_without_noise:
        np.testing.assert_allclose(ours(0.5), (x_1 - np.sqrt(1 - a_1) * 0.5) / np.sqrt(a_1), rtol=1e-4)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"k": 0, "lv_samples": 0}, "draft.k=0: wants 1..50"),
        ({"k": 51, "lv_samples": 0}, "draft.k=51: wants 1..50"),
        ({"k": 2, "lv_samples": 2}, "draft.k=2: with draft.lv_samples wants 1"),
    ],
)
def test_settings(settings, said):
    with pytest.raises(InputError, match=said):
        DRaFT(**settings).check(50)
    DRaFT(k=50, lv_samples=0).check(50)
    assert METHODS["draft"].needs.reward_gradient and not METHODS["draft"].needs.step_noise


@pytest.mark.slow
@pytest.mark.parametrize("lv_samples", [0, 2])
def test_learns_brightness(make_config, lv_samples):
    """On a real, tiny model, on samples never trained on."""
    config = make_config("draft", {"eval.every": 0, "batch.samples": 16})
    experiment = Experiment.build(checked(config))
    frozen = {"model": parallel.replicate(experiment.frozen.model)}
    tiny = policy_of(experiment.sampler.pipeline, lambda frozen, images: images.mean((1, 2, 3)))
    algorithm = draft(tiny, optax.adam(5e-3), n_chunks=2, k=1, lv_samples=lv_samples)
    lora = nonzero_lora(init_lora(jax.random.key(0), experiment.sampler.pipeline.base, rank=2))
    steps = parallel.replicate(experiment.sampler.steps(explore=False))
    train, state = parallel.pmap(algorithm.update), parallel.replicate(algorithm.init(lora))
    key = parallel.replicate(jax.random.key(0))
    rewards = []
    for it in [99, *range(8), 99]:  # the first and the last batch have the same prompts and noise
        state, metrics = train(state, frozen, Inputs(experiment.draw_batch(it, None), steps, key))
        rewards.append(float(metrics["reward/mean"][0]))
    assert rewards[-1] > rewards[0] + 2e-3
