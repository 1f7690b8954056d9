"""LoRA: the collection, its files, and diffusers reading ours and we theirs."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from diffexp_jax.errors import InputError
from diffexp_jax.models import lora
from diffexp_jax.pipelines.stable_diffusion import LORA_TARGETS
from tests.support.lora_unet import ATTENTIONS, RANK, assert_equal_trees, random_lora, run, wrong_file

# ---- the collection


def test_init_is_a_no_op_on_every_attention(params):
    collection = lora.init_lora(jax.random.key(0), params, rank=RANK)
    flat = traverse_util.flatten_dict(collection)
    assert len(flat) == 4 * ATTENTIONS * 2 and {x.dtype for x in flat.values()} == {np.dtype(np.float32)}
    kernels = traverse_util.flatten_dict(params)
    for (*path, leaf), value in flat.items():
        fan_in, fan_out = kernels[*path, "kernel"].shape
        assert path[-1] in lora.TARGETS
        assert value.shape == ((fan_in, RANK) if leaf == "A" else (RANK, fan_out))
        assert (np.abs(value).max() == 0) == (leaf == "B")
    np.testing.assert_array_equal(run(params, collection), run(params))


def test_init_is_normal_with_deviation_1_over_rank_and_different_everywhere(params):
    flat = traverse_util.flatten_dict(lora.init_lora(jax.random.key(0), params, rank=16))
    first = [np.asarray(value).ravel() for path, value in flat.items() if path[-1] == "A"]
    assert np.concatenate(first).std() == pytest.approx(1 / 16, rel=0.05)
    assert len({tuple(values[:4]) for values in first}) == len(first) == 4 * ATTENTIONS
    again = traverse_util.flatten_dict(lora.init_lora(jax.random.key(1), params, rank=16))
    assert all(np.any(again[path] != value) for path, value in flat.items() if path[-1] == "A")


@pytest.mark.parametrize("rank", [4, 16])
def test_init_has_the_spread_of_pefts_and_diffusers(rank):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from diffusers.models.lora import LoRALinearLayer

    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"to_q": torch.nn.Linear(4096, 8, bias=False)})
    config = peft.LoraConfig(r=rank, init_lora_weights="gaussian", target_modules=["to_q"])
    theirs = [
        peft.get_peft_model(net, config).base_model.model["to_q"].lora_A["default"].weight,
        LoRALinearLayer(4096, 8, rank=rank).down.weight,
    ]
    ours = lora.init_lora(jax.random.key(0), {"to_q": {"kernel": jnp.zeros((4096, 8))}}, rank=rank)["to_q"]["A"]
    for weight in theirs:
        assert ours.std() == pytest.approx(float(weight.detach().std()), rel=0.05)


def test_columns_added_to_a_file_of_lower_rank_start_as_fresh_ones(params, tmp_path):
    lora.save_lora(tmp_path / "a.safetensors", random_lora(params, rank=1), alpha=1.0)
    key = jax.random.key(0)
    started = lora.initial_lora(key, params, rank=16, alpha=16.0, path=tmp_path / "a.safetensors")
    fresh = [x[:, 1:].ravel() for path, x in traverse_util.flatten_dict(started).items() if path[-1] == "A"]
    assert np.concatenate(fresh).std() == pytest.approx(1 / 16, rel=0.05)


def test_targets(params):
    flat = traverse_util.flatten_dict(lora.init_lora(jax.random.key(0), params, rank=2, targets=("to_k",)))
    assert {path[-2] for path in flat} == {"to_k"} and len(flat) == 2 * ATTENTIONS
    with pytest.raises(InputError, match="no layer named to_x, to_y"):
        lora.init_lora(jax.random.key(0), params, rank=2, targets=("to_x", "to_y"))


def test_scaled_multiplies_b_only(params):
    collection = random_lora(params)
    assert lora.scaled(collection, 1.0) is collection
    for path, value in traverse_util.flatten_dict(lora.scaled(collection, 0.5)).items():
        factor = 0.5 if path[-1] == "B" else 1.0
        np.testing.assert_array_equal(value, factor * traverse_util.flatten_dict(collection)[path])


def test_update_equals_changed_weights(params):
    """The collection at scale s is W + s A B in every target."""
    collection = random_lora(params)
    flat, pairs = traverse_util.flatten_dict(params), traverse_util.flatten_dict(collection)
    for path in list(flat):
        if (*path[:-1], "A") in pairs and path[-1] == "kernel":
            flat[path] = flat[path] + 0.5 * pairs[*path[:-1], "A"] @ pairs[*path[:-1], "B"]
    merged, base = run(traverse_util.unflatten_dict(flat)), run(params)
    ours = run(params, collection, scale=0.5)
    assert np.abs(ours - merged).max() < 1e-5 * np.abs(merged).max()
    assert np.abs(ours - base).max() > 1e-2 * np.abs(base).max()


# ---- files


@pytest.mark.parametrize("alpha", [float(RANK), 1.5])
def test_round_trip(params, tmp_path, alpha):
    collection, path = random_lora(params), tmp_path / "new" / "pytorch_lora_weights.safetensors"
    lora.save_lora(path, collection, alpha=alpha)
    for where in (path, str(path.parent)):
        loaded, scale = lora.load_lora(where, params)
        assert scale == alpha / RANK
        assert_equal_trees(loaded, collection)


def test_what_lies_beside_the_layers_has_a_file_of_its_own(params, tmp_path, caplog):
    """The mean of x_T: in diffusers' order of axes; a run that starts from the file has none; scaled by itself."""
    mean, path = np.random.default_rng(0).standard_normal((4, 6, 3)).astype(np.float32), tmp_path / "a.safetensors"
    collection = random_lora(params)
    np.testing.assert_array_equal(run(params, collection | {"x_T": mean}), run(params, collection))
    lora.save_lora(path, collection | {"x_T": mean}, alpha=1.0)
    assert "a.x_T.npy: in diffusers add it to the noise" in caplog.text
    np.testing.assert_array_equal(np.load(tmp_path / "a.x_T.npy"), mean.transpose(2, 0, 1))
    loaded, _ = lora.load_lora(path, params)
    assert_equal_trees(loaded, collection | {"x_T": mean})
    np.testing.assert_array_equal(lora.scaled(loaded, 0.5, others=0.25)["x_T"], 0.25 * mean)
    started = lora.initial_lora(jax.random.key(0), params, rank=RANK, alpha=1.0, path=path)
    assert_equal_trees(started, collection)
    for wrong, said in ((b"no", "no array of numpy"), (mean[0], r"shape \(6, 3\)"), (mean * np.nan, "not finite")):
        (tmp_path / "a.x_T.npy").write_bytes(wrong) if isinstance(wrong, bytes) else np.save(
            tmp_path / "a.x_T.npy", wrong
        )
        with pytest.raises(InputError, match=said):
            lora.load_lora(path, params)
    lora.save_lora(path, collection, alpha=1.0)  # another LoRA in its place
    assert_equal_trees(lora.load_lora(path, params)[0], collection)


def test_a_file_without_header_has_alpha_equal_to_the_rank(params, tmp_path):
    collection, path = random_lora(params), tmp_path / "lora.safetensors"
    lora.save_lora(path, collection, alpha=1.5)
    save_file(load_file(path), path)
    loaded, scale = lora.load_lora(path, params)
    assert scale == 1.0
    assert_equal_trees(loaded, collection)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_files_are_read_as_float32(params, tmp_path, dtype):
    collection, path = random_lora(params), tmp_path / "lora.safetensors"
    lora.save_lora(path, collection, alpha=3.0)
    save_file({name: value.astype(dtype) for name, value in load_file(path).items()}, path)
    loaded, _ = lora.load_lora(path, params)
    assert_equal_trees(loaded, jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), collection))
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}


NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_{}.weight"


@pytest.mark.parametrize(
    "name",
    [
        "unet.mid_block.attentions.7.transformer_blocks.0.attn2.to_k.lora_A.weight",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_magnitude_vector",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.bias",
        "unet.conv_norm_out.lora_A.weight",
        "lora_unet_mid_block_attentions_0_to_k.lora_down.weight",
    ],
)
def test_unknown_tensors_are_named(params, tmp_path, name):
    message = wrong_file(tmp_path, params, lambda t: t.update({name: np.zeros((RANK, 12), np.float32)}))
    assert f"tensors belong to no layer of this model's UNet ({name})" in message


@pytest.mark.parametrize("leaf, shape", [("A", (RANK, 768)), ("B", (320, RANK))])
def test_a_lora_of_another_model(params, tmp_path, leaf, shape):
    name = NAME.format(leaf)
    message = wrong_file(tmp_path, params, lambda t: t.update({name: np.zeros(shape, np.float32)}))
    assert f"tensor {name} has shape {shape}, the model's layer 12 -> 16" in message


@pytest.mark.parametrize("shape", [(), (RANK,), (RANK, 12, 3, 3)])
def test_a_tensor_that_is_no_matrix(params, tmp_path, shape):
    name = NAME.format("A")
    message = wrong_file(tmp_path, params, lambda t: t.update({name: np.zeros(shape, np.float32)}))
    assert f"tensor {name} has shape {shape}" in message


@pytest.mark.parametrize("leaf, shape", [("A", (2, 12)), ("B", (16, 2))])
def test_the_two_of_a_pair_have_one_rank(params, tmp_path, leaf, shape):
    message = wrong_file(tmp_path, params, lambda t: t.update({NAME.format(leaf): np.zeros(shape, np.float32)}))
    assert f"the model's layer 12 -> 16, the pair's rank {2 if leaf == 'A' else 3}" in message


def test_half_a_pair(params, tmp_path):
    def drop_one_a_and_another_b(tensors):
        del tensors[NAME.format("A")], tensors[NAME.format("B").replace("to_k", "to_v")]

    assert "a pair (lora_A, lora_B) per layer" in wrong_file(tmp_path, params, drop_one_a_and_another_b)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(params, tmp_path, value):
    def change(tensors):
        name = next(iter(tensors))
        tensors[name] = tensors[name] * value
        change.name = name

    assert "tensor {} holds numbers that are not finite" in wrong_file(tmp_path, params, change).replace(
        change.name, "{}"
    )


def test_the_same_bytes_each_time(params, tmp_path):
    """The library writes the header's entries in another order each time."""
    collection, path = random_lora(params), tmp_path / "l.safetensors"
    written = set()
    for _ in range(8):
        lora.save_lora(path, collection, alpha=6.0)
        written.add(path.read_bytes())
    assert len(written) == 1 and [p.name for p in tmp_path.iterdir()] == ["l.safetensors"]
    size = int.from_bytes(next(iter(written))[:8], "little")
    assert size % 8 == 0
    header = json.loads(next(iter(written))[8 : 8 + size])
    assert list(header) == sorted(header) and header["__metadata__"]["format"] == "pt"


def test_no_tensors(params, tmp_path):
    assert "holds no LoRA of a UNet" in wrong_file(tmp_path, params, dict.clear)


@pytest.mark.parametrize("key, value", [("use_dora", True), ("bias", "all"), ("modules_to_save", ["conv_in"])])
@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_other_scalings_are_refused(params, tmp_path, prefix, key, value):
    header = {"lora_adapter_metadata": json.dumps({f"{prefix}r": 3, f"{prefix}{key}": value})}
    assert f"{key}={value} is not supported" in wrong_file(tmp_path, params, lambda t: None, header)


def test_unreadable_files(params, tmp_path):
    path = tmp_path / "lora.safetensors"
    lora.save_lora(path, random_lora(params), alpha=3.0)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"not a safetensors file at all"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="lora.safetensors: not a readable LoRA file") as error:
            lora.load_lora(path, params)
        assert "\n" not in str(error.value)
    for missing in (tmp_path / "missing.safetensors", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match="not a readable LoRA file"):
            lora.load_lora(missing, params)


# ---- diffusers


# ---- files that others trained


def test_targets_of_the_config():
    layers = partial(lora.target_layers, groups=LORA_TARGETS)
    assert layers(("attention",)) == lora.TARGETS and layers("projections") == ("proj_in", "proj_out")
    assert layers(("to_k", "projections", "to_k")) == ("to_k", "proj_in", "proj_out")
    assert layers(["conv1"]) == ("conv1",)
    for wrong in (("to_x",), (), None, (3,), ((),), ("attention", ["to_q"]), 4.0):
        with pytest.raises(InputError, match="^lora.targets=.*: accepted: attention, feed_forward, projections, conv"):
            layers(wrong)
    with pytest.raises(InputError, match="^lora.targets='text_encoder': the text encoders are not trained"):
        layers(("attention", "text_encoder"))


def test_a_target_is_the_end_of_a_name_in_whole_parts():
    """As Flow-GRPO's targets of SD 3.5, which leave its second attention out."""
    kernel = {"kernel": np.zeros((4, 4), np.float32)}
    params = {"blocks": {i: {name: {"to_q": kernel, "add_q": kernel} for name in ("attn", "attn2")} for i in "01"}}
    collection = lora.init_lora(jax.random.key(0), params, rank=2, targets=("attn.to_q",))
    found = {path[:-1] for path in traverse_util.flatten_dict(collection)}
    assert found == {("blocks", i, "attn", "to_q") for i in "01"}


def test_the_same_draws_whatever_else_is_a_target(params):
    alone, beside = (
        traverse_util.flatten_dict(
            lora.init_lora(jax.random.key(0), params, rank=2, targets=lora.target_layers(words, LORA_TARGETS))
        )
        for words in (("attention",), ("attention", "feed_forward", "convolutions"))
    )
    assert len(alone) < len(beside)
    for path, value in alone.items():
        np.testing.assert_array_equal(value, beside[path])
