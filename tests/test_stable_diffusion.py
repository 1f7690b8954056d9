"""Loading pipeline folders: the layouts that people have, and what is wrong with broken ones."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffexp_jax import InputError
from diffexp_jax.models import files, stable_diffusion

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny pipeline folder that a test may break."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def trees_equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_sharded_weights_equal_single(folder, tiny_model):
    tensors = load_file(folder / UNET_FILE)
    names = sorted(tensors)
    index = {}
    for n, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        shard = f"diffusion_pytorch_model-0000{n}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / "unet" / shard)
        index |= dict.fromkeys(part, shard)
    (folder / UNET_FILE).unlink()
    index_file = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert trees_equal(stable_diffusion.load(folder).params, stable_diffusion.load(tiny_model).params)

    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="00002-of-00002.safetensors: the file is missing"):
        stable_diffusion.load(folder)


def test_fp16_variant_is_used_when_it_is_all_there_is(folder):
    tensors = {name: value.astype(np.float16) for name, value in load_file(folder / UNET_FILE).items()}
    save_file(tensors, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    (folder / UNET_FILE).unlink()
    kernel = stable_diffusion.load(folder).params["unet"]["conv_in"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, tensors["conv_in.weight"].astype(np.float32).transpose(2, 3, 1, 0))


def test_old_attention_names_of_a_vae():
    old = ["query.weight", "key.weight", "value.bias", "proj_attn.weight", "group_norm.weight"]
    tensors = {f"decoder.mid_block.attentions.0.{name}": np.full(1, n) for n, name in enumerate(old)}
    new = stable_diffusion.modern_attention_names(tensors)
    today = ["to_q.weight", "to_k.weight", "to_v.bias", "to_out.0.weight", "group_norm.weight"]
    assert {name: int(value[0]) for name, value in new.items()} == {
        f"decoder.mid_block.attentions.0.{name}": n for n, name in enumerate(today)
    }


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_subfolder(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(InputError, match=f"{part}/ is missing"):
        stable_diffusion.load(folder)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
    ],
)
def test_missing_file(folder, file):
    (folder / file).unlink()
    with pytest.raises(InputError, match=f"{file}: the file is missing"):
        stable_diffusion.load(folder)


def test_missing_and_pickled_weights(folder):
    (folder / UNET_FILE).unlink()
    with pytest.raises(InputError, match="no weights; wants diffusion_pytorch_model.safetensors"):
        stable_diffusion.load(folder)
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="only pickled weights .*safe_serialization=True"):
        stable_diffusion.load(folder)


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_truncated_weights(folder, size):
    path = folder / UNET_FILE
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="not a whole safetensors file") as error:
        stable_diffusion.load(folder)
    assert "\n" not in str(error.value)


def test_broken_json(folder):
    (folder / "unet/config.json").write_text("{")
    with pytest.raises(InputError, match="unet/config.json: not readable as json"):
        stable_diffusion.load(folder)
    (folder / "unet/config.json").write_text("[]")
    with pytest.raises(InputError, match="wants a json object, found a list"):
        stable_diffusion.load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("act_fn", "gelu"), ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]), ("class_embed_type", "timestep")],
)
def test_unsupported_unet(folder, key, value):
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=f"{key}.*accepted"):
        stable_diffusion.load(folder)


def test_unknown_folder():
    with pytest.raises(InputError, match="no such folder; accepted: emoji, a folder in diffusers' format, or a hub id"):
        stable_diffusion.load("nowhere/at/all")


def test_tensors_are_read_when_asked_for(folder):
    weights = files.open_weights(folder / "unet")
    assert len(weights) == len(load_file(folder / UNET_FILE)) and "conv_in.weight" in weights
    np.testing.assert_array_equal(weights["conv_in.weight"], load_file(folder / UNET_FILE)["conv_in.weight"])


def test_token_ids_names_what_was_cut(tiny_model):
    tokenizer = stable_diffusion.load_tokenizer(tiny_model / "tokenizer")
    length = tokenizer.model_max_length
    fits, long = "dog " * (length - 2), "dog " * (length - 1)
    ids, cut = stable_diffusion.token_ids(tokenizer, [fits, long, ""])
    assert ids.shape == (3, length) and cut == [long]
    np.testing.assert_array_equal(ids[0], ids[1])
    assert list(ids[2, :2]) == [tokenizer.bos_token_id, tokenizer.eos_token_id]
