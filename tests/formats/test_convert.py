"""Checkpoint tensors <-> parameter trees: axes, names, and the errors that a user sees."""

import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax.errors import InputError
from diffexp_jax.formats import convert
from diffexp_jax.models import layers, unet
from tests.support import ROOT
from tests.support.tiny import UNET, random_weights, write_part


class Net(nn.Module):
    """One layer of every kind."""

    linear: bool = False

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(10, 4, name="tokens")(ids) * self.param("logit_scale", nn.initializers.ones, ())  # [B, L, 4]
        x = layers.LayerNorm(name="norm")(x)[:, :, None]
        x = layers.Conv(6, name="blocks.0.conv")(x)
        x = layers.GroupNorm(2, 1e-6, name="blocks.0.norm")(x)
        if self.linear:
            return layers.Dense(5, name="proj")(x)
        return layers.pointwise_conv(5, name="proj")(x)


def shapes(linear=False):
    return convert.abstract_params(Net(linear), jnp.zeros((1, 3), jnp.int32))


def checkpoint():
    """torch's tensors of Net, every value different."""
    sizes = {
        "logit_scale": (),
        "tokens.weight": (10, 4),
        "norm.weight": (4,),
        "norm.bias": (4,),
        "blocks.0.conv.weight": (6, 4, 3, 3),
        "blocks.0.conv.bias": (6,),
        "blocks.0.norm.weight": (6,),
        "blocks.0.norm.bias": (6,),
        "proj.weight": (5, 6, 1, 1),
        "proj.bias": (5,),
    }
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.standard_normal(size), np.float32) for name, size in sizes.items()}


def test_axes_and_names():
    tensors = checkpoint()
    params = convert.from_torch(tensors, shapes(), where="model")
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes())
    conv, proj = params["blocks.0.conv"]["kernel"], params["proj"]["kernel"]
    assert conv[2, 1, 3, 5] == tensors["blocks.0.conv.weight"][5, 3, 2, 1]  # [H, W, I, O] from [O, I, H, W]
    assert proj[0, 0, 4, 3] == tensors["proj.weight"][3, 4, 0, 0]
    np.testing.assert_array_equal(params["tokens"]["embedding"], tensors["tokens.weight"])  # not transposed
    np.testing.assert_array_equal(params["blocks.0.norm"]["scale"], tensors["blocks.0.norm.weight"])


def test_round_trip_is_bit_identical():
    tensors = checkpoint()
    back = convert.to_torch(convert.from_torch(tensors, shapes(), where="model"))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
        assert back[name].shape == tensor.shape  # of the scalar too
        assert back[name].flags.c_contiguous  # what safetensors writes is the buffer


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("stored_linear", [False, True])
def test_1x1_convolution_and_linear_layer_are_one(linear, stored_linear):
    tensors = checkpoint()
    if stored_linear:
        tensors["proj.weight"] = tensors["proj.weight"][:, :, 0, 0]
    kernel = convert.from_torch(tensors, shapes(linear), where="model")["proj"]["kernel"]
    assert kernel.shape == ((6, 5) if linear else (1, 1, 6, 5))
    np.testing.assert_array_equal(kernel.reshape(6, 5), tensors["proj.weight"].reshape(5, 6).T)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("stored", [np.float16, np.float32, jnp.bfloat16])
def test_dtype(dtype, stored):
    tensors = {name: tensor.astype(stored) for name, tensor in checkpoint().items()}
    params = convert.from_torch(tensors, shapes(), where="model", dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
    np.testing.assert_array_equal(params["proj"]["bias"], tensors["proj.bias"].astype(dtype))


def error_of(tensors, linear=False):
    with pytest.raises(InputError) as error:
        convert.from_torch(tensors, shapes(linear), where="model/unet")
    message = str(error.value)
    assert message.startswith("model/unet: ") and "\n" not in message
    return message


def test_missing_and_unexpected_tensors():
    tensors = checkpoint()
    tensors["extra.weight"] = tensors.pop("proj.bias")
    del tensors["norm.bias"]
    message = error_of(tensors)
    assert "2 missing (norm.bias, proj.bias)" in message
    assert "1 unexpected (extra.weight)" in message


def test_only_missing_or_only_unexpected():
    tensors = checkpoint()
    assert "missing" not in error_of(tensors | {"position_ids": np.zeros(3)})
    del tensors["norm.bias"]
    assert "unexpected" not in error_of(tensors)


def test_a_long_list_is_cut():
    message = error_of(checkpoint() | {f"extra.{i:02}": np.zeros(1) for i in range(50)})
    assert "50 unexpected (extra.00, extra.01, " in message and "extra.07, ...)" in message
    assert "extra.08" not in message


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("blocks.0.conv.weight", np.zeros((6, 4, 1, 1)), "is (6, 4, 1, 1), the config wants (6, 4, 3, 3)"),
        ("blocks.0.conv.weight", np.zeros((6, 4)), "is (6, 4), the config wants (6, 4, 3, 3)"),
        ("blocks.0.conv.weight", np.zeros((6, 4, 3)), "is (6, 4, 3), the config wants (6, 4, 3, 3)"),
        ("proj.weight", np.zeros((6, 5, 1, 1)), "is (6, 5, 1, 1), the config wants (5, 6, 1, 1)"),
        ("tokens.weight", np.zeros((4, 10)), "is (4, 10), the config wants (10, 4)"),
        ("norm.weight", np.zeros((1, 4)), "is (1, 4), the config wants (4,)"),
    ],
)
def test_wrong_shapes_are_printed_as_in_the_file(name, value, expected):
    message = error_of(checkpoint() | {name: value})
    assert f"1 tensors of the wrong shape: {name} {expected}" in message


def test_a_linear_layer_does_not_take_a_3x3_convolution():
    message = error_of(checkpoint() | {"proj.weight": np.zeros((5, 6, 3, 3))}, linear=True)
    assert "proj.weight is (5, 6, 3, 3), the config wants (5, 6)" in message


def test_all_wrong_shapes_are_counted():
    message = error_of({name: np.zeros((7, *tensor.shape[1:])) for name, tensor in checkpoint().items()})
    assert "10 tensors of the wrong shape" in message


def test_abstract_params_computes_nothing():
    """A kernel of 4 TB has a shape."""
    tree = convert.abstract_params(layers.Dense(10**6, use_bias=False), jnp.zeros((1, 10**6)))
    assert tree["kernel"].shape == (10**6, 10**6)


MEASURE = """
import os, re, sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
import numpy as np
from diffexp_jax.formats import convert, files
from diffexp_jax.models import unet

def status(key):
    return 1024 * int(re.search(rf"{key}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder, dtype = Path(sys.argv[1]), sys.argv[2]
config = unet.UNetConfig.from_dict(files.read_json(folder / "config.json"))
inputs = np.zeros((1, 4, 4, 4), np.float32), np.int32(0), np.zeros((1, 4, 768), np.float32)
shapes = convert.abstract_params(unet.UNet(config), *inputs)
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = status("VmRSS")
params = convert.from_torch(files.open_weights(folder), shapes, where="", dtype=dtype)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak memory of a process")
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float16"])
@pytest.mark.slow
def test_loading_takes_little_more_memory_than_the_checkpoint(tmp_path, dtype):
    """All memory that a process holds at once, files' pages and copies included, while 107 MB become parameters.

    The bound is for parameters of the file's own type. Wider ones need their own size, of course.
    """
    config = UNET | {"block_out_channels": [128, 256], "cross_attention_dim": 768, "layers_per_block": 4}
    module = unet.UNet(unet.UNetConfig.from_dict(config))
    inputs = np.zeros((1, 4, 4, 4), np.float32), np.int32(0), np.zeros((1, 4, 768), np.float32)
    shapes = convert.abstract_params(module, *inputs)
    tensors = {k: v.astype(dtype) for k, v in convert.to_torch(random_weights(shapes, 0)).items()}
    write_part(tmp_path, config, tensors, stem="model")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert max(x.nbytes for x in tensors.values()) < 0.06 * size  # as in SD 1.5: no tensor is most of it
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), dtype], cwd=ROOT, capture_output=True, text=True, check=True
    )
    peak = int(done.stdout)
    assert 0.9 * size < peak < 1.3 * size, f"{peak / size:.2f} x {size / 1e6:.0f} MB"
