"""A tiny UNet with LoRAs, and its outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from diffexp_jax.errors import InputError
from diffexp_jax.formats import convert
from diffexp_jax.models import lora
from diffexp_jax.models.unet import UNet, UNetConfig

CONFIG = dict(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=2,
    norm_num_groups=4,
    cross_attention_dim=12,
)
ATTENTIONS = 4 * 2  # one down, one in the middle, two up; each self and cross
RANK = 3
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((2, 4, 4, 4)).astype(np.float32))
T = jnp.array([981, 21])
CONTEXT = jnp.asarray(RNG.standard_normal((2, 5, 12)).astype(np.float32))
unet = UNet(UNetConfig.from_dict(CONFIG))
apply = jax.jit(unet.apply)


def random_lora(params, rank=RANK, **kwargs):
    """A collection that does something."""
    collection = lora.init_lora(jax.random.key(0), params, rank=rank, **kwargs)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: np.asarray(x) + rng.standard_normal(x.shape).astype(np.float32) / 5, collection)


def run(params, collection=None, scale=1.0):
    variables = {"params": params}
    if collection is not None:
        variables["lora"] = lora.scaled(collection, scale)
    return apply(variables, X, T, CONTEXT)


def assert_equal_trees(a, b):
    a, b = traverse_util.flatten_dict(a), traverse_util.flatten_dict(b)
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=str(key))


def wrong_file(tmp_path, params, change, header=None):
    """The message of the error for a file whose tensors went through `change`."""
    path = tmp_path / "lora.safetensors"
    lora.save_lora(path, random_lora(params), alpha=3.0)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, header)
    with pytest.raises(InputError) as error:
        lora.load_lora(path, params)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    return str(error.value)


def their_unet(params):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    from diffusers import UNet2DConditionModel

    theirs = UNet2DConditionModel(**CONFIG).eval()
    theirs.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in convert.to_torch(params).items()})
    return theirs


def their_output(theirs):
    import torch

    x, t, context = (torch.from_numpy(np.array(value)) for value in (X, T, CONTEXT))
    with torch.no_grad():
        return theirs(x.permute(0, 3, 1, 2), t, context).sample.permute(0, 2, 3, 1).numpy()


def pipeline(theirs):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=theirs,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def assert_close_and_not_a_no_op(ours, theirs, base):
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    assert np.abs(theirs - base).max() > 1e-2 * np.abs(base).max()
