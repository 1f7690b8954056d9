"""Equal blocks as a loop: what is stacked, and the same outputs and gradients as of blocks one by one."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from diffexp_jax import backend, parallel
from diffexp_jax.models import blip, clip, t5
from diffexp_jax.models.blocks import OF_ENCODERS, TRANSFORMER_BLOCKS, Stack, stacked, stacked_lora
from diffexp_jax.parallel import weights
from diffexp_jax.settings.training import Model
from tests.support.arrays import normal
from tests.support.networks import BLOCKS, of_flux, of_sd35, of_sdxl, random_lora, random_params

# ------------------------------------------------------------------------------------------------------ what is stacked


def block(value, width=2):
    return {"ff": {"kernel": np.full((2, width), value, np.float32)}, "bias": np.full(3, -value, np.float32)}


def test_runs_of_equal_blocks_are_stacked():
    """In the order of their numbers; a run that is too short stays, and all that is no block."""
    tree = {f"transformer_blocks.{i}": block(i) for i in range(11)}
    tree |= {f"transformer_blocks.{i}": block(i, width=3) for i in (11, 12)}
    tree |= {"proj": block(0), "resnets.0": block(0), "resnets.1": block(1), "resnets.2": block(2)}
    found = stacked({"down": tree}, [TRANSFORMER_BLOCKS], at_least=3)["down"]
    kept = {"transformer_blocks.11", "transformer_blocks.12", "proj", "resnets.0", "resnets.1", "resnets.2"}
    assert found.keys() == kept | {"transformer_blocks.0+"}
    run = found["transformer_blocks.0+"]
    kernel, bias = run["ff"]["kernel"], run["bias"]
    assert (kernel.shape, kernel.ndim, kernel.size, kernel.dtype) == ((11, 2, 2), 3, 44, np.float32)
    np.testing.assert_array_equal(np.asarray(kernel)[:, 1, 0], np.arange(11))
    np.testing.assert_array_equal(np.asarray(bias)[:, 0], -np.arange(11.0))
    assert np.asarray(kernel).ctypes.data % 64 == 0
    assert all(found[name] is tree[name] or found[name] == tree[name] for name in kept)


def test_parts_are_stacked_and_shared_out(monkeypatch):
    """Each device gets its part of every block's kernel; of shapes too."""
    monkeypatch.setattr(weights, "LARGE", 4)
    tree = {f"transformer_blocks.{i}": {"kernel": normal(i, 4, 6), "bias": normal(i, 6)} for i in range(3)}
    run = stacked(parallel.shared_out(tree, 2), [TRANSFORMER_BLOCKS], at_least=2)["transformer_blocks.0+"]
    assert run["kernel"].axis == -2 and isinstance(run["kernel"].kernel, Stack)
    whole = np.stack([tree[name]["kernel"] for name in tree])
    monkeypatch.setattr(parallel.devices.backend, "device_count", lambda: 2)
    np.testing.assert_array_equal(run["kernel"].of(1), whole[:, 2:])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    run = stacked(parallel.shared_out(shapes, 2), [TRANSFORMER_BLOCKS], at_least=2)["transformer_blocks.0+"]
    found = parallel.shapes_on_devices(run)
    n = jax.local_device_count()
    assert found["kernel"].kernel.shape == (n, 3, 2, 6) and found["bias"].shape == (n, 3, 6)


def test_lora_is_stacked():
    """Zeros where a block has no pair, or one of a smaller rank."""
    a, b = np.ones((4, 1), np.float32), np.full((1, 5), 2, np.float32)
    wide = {"A": np.full((4, 2), 3, np.float32), "B": np.full((2, 5), 4, np.float32)}
    found = stacked_lora([{"q": {"A": a, "B": b}}, {}, {"q": wide, "v": wide}])
    np.testing.assert_array_equal(found["q"]["A"][:, 0], [[1, 0], [0, 0], [3, 3]])
    np.testing.assert_array_equal(found["q"]["B"][..., 0], [[2, 0], [0, 0], [4, 4]])
    np.testing.assert_array_equal(found["v"]["B"][..., 0], [[0, 0], [0, 0], [4, 4]])
    assert stacked_lora([{}, {}]) == {}


@pytest.mark.parametrize(
    "words, platform, shards, expected",
    [("auto", "cpu", True, None), ("auto", "gpu", False, None), ("auto", "gpu", True, 8), ("auto", "tpu", False, 8)]
    + [("true", "cpu", False, 2), ("false", "tpu", True, None)],
)
def test_how_many_equal_blocks_are_a_loop(monkeypatch, words, platform, shards, expected):
    monkeypatch.setattr(backend, "platform", lambda: platform)
    assert Model(scan_layers=words).equal_blocks(shards=shards) == expected


# ------------------------------------------------------------------------------------------------------------- networks


NETWORKS = {"flux": (of_flux, 2), "sd3.5": (of_sd35, 2), "sdxl": (of_sdxl, 1)}  # and how many runs there are


@pytest.mark.parametrize("name", ["sdxl", *(pytest.param(x, marks=pytest.mark.slow) for x in ("flux", "sd3.5"))])
def test_a_loop_computes_what_blocks_do(name):
    """The output, and the gradient in LoRA, which has other layers and ranks in one of the blocks."""
    (make, n_runs), rng = NETWORKS[name], np.random.default_rng(0)
    network, args, groups = make()
    params = random_params(network, args, rng)
    flat = traverse_util.flatten_dict(random_lora(params, groups, rng))
    layer = next(path[:-1] for path in flat if "transformer_blocks.1" in path)
    del flat[*layer, "A"], flat[*layer, "B"]
    layer = next(path[:-1] for path in reversed(flat) if "transformer_blocks.1" in path)
    flat[*layer, "A"], flat[*layer, "B"] = flat[*layer, "A"][:, :2], flat[*layer, "B"][:2]
    weights = normal(1, *args[0].shape)

    def slope(network, collection, params):
        def value(collection):
            out = network.apply({"params": params, "lora": collection}, *args)
            return (out * weights).mean(), out

        return jax.jit(jax.grad(value, has_aux=True))(collection)

    collection = traverse_util.unflatten_dict(flat)
    one_by_one = slope(network, collection, params)
    runs = parallel.first(parallel.share(stacked(params, BLOCKS, at_least=2)))
    assert sum(name.endswith("+") for name in runs) == n_runs
    looped = slope(network.clone(remat=True), collection, runs)
    assert jax.tree.structure(looped) == jax.tree.structure(one_by_one)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(one_by_one[0]))
    np.testing.assert_allclose(looped[1], one_by_one[1], rtol=0, atol=1e-5 * np.abs(one_by_one[1]).max())
    for path, x in traverse_util.flatten_dict(looped[0]).items():
        wanted = traverse_util.flatten_dict(one_by_one[0])[path]
        np.testing.assert_allclose(x, wanted, rtol=0, atol=1e-5 * largest, err_msg=str(path))


IDS, PIXELS = np.array([[5, 4, 9, 36], [35, 1, 36, 36]], np.int32), normal(0, 2, 8, 8, 3)
TOWER = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}


def of_clip_text():
    """Its state before the last layer too."""
    sizes = TOWER | {"vocab_size": 37, "max_position_embeddings": 5, "eos_token_id": 36}
    return clip.TextTransformer(clip.CLIPTextConfig.from_dict(sizes)), (IDS,), 1


def of_clip_vision():
    sizes = TOWER | {"image_size": 8, "patch_size": 4}
    return clip.VisionTransformer(clip.CLIPVisionConfig.from_dict(sizes)), (PIXELS,), 1


def of_t5():
    sizes = {"vocab_size": 37, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 3, "num_heads": 2}
    config = t5.T5Config.from_dict(sizes | {"feed_forward_proj": "gated-gelu"})
    return t5.T5Encoder(config), (IDS, IDS != 36), 1


def of_imagereward():
    """The image's tower and BERT."""
    sizes = {"vision_width": 64, "vision_layers": 3, "image_size": 8, "patch_size": 4, "head_widths": (4, 3, 2, 2, 1)}
    config = blip.BLIPConfig(**TOWER, vocab_size=37, max_position_embeddings=5, **sizes)
    return blip.ImageReward(config), (PIXELS, IDS), 2


@pytest.mark.parametrize("make", [of_clip_text, of_clip_vision, of_t5, of_imagereward])
def test_an_encoders_loop_computes_what_its_blocks_do(make):
    """All that it gives, and the gradient in the images."""
    (network, args, n_runs), rng = make(), np.random.default_rng(0)
    params = random_params(network, args, rng, over=3)
    runs = parallel.first(parallel.share(stacked(params, OF_ENCODERS, at_least=3)))
    names = [name for path in traverse_util.flatten_dict(runs) for name in path if name.endswith("+")]
    assert len(set(names)) == n_runs

    def value(first, params):
        out = network.apply({"params": params}, first, *args[1:])
        return sum(x.mean() for x in jax.tree.leaves(out)), out

    def found(params):
        if args[0] is PIXELS:
            return jax.jit(jax.grad(value, has_aux=True))(args[0], params)
        return jax.jit(value)(args[0], params)

    one_by_one, looped = found(params), found(runs)
    for ours, wanted in zip(*map(jax.tree.leaves, (looped, one_by_one)), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
