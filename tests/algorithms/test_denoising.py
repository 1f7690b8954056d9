"""What the methods that learn from images alone share: noise levels, what they see of a prompt, and that they learn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffexp_jax import parallel
from diffexp_jax.algorithms import METHODS, Inputs, Setup, denoising
from diffexp_jax.errors import InputError
from diffexp_jax.experiment import Experiment
from diffexp_jax.models.lora import init_lora
from diffexp_jax.sampling import load_process
from diffexp_jax.sampling.flow import SCHEDULER as FLOW
from diffexp_jax.settings import checked
from tests.support import images_alone as alone
from tests.support.tiny import SCHEDULER, nonzero_lora, policy_of

FROM_IMAGES = ("rwr", "nft", "awm")
KEYS = parallel.sample_keys(jax.random.key(0), 400)


@pytest.mark.parametrize(
    "kind, t, level, x_0",
    [
        ("flow", 250.0, 0.25, 0.25),
        ("flow", 1000.0, 1.0, 1.0),
        # alpha_bar 0.00577550 and 0.99829603: noise / (signal + noise), and noise / signal or noise
        ("epsilon", 981, 0.9291783, 13.1202),
        ("epsilon", 1, 0.0396756, 0.0413148),
        ("v", 981, 0.9291783, 0.9971081),
    ],
)
def test_scales_literal(kind, t, level, x_0):
    process = alone.PROCESSES[kind]
    found = denoising.scales(process, process.training_row(jnp.array([t])))
    assert float(found.level[0]) == pytest.approx(level, rel=2e-5) and float(found.x_0[0]) == pytest.approx(
        x_0, rel=2e-5
    )


@pytest.mark.parametrize("kind", alone.PROCESSES)
def test_an_outputs_error_is_that_of_its_x_0(kind):
    """The process' own last step, to no noise, is the x_0 that an output predicts."""
    process, rng = alone.PROCESSES[kind], np.random.default_rng(0)
    x_0, out = (rng.standard_normal((1, *alone.SHAPE)).astype(np.float32) for _ in range(2))
    at = denoising.noised(process, x_0, jnp.array([501]), KEYS[:1])
    row = process.make_steps(process.timesteps(1) * 0 + 501, np.ones(1), eta=0.0)
    row = jax.tree.map(lambda x: x[0], row)
    row = row._replace(dt=row.level) if kind == "flow" else row._replace(alpha_bar_prev=jnp.float32(1.0))
    predicted, _ = process.transition(at.x_t, out, row)
    error = np.abs(denoising.scales(process, at.row).x_0[0] * (at.target - out))
    np.testing.assert_allclose(np.abs(predicted - x_0), error, rtol=1e-3, atol=1e-5)


def test_timesteps_that_are_drawn():
    process = alone.PROCESSES["flow"]
    steps = process.make_steps(process.timesteps(10), np.ones(10), eta=0.0)
    uniform = np.asarray(denoising.uniform_timesteps(KEYS, process))
    assert 1 <= uniform.min() < 30 and 970 < uniform.max() <= 999 and abs(uniform.mean() - 500) < 60
    shuffled = np.stack([denoising.shuffled_timesteps(KEYS, steps, jnp.int32(i)) for i in range(10)])
    np.testing.assert_array_equal(np.sort(shuffled, axis=0), np.sort(steps.t)[:, None] + np.zeros((1, 400)))
    assert len(np.unique(shuffled, axis=1).T) > 300  # an order for each image
    for i, (low, high) in enumerate(((0, 3), (3, 6), (6, 9))):  # int(0.9 * 10) = 9 steps in three parts
        part = denoising.stratified_timesteps(KEYS, steps, jnp.int32(i), n=3, fraction=0.9)
        np.testing.assert_array_equal(np.unique(part), np.sort(steps.t[low:high]))
    few = denoising.stratified_timesteps(KEYS, steps, jnp.int32(4), n=6, fraction=0.3)  # more parts than steps
    np.testing.assert_array_equal(np.unique(few), np.sort(steps.t[2:3]))


def test_noise_is_another_in_each_pass_and_not_the_samplers():
    keys = [KEYS[:3], *(denoising.folded(KEYS[:3], denoising.UPDATE + epoch) for epoch in range(2))]
    data = np.concatenate([jax.random.key_data(x) for x in keys])
    assert len(np.unique(data, axis=0)) == 9


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_guidance_is_that_of_the_nearest_step(kind):
    """The sampler's timesteps are 751, 501, 251, 1, or a flow's 1000, 900, 750, 8.9 by its shift of 3."""
    process = alone.PROCESSES[kind]
    steps = process.make_steps(process.timesteps(alone.T), alone.W_T, eta=0.0)
    row = process.training_row(np.array([999, 627, 2]))
    np.testing.assert_array_equal(denoising.guided_as(steps, row).w_t, [1.0, 1.0 if kind == "epsilon" else 3.0, 3.0])


@pytest.mark.slow  # a program each
@pytest.mark.parametrize("method", FROM_IMAGES)
def test_chunks_change_nothing(method):
    process = alone.PROCESSES["epsilon"]
    one, four = (alone.iteration(alone.algorithm_of(method, process, n_chunks=n, updates=1), process) for n in (1, 4))
    alone.assert_moved_as(four.state.lora, one.state.lora)
    assert float(four.metrics["loss"]) == pytest.approx(float(one.metrics["loss"]), rel=1e-4)


LEARNING = {
    "rwr": dict(temperature=0.3, standardised=True, inner_epochs=3),
    "nft": dict(timestep_fraction=0.6),
    "awm": dict(timesteps=3),
}


@pytest.mark.slow  # a program each
@pytest.mark.parametrize("method", FROM_IMAGES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_learns_brightness(make_config, method, prediction):
    """On a real, tiny model that predicts noise, v or a flow's velocity; on samples never trained on."""
    config = make_config(method, {"eval.every": 0, "batch.samples": 32, "batch.samples_per_forward": 16})
    experiment = Experiment.build(checked(config))
    process = load_process(
        {"_class_name": FLOW} if prediction == "flow" else SCHEDULER | {"prediction_type": prediction}
    )
    frozen = {"model": parallel.replicate(experiment.frozen.model)}
    pipeline = experiment.sampler.pipeline._replace(process=process)
    policy = policy_of(pipeline, lambda frozen, images: images.mean((1, 2, 3)))
    sizes = dict(n_samples=32, n_chunks=2, n_prompts=5, n_steps=4, lora_size=1, remat=True, full_float32=True)
    setup = Setup(policy, optax.adam(1e-2), **sizes, stream=None, group=4)
    algorithm = METHODS[method](**LEARNING[method]).make(setup)
    lora = nonzero_lora(init_lora(jax.random.key(0), pipeline.base, rank=2))
    steps = process.make_steps(process.timesteps(4), np.full(4, 2.0, np.float32), eta=0.0)
    steps, key, state = parallel.replicate((steps, jax.random.key(0), algorithm.init(lora)))
    sample, update = parallel.pmap(algorithm.sample), parallel.pmap(algorithm.update)
    rewards = []
    for it in [99, *range(10), 99]:  # the first and the last batch have the same prompts and noise
        batch = experiment.draw_batch(it, None)
        samples = sample(state, frozen, batch, steps)
        rewards.append(float(samples.rewards.mean()))
        state, _ = update(state, frozen, Inputs(batch, steps, key, samples))
    print(rewards)
    assert rewards[-1] > rewards[0] + 2e-3


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "key, bad, said",
    [
        ("rwr.temperature", 0.0, "rwr.temperature=0.0: wants more than 0"),
        ("rwr.quantile", 1.0, "rwr.quantile=1.0: wants at least 0, less than 1"),
        ("rwr.weighting", "softmax", "rwr.weighting='softmax': accepted: exponential, quantile"),
        ("nft.strength", -1.0, "nft.strength=-1.0: wants more than 0"),
        ("nft.timestep_fraction", 1.5, "nft.timestep_fraction=1.5: wants more than 0, at most 1"),
        ("awm.timesteps", 0, "awm.timesteps=0: wants 1..1000"),
        ("awm.power", 2.0, "awm.power=2.0: wants more than 0, at most 1"),
        ("batch.group", 1, "batch.group=1: {method} compares samples of a prompt; wants at least 2"),
    ],
)
def test_bad_settings(make_config, key, bad, said):
    """Each mistake is one line."""
    for method in [key.split(".")[0]] if key.split(".")[0] in METHODS else FROM_IMAGES:
        with pytest.raises(InputError) as error:
            checked(make_config(method, {key: bad}))
        assert str(error.value).startswith(said.format(method=method)) and "\n" not in str(error.value)
