"""FLUX.1's transformer against diffusers': outputs, the gradient in LoRA, every tensor."""

import functools
import itertools

import jax
import numpy as np
import pytest
from flax import traverse_util

from diffexp_jax.errors import InputError
from diffexp_jax.formats import convert
from diffexp_jax.models import flux, lora, rotary
from diffexp_jax.models.flux import Flux, FluxConfig
from diffexp_jax.sampling import Context, Network, differentiable, load_process, rollout
from tests.support.flux import PUBLISHED, SIZES, TINY, inputs, output, transformer


@functools.cache
def both(name):
    """diffusers' tiny network, ours, and our parameters of its tensors."""
    theirs, ours = transformer(TINY[name]), Flux(FluxConfig.from_dict(TINY[name]))
    tensors = {key: x.numpy() for key, x in theirs.state_dict().items()}
    shapes = convert.abstract_params(ours, *inputs(TINY[name]))
    return theirs, ours, convert.from_torch(tensors, shapes, where=name)


@pytest.mark.parametrize("name", TINY)
def test_outputs_are_diffusers(name):
    pytest.importorskip("diffusers")
    theirs, ours, params = both(name)
    args = inputs(TINY[name])
    wanted = output(theirs, *args)
    found = jax.jit(ours.apply)({"params": params}, *args)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def start_of_lora(params, rng):
    """LoRA on every kind of layer, which does something."""
    targets = sorted(layer for group in flux.LORA_TARGETS.values() for layer in group)
    start = lora.init_lora(jax.random.key(0), params, rank=3, targets=targets)
    return jax.tree.map(lambda x: np.asarray(x) + rng.standard_normal(x.shape, np.float32) / 10, start)


def by_name(collection):
    return {".".join(path): x for path, x in traverse_util.flatten_dict(collection).items()}


def with_their_lora(config, collection):
    """diffusers' network with the LoRA as peft has it, and its tensors, which take gradients, by our names."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    pairs = by_name(collection)
    layers = sorted({key[:-2] for key in pairs})
    theirs = inject_adapter_in_model(LoraConfig(r=3, lora_alpha=3, target_modules=layers), transformer(config))
    tensors = dict(theirs.named_parameters())
    of = {f"{layer}.{m}": tensors[f"{layer}.lora_{m}.default.weight"] for layer in layers for m in "AB"}
    for key, tensor in of.items():
        tensor.data = torch.tensor(np.asarray(pairs[key]).T.copy())
        tensor.requires_grad_(True)
    return theirs, of


def assert_same_gradient(found, of):
    whole = np.sqrt(sum(np.square(x.grad.numpy()).sum() for x in of.values()))
    assert found.keys() == of.keys() and whole > 1e-3
    for key, tensor in of.items():
        wanted = tensor.grad.numpy().T
        assert np.linalg.norm(found[key] - wanted) <= 1e-3 * np.linalg.norm(wanted) + 1e-6 * whole, key


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_gradient_in_lora_is_torchs(remat):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    config, (_, ours, params) = TINY["dev"], both("dev")
    args, rng = inputs(config), np.random.default_rng(2)
    collection = start_of_lora(params, rng)
    weights = rng.standard_normal(args[0].shape, np.float32)
    ours = ours.clone(remat=remat)

    @jax.jit
    @jax.grad
    def slope(collection):
        return (ours.apply({"params": params, "lora": collection}, *args) * weights).mean()

    theirs, of = with_their_lora(config, collection)
    (output(theirs, *args, keep=True) * torch.tensor(weights)).mean().backward()
    assert_same_gradient(by_name(slope(collection)), of)


@pytest.mark.slow
@pytest.mark.parametrize("n_live", [2, 4])
def test_gradients_through_a_chain_are_torchs(n_live):
    """Through the last two of four steps, and through all; guidance is the network's input."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    config, (_, ours, params), n_steps = TINY["dev"], both("dev"), 4
    x_T, _, text, pooled, _ = inputs(config, seed=1)
    guidance = np.full(len(x_T), 3.5, np.float32)
    rng = np.random.default_rng(3)
    collection, weights = start_of_lora(params, rng), rng.standard_normal(x_T.shape, np.float32)
    process = load_process({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    steps = process.make_steps(process.timesteps(n_steps), np.full(n_steps, guidance[0]), eta=0.0)

    def guided(params, collection, x_t, step, context):
        return ours.apply({"params": params, "lora": collection}, x_t, step.t, *context.cond, step.w_t)

    @jax.jit
    @jax.grad
    def slope(collection):
        denoise = differentiable(Network(guided), params, collection, remat=True)
        keys, live = jax.random.split(jax.random.key(0), len(x_T)), np.arange(n_steps) >= n_steps - n_live
        x_0, _ = rollout(process, denoise, x_T, Context((text, pooled), None), steps, keys, live=live)
        return (x_0 * weights).mean()

    theirs, of = with_their_lora(config, collection)
    x, levels = torch.tensor(x_T), np.append(np.asarray(steps.level), 0.0)
    for i, (level, after) in enumerate(itertools.pairwise(levels.tolist())):
        t = np.full(len(x_T), 1000 * level, np.float32)
        with torch.set_grad_enabled(i >= n_steps - n_live):
            x = x + (after - level) * output(theirs, x, t, text, pooled, guidance, keep=True)
    (x * torch.tensor(weights)).mean().backward()
    assert_same_gradient(by_name(slope(collection)), of)


def test_turning_literal():
    """A head of four numbers: two are not turned, and two by the column; the prompt's token is not turned."""
    turn = rotary.of_image(1, 3, 1, (2, 0, 2))
    x = np.tile(np.array([1.0, 2.0, 3.0, 4.0], np.float32), (1, 4, 1))
    found = turn.turned(x, heads=1)[0]
    for i, angle in enumerate((0.0, 1.0, 2.0, 0.0)):
        c, s = np.cos(angle), np.sin(angle)
        np.testing.assert_allclose(found[i], [1, 2, 3 * c - 4 * s, 4 * c + 3 * s], rtol=1e-6)


def test_tokens_are_diffusers_and_back():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 5)).astype(np.float32)
    packed = diffusers.FluxPipeline._pack_latents(torch.tensor(np.moveaxis(x, -1, 1).copy()), 2, 5, 4, 6)
    np.testing.assert_array_equal(flux.as_tokens(x), packed.numpy())
    np.testing.assert_array_equal(flux.as_latents(flux.as_tokens(x), 2), x)


@pytest.mark.slow  # some seconds each to trace
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_the_published_sizes(name):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.FluxTransformer2DModel(**PUBLISHED[name]).state_dict()
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
    arguments = shape((1, 64, 64, 16)), shape(()), shape((1, 4, 4096)), shape((1, 768)), shape(())
    shapes = convert.abstract_params(Flux(FluxConfig.from_dict(PUBLISHED[name])), *arguments)
    ours = {convert.torch_name(path): leaf.shape for path, leaf in traverse_util.flatten_dict(shapes).items()}
    assert {key: shape[::-1] for key, shape in ours.items()} == {key: tuple(x.shape) for key, x in theirs.items()}
    counts = {"dev": 11_901_408_320, "schnell": 11_891_178_560}
    assert sum(np.prod(shape, dtype=np.int64) for shape in ours.values()) == counts[name]


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"axes_dims_rope": [4, 4, 4]},
            "axes_dims_rope=[4, 4, 4]; wants three numbers whose sum is attention_head_dim",
        ),
        ({"axes_dims_rope": [8, 8]}, "axes_dims_rope=[8, 8]; wants three numbers"),
        ({"in_channels": 66}, "in_channels=66; accepted: whole numbers a multiple of 4"),
        ({"patch_size": 2}, "patch_size=2 is not supported; accepted: 1"),
        ({"_class_name": "SD3Transformer2DModel"}, "_class_name='SD3Transformer2DModel' is not supported"),
    ],
)
def test_sizes_that_do_not_fit(changes, said):
    with pytest.raises(InputError) as error:
        FluxConfig.from_dict(SIZES | changes)
    assert said in str(error.value) and "\n" not in str(error.value)
