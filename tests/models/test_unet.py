"""The UNet against diffusers' on tiny random models, and against the published models' sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from diffexp_jax.errors import InputError
from diffexp_jax.formats import convert
from diffexp_jax.models.unet import UNet, UNetConfig
from tests.support.arrays import torched
from tests.support.published import CROSS, PLAIN, SD15, SDXL, blocks

# name: (config, height and width of the latents)
TINY = {
    "sd15": (
        dict(block_out_channels=(16, 32), **blocks(CROSS, PLAIN), layers_per_block=2, attention_head_dim=8),
        (8, 8),
    ),
    "conv_odd_attention_below": (
        dict(
            block_out_channels=(8, 16),
            **blocks(PLAIN, CROSS),
            layers_per_block=1,
            attention_head_dim=4,
            transformer_layers_per_block=2,
            in_channels=8,
            out_channels=6,
            norm_eps=1e-3,
        ),
        (5, 6),
    ),
    "one_level": (
        dict(
            block_out_channels=(16,),
            **blocks(CROSS),
            layers_per_block=1,
            attention_head_dim=2,
            use_linear_projection=True,
        ),
        (4, 3),
    ),
    "sdxl_odd": (
        dict(
            block_out_channels=(8, 16, 24),
            **blocks(PLAIN, CROSS, CROSS),
            layers_per_block=1,
            attention_head_dim=[1, 2, 4],
            transformer_layers_per_block=[1, 1, 2],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=10,
            projection_class_embeddings_input_dim=6 * 10 + 7,
        ),
        (9, 11),
    ),
}


TINY |= {
    # as SSD-1B: depths of single layers, others on the way up; and a number of layers for each resolution
    "distilled": (
        dict(
            block_out_channels=(8, 16),
            **blocks(CROSS, CROSS),
            layers_per_block=[1, 2],
            attention_head_dim=[2, 4],
            transformer_layers_per_block=[[2], [1, 0]],
            reverse_transformer_layers_per_block=[[0, 1, 2], 1],
            time_embedding_dim=20,
        ),
        (6, 4),
    ),
    "short_middle": (
        dict(block_out_channels=(8,), **blocks(PLAIN), layers_per_block=1, mid_block_type="UNetMidBlock2D"),
        (4, 4),
    ),
    "no_middle": (dict(block_out_channels=(8,), **blocks(PLAIN), layers_per_block=1, mid_block_type=None), (4, 4)),
}


def inputs(config, size, batch=3):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, *size, config.get("in_channels", 4))).astype(np.float32))
    context = jnp.asarray(rng.standard_normal((batch, 5, config["cross_attention_dim"])).astype(np.float32))
    added = None
    if "addition_time_embed_dim" in config:
        pooled, time_ids = rng.standard_normal((batch, 7)), rng.integers(0, 1024, (batch, 6))
        added = jnp.asarray(pooled.astype(np.float32)), jnp.asarray(time_ids.astype(np.float32))
    return x, jnp.array([981, 501, 1]), context, added


def randomised(model):
    """Every parameter is moved, so that norms (1, 0 at first) and biases count.

    Some are made small, and with them the activations that meet a norm, so that its epsilon counts.
    """
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * torch.randn_like(parameter)
            if name.split(".")[-2] in ("conv_in", "conv2", "conv_shortcut"):
                parameter *= 1e-3
    return model.eval()


# What others have, put together otherwise
ALIKE = {"distilled", "conv_odd_attention_below", "one_level", "short_middle"}


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x in ALIKE)) for x in TINY])
def test_unet_is_diffusers(name, tmp_path):
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    config, size = TINY[name]
    config = dict(config, norm_num_groups=4, cross_attention_dim=12)
    theirs = randomised(UNet2DConditionModel(**config))
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    x, t, context, added = inputs(config, size)

    ours = UNet(UNetConfig.from_dict(UNet2DConditionModel.load_config(tmp_path)))
    params = convert.from_torch(tensors, convert.abstract_params(ours, x, t, context, added), where=name)
    out = jax.jit(ours.apply)({"params": params}, x, t, context, added)

    kwargs = {}
    if added:
        pooled, time_ids = map(torched, added)
        kwargs = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}
    with torch.no_grad():
        chw = torched(x).permute(0, 3, 1, 2)
        want = theirs(chw, torched(t), torched(context), **kwargs).sample
    want = want.permute(0, 2, 3, 1).numpy()
    assert out.shape == want.shape
    assert np.abs(out - want).max() <= 1e-4 * np.abs(want).max()

    back = convert.to_torch(params)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert (back[key].dtype, back[key].shape) == (tensor.dtype, tensor.shape), key
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)


@pytest.fixture(scope="module")
def tiny():
    """(module, parameters, compiled apply, inputs) of a random network that needs no torch."""
    config = dict(TINY["one_level"][0], norm_num_groups=4, cross_attention_dim=12)
    unet = UNet(UNetConfig.from_dict(config))
    x, t, context, added = inputs(config, (4, 3))
    rng = np.random.default_rng(1)
    shapes = convert.abstract_params(unet, x, t, context)
    params = {"params": jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32) / 5, shapes)}
    return unet, params, jax.jit(unet.apply), (x, t, context)


def test_a_scalar_timestep_serves_the_batch(tiny):
    unet, params, apply, (x, _, context) = tiny
    ours = apply(params, x, jnp.int32(21), context)
    np.testing.assert_allclose(ours, apply(params, x, jnp.full(3, 21), context), rtol=0, atol=1e-5)
    assert np.abs(ours - apply(params, x, jnp.full(3, 981), context)).max() > 1e-3


def test_bfloat16_gives_float32_near_the_float32_result(tiny):
    unet, params, apply, args = tiny
    low = UNet(unet.config, dtype=jnp.bfloat16)
    out, want = jax.jit(low.apply)(params, *args), apply(params, *args)
    assert out.dtype == jnp.float32
    assert 0 < np.abs(out - want).max() < 0.05 * np.abs(want).max()


@pytest.mark.parametrize(
    "config, parameters, tensors, examples",
    [
        (
            SD15,
            859_520_964,
            686,
            {
                "mid_block.attentions.0.proj_in.weight": (1280, 1280, 1, 1),
                "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 768),
                "up_blocks.3.resnets.2.conv_shortcut.weight": (320, 640, 1, 1),
            },
        ),
        pytest.param(
            SDXL,
            2_567_463_684,
            1680,
            {
                "mid_block.attentions.0.proj_in.weight": (1280, 1280),
                "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
                "add_embedding.linear_1.weight": (1280, 2816),
            },
            marks=pytest.mark.slow,  # test_dry_run.py counts its parameters by default
        ),
    ],
    ids=["sd15", "sdxl"],
)
def test_full_size(config, parameters, tensors, examples):
    unet = UNet(UNetConfig.from_dict(config))
    x, t, context = jnp.zeros((1, 8, 8, 4)), jnp.int32(0), jnp.zeros((1, 77, config["cross_attention_dim"]))
    added = (jnp.zeros((1, 1280)), jnp.zeros((1, 6))) if "addition_embed_type" in config else None
    flat = traverse_util.flatten_dict(convert.abstract_params(unet, x, t, context, added))
    assert sum(int(np.prod(leaf.shape)) for leaf in flat.values()) == parameters
    assert len(flat) == tensors
    shapes = {convert.torch_name(path): leaf.shape for path, leaf in flat.items()}
    for name, shape in examples.items():
        ours = shapes[name]
        assert (ours[::-1] if len(shape) == 2 else (ours[3], ours[2], *ours[:2])) == shape, name


@pytest.mark.parametrize(
    "key, value",
    [
        ("act_fn", "gelu"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("addition_embed_type", "image"),
        ("class_embed_type", "timestep"),
        ("only_cross_attention", True),
        ("resnet_time_scale_shift", "scale_shift"),
        ("time_embedding_type", "fourier"),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
        ("up_block_types", ["UpBlock2D", "ResnetUpsampleBlock2D"]),
        ("num_attention_heads", 8),
        # these have no parameters of their own, so that the accounting of tensors would not notice them
        ("downsample_padding", 0),
        ("mid_block_scale_factor", 2),
        ("resnet_out_scale_factor", 2.0),
        ("time_embedding_act_fn", "silu"),
        ("timestep_post_act", "silu"),
        ("freq_shift", 1),
        ("flip_sin_to_cos", False),
    ],
)
def test_unsupported_variants_are_refused(key, value):
    with pytest.raises(InputError, match=key) as error:
        UNetConfig.from_dict(dict(SD15, **{key: value}))
    assert "\n" not in str(error.value)
