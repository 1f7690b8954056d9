"""The transformer of SD3 and SD3.5 against diffusers': outputs, LoRA's gradients through a chain, every tensor."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from diffexp_jax.errors import InputError
from diffexp_jax.formats import convert
from diffexp_jax.models import lora, mmdit
from diffexp_jax.models.mmdit import MMDiT, MMDiTConfig
from diffexp_jax.sampling import Context, Network, differentiable, load_process, rollout
from tests.support.sd3 import PUBLISHED, SHAPE, SIZES, TINY, channels_first, inputs, transformer


@functools.cache
def both(name):
    """diffusers' tiny network, ours, and our parameters of its tensors."""
    theirs = transformer(TINY[name])
    ours = MMDiT(MMDiTConfig.from_dict(TINY[name]))
    tensors = {key: x.numpy() for key, x in theirs.state_dict().items()}
    table = tensors["pos_embed.pos_embed"]
    tensors["pos_embed.pos_embed"] = mmdit.middle_of_table(table, SHAPE[0] // 2, SHAPE[1] // 2)
    shapes = convert.abstract_params(ours, *inputs(TINY[name]))
    return theirs, ours, convert.from_torch(tensors, shapes, where=name)


def close(found, wanted, relative=1e-5):
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= relative * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium", pytest.param("sd3.5-large", marks=pytest.mark.slow)])
def test_outputs_are_diffusers(name):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")

    theirs, ours, params = both(name)
    x_t, t, text, pooled = inputs(TINY[name])
    wanted = theirs(channels_first(x_t), *map(torch.tensor, (text, pooled, t))).sample
    close(jax.jit(ours.apply)({"params": params}, x_t, t, text, pooled), wanted.permute(0, 2, 3, 1).numpy())


def test_frequencies_are_torchs():
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import get_timestep_embedding

    freqs = mmdit.frequencies(256)
    exact = 10000.0 ** (-np.arange(128) / 128)
    np.testing.assert_allclose(freqs, exact, rtol=6e-7)
    exponents = torch.tensor(-np.log(10000.0), dtype=torch.float32) * torch.arange(128, dtype=torch.float32) / 128
    assert (torch.exp(exponents).numpy() != freqs).sum() <= 4
    t = np.array([1000.0, 961.0], np.float32)
    wanted = get_timestep_embedding(torch.tensor(t), 256, flip_sin_to_cos=True, downscale_freq_shift=0).numpy()
    angles = t[:, None] * freqs
    np.testing.assert_allclose(np.concatenate([np.cos(angles), np.sin(angles)], 1), wanted, rtol=0, atol=6.2e-5)


# ------------------------------------------------------------------------------------------------- gradients of a chain

N_STEPS, GUIDANCE, RANK = 4, 4.5, 3
PROCESS = load_process({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})


def chain_inputs(config):
    """x_T, the prompts' and the null prompt's conditioning, and what x_0 is weighed by."""
    x_T, _, text, pooled = inputs(config, seed=1)
    _, _, null_text, null_pooled = inputs(config, seed=2)
    weights = np.random.default_rng(3).standard_normal(x_T.shape, np.float32)
    return x_T, ((text, pooled), (null_text, null_pooled)), weights


def our_gradient(ours, params, collection, n_live, config):
    x_T, context, weights = chain_inputs(config)
    steps = PROCESS.make_steps(PROCESS.timesteps(N_STEPS), np.full(N_STEPS, GUIDANCE, np.float32), eta=0.0)

    def evaluate(params, collection, x_t, step, cond):
        return ours.apply({"params": params, "lora": collection}, x_t, step.t, *cond)

    def guided(params, collection, x_t, step, context):
        cond, uncond = (evaluate(params, collection, x_t, step, half) for half in context)
        return step.w_t * cond + (1.0 - step.w_t) * uncond

    @jax.jit
    @jax.grad
    def slope(collection):
        denoise = differentiable(Network(guided), params, collection, remat=True)
        keys = jax.random.split(jax.random.key(0), len(x_T))
        live = jnp.arange(N_STEPS) >= N_STEPS - n_live
        x_0, _ = rollout(PROCESS, denoise, x_T, Context(*context), steps, keys, live=live)
        return (x_0 * weights).mean()

    return slope(collection)


def their_gradient(theirs, collection, n_live, config):
    """By peft's LoRA in diffusers' network and its scheduler, CFG by hand."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler
    from peft import LoraConfig, inject_adapter_in_model

    pairs = {".".join(path): x for path, x in traverse_util.flatten_dict(collection).items()}
    layers = sorted({key.removesuffix(".A").removesuffix(".B") for key in pairs})
    theirs = inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers), theirs)
    tensors = dict(theirs.named_parameters())
    of = {f"{layer}.{m}": tensors[f"{layer}.lora_{m}.default.weight"] for layer in layers for m in "AB"}
    for key, tensor in of.items():
        tensor.data = torch.tensor(np.asarray(pairs[key]).T.copy())
        tensor.requires_grad_(True)
    x_T, halves, weights = chain_inputs(config)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(N_STEPS)
    x = channels_first(x_T)
    halves = [[torch.tensor(part) for part in half] for half in halves]
    for i, t in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(i >= N_STEPS - n_live):
            cond, uncond = (theirs(x, *half, t.expand(len(x))).sample for half in halves)
            x = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x).prev_sample
    (x * channels_first(weights)).mean().backward()
    return {key: tensor.grad.numpy().T for key, tensor in of.items()}


@pytest.mark.slow  # half a minute each
@pytest.mark.parametrize("name, n_live", [("sd3.5-medium", 2), *((name, 4) for name in TINY)])
def test_gradients_through_a_chain_are_torchs(name, n_live):
    """Of LoRA on every kind of layer, through the last two steps and all four, with guidance."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    config = TINY[name]
    _, ours, params = both(name)
    targets = sorted(layer for group in mmdit.LORA_TARGETS.values() for layer in group)
    start = lora.init_lora(jax.random.key(0), params, rank=RANK, targets=targets)
    rng = np.random.default_rng(2)
    collection = jax.tree.map(lambda x: np.asarray(x) + rng.standard_normal(x.shape, np.float32) / 10, start)
    wanted = their_gradient(transformer(config), collection, n_live, config)
    found = traverse_util.flatten_dict(our_gradient(ours, params, collection, n_live, config))
    assert {".".join(path) for path in found} == wanted.keys()
    whole = np.sqrt(sum(np.square(x).sum() for x in wanted.values()))
    assert whole > 1e-3
    for path, slope in found.items():
        key = ".".join(path)
        assert np.linalg.norm(slope - wanted[key]) <= 1e-3 * np.linalg.norm(wanted[key]) + 1e-6 * whole, key


# ------------------------------------------------------------------------------------------------------ published sizes


@pytest.mark.slow  # ten seconds each to trace
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_the_published_sizes(name):
    """Names and shapes of diffusers' network, the table of places as it is cropped to the size."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.SD3Transformer2DModel(**PUBLISHED[name]).state_dict()
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
    arguments = shape((1, 64, 64, 16)), shape(()), shape((1, 4, 4096)), shape((1, 2048))
    shapes = convert.abstract_params(MMDiT(MMDiTConfig.from_dict(PUBLISHED[name])), *arguments)
    table = theirs.pop("pos_embed.pos_embed")
    zeros = {key: np.broadcast_to(np.float32(0), tuple(x.shape)) for key, x in theirs.items()}
    side, width = PUBLISHED[name]["pos_embed_max_size"], PUBLISHED[name]["caption_projection_dim"]
    assert table.shape == (1, side**2, width)
    ours = {convert.torch_name(path): leaf.shape for path, leaf in traverse_util.flatten_dict(shapes).items()}
    assert ours.pop("pos_embed.pos_embed") == (1, 32**2, width)
    assert ours.keys() == zeros.keys()
    turned = {2: lambda s: s[::-1], 4: lambda s: (s[3], s[2], s[0], s[1])}
    for key, wanted in zeros.items():
        found = turned.get(len(ours[key]), lambda s: s)(ours[key])
        assert found == wanted.shape, key


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"caption_projection_dim": 40},
            "caption_projection_dim=40; wants num_attention_heads x attention_head_dim, 32",
        ),
        ({"dual_attention_layers": [0, 3]}, "dual_attention_layers=[0, 3]; accepted: 0 to 2"),
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm'; accepted: rms_norm"),
        ({"out_channels": 8}, "out_channels=8; wants in_channels, 16"),
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name='FluxTransformer2DModel' is not supported"),
    ],
)
def test_sizes_that_do_not_fit(changes, said):
    with pytest.raises(InputError) as error:
        MMDiTConfig.from_dict(SIZES | changes)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_no_list_of_dual_layers_is_an_empty_one():
    plain = MMDiTConfig.from_dict(SIZES)
    for nothing in ([], None, ()):
        assert MMDiTConfig.from_dict(SIZES | {"dual_attention_layers": nothing, "out_channels": None}) == plain
