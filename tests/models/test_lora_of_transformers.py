"""LoRA files of a transformer (SD 3, FLUX) as diffusers, peft, kohya and others name them: read, or refused."""

import json

import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from diffexp_jax.errors import InputError
from diffexp_jax.formats.lora_names import TRANSFORMER
from diffexp_jax.models import lora, mmdit

RANK, ALPHA = 2, 6.0
LAYERS = [f"transformer_blocks.{i}.{layer}" for i in range(2) for layer in mmdit.LORA_TARGETS["attention"]]
LAYERS += [f"single_transformer_blocks.0.{layer}" for layer in ("attn.to_q", "attn.to_k", "proj_mlp", "proj_out")]
PARAMS = traverse_util.unflatten_dict(
    {(layer, "kernel"): np.zeros((6, 5 + len(layer) % 3), np.float32) for layer in LAYERS}
)


@pytest.fixture
def collection():
    rng = np.random.default_rng(0)
    return {
        layer: {
            "A": rng.standard_normal((6, RANK), np.float32),
            "B": rng.standard_normal((RANK, PARAMS[layer]["kernel"].shape[1]), np.float32),
        }
        for layer in LAYERS
    }


@pytest.fixture
def tensors(collection, tmp_path):
    """As we write them, without the header."""
    lora.save_lora(tmp_path / "ours.safetensors", collection, alpha=ALPHA, prefix=TRANSFORMER)
    return load_file(tmp_path / "ours.safetensors")


def renamed(tensors, spelling):
    return {spelling(name.removeprefix(TRANSFORMER)): x for name, x in tensors.items()}


def kohya(name):
    layer, ending = name.split(".lora_")
    return f"lora_transformer_{layer.replace('.', '_')}.lora_{'down' if ending[0] == 'A' else 'up'}.weight"


def check(path, collection, scale):
    found, of_file = lora.load_lora(path, PARAMS, prefix=TRANSFORMER)
    assert of_file == scale
    for layer, pair in collection.items():
        for kind, x in pair.items():
            np.testing.assert_array_equal(found[layer][kind], x)


def test_ours_has_the_names_and_the_header_that_diffusers_reads(tensors, collection, tmp_path):
    assert {name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name} == {
        f"transformer.{layer}" for layer in LAYERS
    }
    header = (tmp_path / "ours.safetensors").read_bytes()
    header = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    settings = json.loads(header["lora_adapter_metadata"])
    assert settings == {
        "transformer.r": RANK,
        "transformer.lora_alpha": ALPHA,
        "transformer.target_modules": sorted(LAYERS),
    }
    check(tmp_path / "ours.safetensors", collection, ALPHA / RANK)


@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.model.transformer.", "module.base_model.model."])
def test_a_folder_of_peft(tensors, collection, tmp_path, prefix):
    """What flow_grpo and DiffusionNFT save; diffusers loads it without a word, and without effect."""
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file(renamed(tensors, lambda name: prefix + name), folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "init_lora_weights": "gaussian", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    check(folder, collection, ALPHA / RANK)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="wants that file, at least"):
        lora.load_lora(folder, PARAMS, prefix=TRANSFORMER)


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "model.diffusion_model.", "_orig_mod.", ""])
def test_other_prefixes(tensors, collection, tmp_path, prefix):
    save_file(renamed(tensors, lambda name: prefix + name), tmp_path / "x.safetensors")
    check(tmp_path / "x.safetensors", collection, 1.0)  # without a header alpha is the rank


def test_kohyas_names(tensors, collection, tmp_path):
    named = renamed(tensors, kohya)
    alphas = {name.replace(".lora_down.weight", ".alpha") for name in named if "lora_down" in name}
    named |= dict.fromkeys(alphas, np.array(ALPHA, np.float32))
    text = {f"lora_te{i}_text_model_encoder.lora_down.weight": np.zeros((2, 3), np.float32) for i in (1, 2, 3)}
    save_file(named | text, tmp_path / "x.safetensors")
    check(tmp_path / "x.safetensors", collection, ALPHA / RANK)


@pytest.mark.parametrize(
    "name, said",
    [
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", "under the original code's names of layers"),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight", "under the original code's names of layers"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "under the original code's names of layers"),
        ("lora_unet_single_blocks_0_linear1.lora_down.weight", "under the original code's names of layers"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", "under the original code's names of layers"),
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "a LoRA of a UNet (Stable Diffusion)"),
        ("transformer.transformer_blocks.9.attn.to_q.lora_A.weight", "a LoRA of another model, or of a kind"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector", "DoRA, which is not supported"),
    ],
)
def test_names_of_no_layer_are_refused_in_one_line(tensors, tmp_path, name, said):
    save_file(tensors | {name: np.zeros((2, 6), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError) as error:
        lora.load_lora(tmp_path / "x.safetensors", PARAMS, prefix=TRANSFORMER)
    assert said in str(error.value) and "transformer" in str(error.value) and "\n" not in str(error.value)
