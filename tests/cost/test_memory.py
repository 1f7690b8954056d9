"""What saves memory changes no result: rematerialisation, decoding in slices, microbatches; bfloat16 a little."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffexp_jax import parallel, programs
from diffexp_jax.algorithms import Batch, Policy
from diffexp_jax.algorithms.algorithm import chunked, unchunked
from diffexp_jax.algorithms.ddpo import ddpo
from diffexp_jax.algorithms.reward_gradient import gradient_over_chunks
from diffexp_jax.cost import dry_run
from diffexp_jax.experiment import Experiment
from diffexp_jax.formats import convert
from diffexp_jax.models.lora import init_lora
from diffexp_jax.models.unet import UNet, UNetConfig
from diffexp_jax.models.vae import AutoencoderKL, VAEConfig, in_slices
from diffexp_jax.pipelines import Pipeline, make_context
from diffexp_jax.sampling import CLASSIFIER_FREE, Context, differentiable, initial_latents, load_process, rollout
from diffexp_jax.settings import checked
from tests.support.arrays import normal
from tests.support.tiny import UNET, network_of, nonzero_lora, random_weights

PROCESS = load_process({"beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1})
STEPS = PROCESS.make_steps(PROCESS.timesteps(3), np.full(3, 2.0, np.float32), eta=1.0)


def assert_close(ours, theirs, tolerance=1e-6):
    """As one vector."""
    ours, theirs = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (ours, theirs))
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


# XLA:CPU's default schedule goes for speed and keeps everything; accelerators' are for memory
FOR_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


# ---------------------------------------------------------------------------------------------------- rematerialisation


def compiled_gradient(loss, *args):
    """(gradient, bytes that the compiled program works in)"""
    program = jax.jit(jax.grad(loss)).lower(*args).compile(FOR_MEMORY)
    return program(*args), program.memory_analysis().temp_size_in_bytes


def test_rematerialisation_of_steps():
    """The chain keeps a latent a step, or every activation of every step: here 3 x 5 hidden layers of 64."""
    x, keys = normal(0, 2, 2, 2, 4), jax.random.split(jax.random.key(0), 2)
    context = Context(normal(1, 2, 5, 4), normal(2, 2, 5, 4))
    weights = normal(3, 5, 4, 64), normal(4, 5, 64, 4) / 10

    def loss(weights, remat):
        def network(frozen, weights):
            def denoise(x, step, context):
                for w1, w2 in zip(*weights, strict=True):
                    x = x + jnp.sin(x @ w1) @ w2
                return x

            return denoise

        denoise = differentiable(network_of(network), None, weights, remat=remat)
        x_0, _ = rollout(PROCESS, denoise, x, context, STEPS, keys, live=jnp.array([False, True, True]))
        return jnp.square(x_0).sum()

    (plain, most), (again, least) = (
        compiled_gradient(lambda w, remat=remat: loss(w, remat), weights) for remat in (False, True)
    )
    assert_close(again, plain)
    assert most > 1.5 * least


@pytest.mark.slow
def test_rematerialisation_of_blocks():
    one_level = {"block_out_channels": [8], "down_block_types": ["CrossAttnDownBlock2D"], "layers_per_block": 1}
    config = UNetConfig.from_dict(UNET | one_level | {"up_block_types": ["CrossAttnUpBlock2D"]})
    x, context = normal(0, 2, 16, 16, 4), normal(1, 2, 5, 16)
    params = random_weights(convert.abstract_params(UNet(config), x, jnp.int32(0), context), seed=0)
    lora = init_lora(jax.random.key(0), params, rank=2)
    lora = jax.tree_util.tree_map_with_path(lambda path, x: 2**0.5 * x if path[-1].key == "A" else x, lora)
    lora = nonzero_lora(lora)  # gradients of about 0.1

    def loss(lora, params, remat):
        return UNet(config, remat=remat).apply({"params": params, "lora": lora}, x, jnp.int32(500), context).sum()

    (plain, most), (again, least) = (
        compiled_gradient(lambda lora, p, remat=remat: loss(lora, p, remat), lora, params) for remat in (False, True)
    )
    assert max(np.abs(x).max() for x in jax.tree.leaves(plain)) > 0.1
    assert_close(again, plain)
    assert most > 1.5 * least


# --------------------------------------------------------------------------------------------------------------- slices


@pytest.mark.parametrize("size, parts", [(6, 1), (8, 1), (4, 2), (3, 2), (2, 3), (1, 6)])
def test_slices_are_as_large_as_they_may_be(size, parts):
    """Of six images; 4 does not divide them, so it is 3 at a time."""
    seen = []

    def double(x):
        seen.append(x.shape)
        return 2 * x[:, :1]

    x = jnp.arange(12.0).reshape(6, 2)
    np.testing.assert_array_equal(in_slices(double, x, size), 2 * x[:, :1])
    assert set(seen) == {(6 // parts, 2)}


@pytest.mark.slow
def test_decoding_in_slices():
    """The same images and gradients, in less memory."""
    vae = AutoencoderKL(VAEConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4))
    shapes = convert.abstract_params(vae, jnp.zeros((1, 8, 8, 3)))
    params, z = random_weights(shapes, seed=0), normal(0, 8, 8, 8, 4)

    def program(size):
        def loss(z, params):
            images = in_slices(lambda z: vae.apply({"params": params}, z, method="decode"), z, size)
            return jnp.square(images).sum(), images

        return jax.jit(jax.grad(loss, has_aux=True)).lower(z, params).compile(FOR_MEMORY)

    whole, sliced = program(8), program(2)
    assert_close(sliced(z, params), whole(z, params))
    assert whole.memory_analysis().temp_size_in_bytes > 2 * sliced.memory_analysis().temp_size_in_bytes


# --------------------------------------------------------------------------------------------------------- microbatches


def test_chunks_of_nothing():
    """Tokens of a reward that reads no prompts."""
    tree = {"tokens": jnp.zeros((6, 0), jnp.int32), "x": jnp.arange(12).reshape(6, 2)}
    parts = chunked(tree, 3)
    assert parts["tokens"].shape == (3, 2, 0) and parts["x"][1].tolist() == [[4, 5], [6, 7]]
    assert unchunked(parts)["tokens"].shape == (6, 0)


def linear(frozen, lora):
    return lambda x_t, step, context: jnp.tanh(lora * x_t + context.cond.mean((1, 2))[:, None, None, None])


def brightness(frozen, images, tokens):
    return images.mean((1, 2, 3)), {}


POLICY = Policy(network_of(linear), lambda frozen, x_0: jax.nn.sigmoid(x_0), brightness, (2, 2, 3), PROCESS)
DDPO = dict(n_prompts=5, n_updates=1, inner_epochs=1, clip=1e-4, advantage_clip=5.0, stats_buffer=4, stats_min_count=2)


def sample_by_ddpo(n_chunks, batch, steps):
    algorithm = ddpo(POLICY, optax.sgd(1.0), **DDPO, n_chunks=n_chunks)
    state = parallel.replicate(algorithm.init(jnp.float32(0.7)))
    return parallel.pmap(algorithm.sample)(state, parallel.replicate({}), batch, steps).images


def sample_by_reward_gradients(n_chunks, batch, steps):
    def one(batch, steps):
        def loss(lora, chunk):
            x_T = initial_latents(chunk.key, (2, 2, 3))
            x_0, _ = rollout(PROCESS, linear({}, lora), x_T, chunk.context, steps, chunk.key)
            return x_0.mean(), jax.nn.sigmoid(x_0)

        return gradient_over_chunks(loss, jnp.float32(0.7), batch, n_chunks)[2]

    return parallel.pmap(one)(batch, steps)


def sample_by_evaluation(n_chunks, batch, steps):
    model = Pipeline(*[None] * len(Pipeline._fields))._replace(
        latent_shape=(2, 2, 3),
        process=PROCESS,
        guidance=CLASSIFIER_FREE,
        denoise=lambda params, lora, x, step, cond: jnp.tanh(
            lora["a"] * x + cond.mean((1, 2), keepdims=True)[..., None]
        ),
        decode=lambda params, x_0: jax.nn.sigmoid(x_0),
    )
    generate = programs.make_generate(model, n_chunks=n_chunks, lora_scale=1.0)(STEPS.w_t)
    lora = parallel.replicate({"a": jnp.float32(0.7)})
    return generate({}, lora, batch.context, batch.key, steps) / np.float32(255)


@pytest.mark.parametrize("sample", [sample_by_ddpo, sample_by_reward_gradients, sample_by_evaluation])
def test_microbatches_are_the_same_images(sample):
    """Eight at once, or two at a time: noise and prompts belong to the sample."""
    ids, keys = np.arange(8, dtype=np.int32), parallel.sample_keys(jax.random.key(3), 8)
    context = Context(np.asarray(normal(1, 8, 5, 3)), np.asarray(normal(2, 8, 5, 3)))
    batch, steps = parallel.shard(Batch(ids % 5, context, ids, keys), 8), parallel.replicate(STEPS)
    whole, parts = (np.asarray(sample(n_chunks, batch, steps)) for n_chunks in (1, 4))
    assert whole.shape[1:] == (8, 2, 2, 3) and np.ptp(whole.mean((2, 3, 4))) > 0.05
    np.testing.assert_allclose(parts, whole, atol=1.01 / 255 if sample is sample_by_evaluation else 1e-6)


def test_what_a_sampling_program_hands_on(make_config):
    """Every latent of the steps that are learnt from once, no images."""
    config = make_config("ddpo", {"eval.every": 0, "log.images_every": 0})
    experiment = Experiment.build(checked(config), weights=False)
    sampling, *_ = dry_run.programs_of(experiment)
    samples = jax.eval_shape(sampling.function, *sampling.args)
    latent, b = experiment.sampler.pipeline.latent_shape, config.batch.samples
    t = experiment.settings.method.trained_steps(config.sampling.steps)
    assert t < config.sampling.steps
    assert samples.images is None
    of_latents = [x.size for x in jax.tree.leaves(samples) if x.shape[-3:] == latent]
    assert sum(of_latents) == b * (t + 1) * np.prod(latent)


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.slow
def test_images_in_bfloat16(make_config):
    """The same noise and prompts, ten steps: the network's 16 bits move a pixel by 0.03 at most, on average."""
    images = []
    for dtype in ("float32", "bfloat16"):
        config = make_config("alignprop", {"eval.every": 0, "model.dtype": dtype, "sampling.steps": 10})
        experiment = Experiment.build(checked(config))
        model, keys = experiment.sampler.pipeline, parallel.sample_keys(jax.random.key(0), 4)
        lora = nonzero_lora(init_lora(jax.random.key(0), model.base, rank=2))
        steps = experiment.sampler.steps(explore=False)
        context = make_context(jax.tree.map(lambda x: x[:4], experiment.train.cond), experiment.sampler.uncond)

        @jax.jit
        def sample(params, context, steps, model=model, lora=lora, keys=keys):
            denoise = partial(model.network((2.0,)), params, lora)
            x_0, _ = rollout(model.process, denoise, initial_latents(keys, model.latent_shape), context, steps, keys)
            return model.decode(params, x_0).clip(0.0, 1.0)

        params = model.sampling_params
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        images.append(np.asarray(sample(params, context, steps), np.float64))
    assert images[0].std() > 0.05
    assert 1e-4 < np.abs(images[1] - images[0]).mean() < 3e-2
