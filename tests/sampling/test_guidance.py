"""Steps whose guidance is 1 or 0: one half of it alone, in every method, to the same result."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffexp_jax import parallel
from diffexp_jax.algorithms import METHODS, Batch, Inputs, Policy, Setup
from diffexp_jax.cost import flops
from diffexp_jax.experiment import Experiment
from diffexp_jax.pipelines import Pipeline, encode_empty, load_pipeline
from diffexp_jax.programs import make_generate, make_programs
from diffexp_jax.sampling import CLASSIFIER_FREE, EMBEDDED, Context, Network, load_process
from diffexp_jax.sampling.guidance import two_halves
from diffexp_jax.settings import checked
from tests.support.tiny import TRAIN_PROMPTS

N, SHAPE = 8, (2, 2, 3)
W_T, BOTH = np.array([0.0, 1.0, 5.0, 5.0], np.float32), np.full(4, 5.0, np.float32)
PROCESS = load_process({"beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1})
LORA = {"a": jnp.float32(0.7), "b": jnp.float32(-0.2), "c": jnp.float32(0.3)}
UNTUNED = {"a": jnp.float32(0.5), "b": jnp.float32(0.0), "c": jnp.float32(0.1)}
METHOD_SETTINGS = {
    "ddpo": ("ddpo", {"updates": 2, "old_log_prob": "recomputed", "stats_min_count": 1}),
    "ddpo in one pass": ("ddpo", {"updates": 1, "stats_min_count": 1}),
    "ddpo of the first steps": ("ddpo", {"updates": 1, "stats_min_count": 1, "timestep_fraction": 0.5}),
    "dpok": ("dpok", {"updates": 2, "kl_weight": 0.5}),
    "alignprop": ("alignprop", {"truncation": "fixed", "truncation_k": 4}),
    "alignprop, activations kept": ("alignprop", {"truncation": "fixed", "truncation_k": 4}),
    "draft": ("draft", {"k": 4}),
    "entropy": ("entropy", {"truncation": "none", "alpha": 0.5}),
    "prdp": ("prdp", {"inner_epochs": 2, "beta": 1.0, "clip": 0.01}),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def iteration(name, *, skips):
    """(LoRA, metrics, rows that the network was called with on all devices) of an iteration of four steps."""
    rows = []

    def network(lora, x, t, cond):
        jax.debug.callback(lambda x: rows.append(len(x)), x)  # of x, or a loop that repeats it would call it once
        return jnp.tanh(lora["a"] * x + lora["b"] * t / 1000 + lora["c"] * cond.mean((1, 2))[:, None, None, None])

    def evaluate(frozen, lora, x_t, step, cond):
        return network(UNTUNED if lora is None else lora, x_t, step.t, cond)

    policy = Policy(
        network=CLASSIFIER_FREE.network(evaluate, W_T if skips else BOTH),
        decode=lambda frozen, x_0: jax.nn.sigmoid(x_0),
        score=lambda frozen, images, tokens: (10.0 * images.mean((1, 2, 3)), {}),
        latent_shape=SHAPE,
        process=PROCESS,
    )
    n = N // jax.device_count()
    sizes = dict(n_samples=n, n_chunks=2, n_prompts=3, n_steps=len(W_T), lora_size=3, group=2)
    key = partial(parallel.stream, 0)
    setup = Setup(policy, optax.sgd(1.0), **sizes, remat="kept" not in name, full_float32=True, stream=key)
    method, changes = METHOD_SETTINGS[name]
    algorithm = METHODS[method](**changes).make(setup)
    ids = np.arange(N, dtype=np.int32) % 3
    context = Context(normal(0, N, 4, 5), normal(1, N, 4, 5))
    batch = parallel.shard(Batch(ids, context, ids, parallel.sample_keys(jax.random.key(3), N)), N)
    eta = 1.0 if METHODS[method].needs.step_noise else 0.0
    steps = PROCESS.make_steps(PROCESS.timesteps(len(W_T)), W_T, eta=eta)
    state, frozen, steps, key = parallel.replicate((algorithm.init(LORA), {}, steps, jax.random.key(0)))
    samples = parallel.pmap(algorithm.sample)(state, frozen, batch, steps) if algorithm.sample else None
    state, metrics = parallel.pmap(algorithm.update)(state, frozen, Inputs(batch, steps, key, samples))
    jax.block_until_ready(state)
    jax.effects_barrier()
    return *parallel.first((state.lora, metrics)), sum(rows)


# By the same code as another one
SLOW = {"ddpo of the first steps", "dpok", "draft", "entropy", "alignprop, activations kept"}


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in METHOD_SETTINGS])
def test_a_half_that_counts_for_nothing_is_left_out(name):
    """Sampling and gradient; two steps of four take half of their rows."""
    lora, metrics, rows = iteration(name, skips=True)
    expected, their_metrics, all_rows = iteration(name, skips=False)
    for key in LORA:
        assert abs(float(expected[key] - LORA[key])) > 1e-5
        np.testing.assert_allclose(lora[key] - LORA[key], expected[key] - LORA[key], rtol=1e-3)
    assert float(metrics["loss"]) == pytest.approx(float(their_metrics["loss"]), rel=1e-4, abs=1e-6)
    assert all_rows > 0 and rows / all_rows == (2 * 4 - 2) / (2 * 4)


def counted(rows):
    """A network of conditioning that is a tree of arrays; it notes the rows that it is called with."""

    def evaluate(frozen, lora, x, step, cond):
        jax.debug.callback(lambda x: rows.append(len(x)), x)
        by = cond[0].mean((1, 2))[:, None, None, None]
        return jnp.tanh(frozen * x * by + lora * cond[1][:, :1, None, None] + step.t / 1000)

    return evaluate


def called(network, w):
    """Its guided output for three samples at a step of this guidance scale."""
    context, x = Context(*((normal(i, 3, 4, 5), normal(i + 1, 3, 6)) for i in (0, 2))), normal(5, 3, *SHAPE)
    step = PROCESS.training_row(501)._replace(w_t=jnp.float32(w))
    return jax.jit(lambda *args: network(*args))(2.0, 0.5, x, step, context)


@pytest.mark.parametrize("w_t", [(5.0,), (0.0, 1.0), (0.0, 5.0), None], ids=str)
@pytest.mark.parametrize("w", [0.0, 1.0, 5.0])
def test_a_network_takes_what_a_step_needs(w_t, w):
    """All that there are for steps of such scales: both halves at any, one where that is enough, by a condition."""
    if w_t == (0.0, 1.0) and w == 5.0:
        pytest.skip("a network for other steps")
    rows = []
    network = CLASSIFIER_FREE.network(counted(rows), None if w_t is None else np.array(w_t))
    found = called(network, w)
    jax.effects_barrier()
    one_half_is_known = w_t != (5.0,) and w != 5.0
    assert sum(rows) == (3 if one_half_is_known else 6)
    assert (network.one_half is None) == (w_t in ((5.0,), (0.0, 1.0)))
    expected = called(Network(two_halves(counted([]))), w)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_an_embedded_scale_is_an_input():
    """One evaluation, of the prompts alone; the network reads the scale off the step."""
    rows = []

    def evaluate(frozen, lora, x, step, cond):
        return step.w_t * counted(rows)(frozen, lora, x, step, cond)

    network = EMBEDDED.network(evaluate, np.array([1.0, 3.5]))
    found, at_1 = called(network, 3.5), called(network, 1.0)
    jax.effects_barrier()
    assert rows == [3, 3]
    np.testing.assert_allclose(found, 3.5 * at_1, rtol=1e-5)
    prompts_alone = called(CLASSIFIER_FREE.network(counted([]), np.ones(1)), 1.0)
    np.testing.assert_allclose(at_1, prompts_alone, rtol=1e-5)


def test_evaluations_literal():
    w_t = np.array([0.0, 1.0, 0.5, 7.5], np.float32)
    assert CLASSIFIER_FREE.evaluations(w_t).tolist() == [1, 1, 2, 2]
    assert EMBEDDED.evaluations(w_t).tolist() == [1, 1, 1, 1]


def generated(w_t, scale):
    """(images of a pipeline of one number, rows that its network was called with) at a constant guidance scale."""
    rows = []
    network = counted(rows)
    model = Pipeline(*[None] * len(Pipeline._fields))._replace(
        latent_shape=SHAPE,
        process=PROCESS,
        guidance=CLASSIFIER_FREE,
        denoise=lambda params, lora, *args: network(params["w"], lora["w"], *args),
        decode=lambda params, x_0: jax.nn.sigmoid(x_0),
    )
    generate = make_generate(model, n_chunks=1, lora_scale=1.0, form=lambda images: images)(w_t)
    steps = PROCESS.make_steps(PROCESS.timesteps(2), np.full(2, scale, np.float32), eta=0.0)
    params, lora, steps = parallel.replicate(({"w": np.float32(0.1)}, {"w": np.float32(0.5)}, steps))
    context = Context(*((normal(i, N, 4, 5), normal(i + 1, N, 6)) for i in (0, 2)))
    inputs = parallel.shard((context, parallel.sample_keys(jax.random.key(0), N)), N)
    images = parallel.unshard(generate(params, lora, *inputs, steps))
    jax.effects_barrier()
    return images, sum(rows)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_evaluation_without_guidance_is_half_the_work(scale):
    """One half, known beforehand or by a condition, to the same images."""
    whole, rows = generated(np.array([2.0]), scale)
    assert rows == 2 * 2 * N and np.ptp(whole) > 0.1
    for w_t in (np.array([scale]), np.array([scale, 2.0])):
        images, rows = generated(w_t, scale)
        assert rows == 2 * N
        np.testing.assert_allclose(images, whole, atol=1e-5)


def test_a_runs_evaluation_knows_its_guidance(make_config):
    """FLOPs of the program that makes its images: at a scale of 1 half of the network's, although the run explores."""
    work = []
    for scale in (2.0, 1.0):
        experiment = Experiment.build(
            checked(make_config("ddpo", {"sampling.guidance": scale, "exploration.w_low": 5.0}))
        )
        pipeline, batch = experiment.sampler.pipeline, experiment.draw_batch(0, None)
        params, lora = parallel.shapes_on_devices((experiment.frozen.model, experiment.lora_shapes()))
        steps = parallel.replicate(experiment.sampler.steps(explore=False))
        generate = make_programs(experiment).generate(steps.w_t[0])
        latents = np.zeros((*batch.key.shape, *pipeline.latent_shape), np.float32)
        decoding = flops.of(parallel.pmap(pipeline.decode), params, latents)
        work.append(flops.of(generate, params, lora, batch.context, batch.key, steps) - decoding)
    assert work[1] == pytest.approx(work[0] / 2, rel=0.01) and work[1] > 0


@pytest.mark.parametrize(
    "changes, skips",
    [
        ({}, True),
        ({"exploration.w_low": 2.0}, False),
        ({"exploration.w_low": 0.0}, True),
        ({"exploration.t_thresh": 1000}, False),
        ({"exploration.enabled": False}, False),
        ({"exploration.enabled": False, "sampling.guidance": 1.0}, True),
    ],
)
def test_which_runs_leave_halves_out(make_config, changes, skips):
    """Four steps, two of them above the threshold; three of the four iterations explore."""
    config = make_config("ddpo", {"exploration.w_low": 1.0, "exploration.iterations": 3} | changes)
    experiment = Experiment.build(checked(config))
    assert (experiment.policy.network.one_half is not None) == (skips and "sampling.guidance" not in changes)
    count = experiment.sampler.count_evaluations()
    if "sampling.guidance" in changes:
        assert [count(n) for n in (0, 1, 4)] == [0, 4, 16]
    else:
        fewer = 2 if skips else 0
        assert [count(n) for n in (0, 1, 4)] == [0, 8 - fewer, 4 * 8 - 3 * fewer]


def test_training_leads_away_from_the_negative_prompt(make_config):
    """Every image's unconditional half is that prompt's, as an evaluation's; Eq. 8 still weighs towards ""."""
    text = TRAIN_PROMPTS[1]
    config = make_config("ddpo", {"sampling.negative_prompt": text})
    experiment = Experiment.build(checked(config))
    row = experiment.train.texts.index(text)
    negative, empty = experiment.train.cond.embedding[row], experiment.sampler.empty.embedding
    uncond = np.asarray(experiment.draw_batch(0, None).context.uncond.embedding)
    np.testing.assert_array_equal(uncond, np.broadcast_to(negative, uncond.shape))
    np.testing.assert_array_equal(experiment.sampler.uncond.embedding, negative)
    np.testing.assert_array_equal(empty, encode_empty(load_pipeline(config.model.path)).embedding)
    assert np.abs(negative - empty).max() > 0.1


@pytest.mark.slow
def test_a_run_that_never_needs_it_has_one_network(make_config):
    """The program of a run whose steps all take both halves is no larger for it."""

    def operations(changes):
        experiment = Experiment.build(checked(make_config("alignprop", changes)))
        programs = make_programs(experiment)
        steps, key = parallel.replicate((experiment.sampler.steps(explore=False), jax.random.key(0)))
        frozen = parallel.share(experiment.frozen)
        state = parallel.replicate(programs.algorithm.init(experiment.initial_lora()))
        args = state, frozen, Inputs(experiment.draw_batch(0, None), steps, key)
        text = programs.update.lower(*args).as_text()
        return text.count("stablehlo.convolution"), flops.of(programs.update, *args)

    (plain, work), (both, most) = operations({}), operations({"exploration.w_low": 1.0})
    assert plain > 0 and both > 1.5 * plain
    assert work < most < 1.01 * work  # the dearest branch counts, where prompts' keys are made at every step
