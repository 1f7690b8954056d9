"""LoRA files in every dialect: what peft and diffusers make of them, by the weights that they add to each layer."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from diffexp_jax.errors import InputError
from diffexp_jax.formats import convert, lora_files, lora_names, original_names
from diffexp_jax.models import lora
from diffexp_jax.pipelines.stable_diffusion import LORA_TARGETS
from tests.support.lora_unet import CONFIG, CONTEXT, T, X, random_lora, unet

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def shapes():
    return convert.abstract_params(unet, X, T, CONTEXT)


def changes(collection, scale) -> dict[str, np.ndarray]:
    """{layer: what a LoRA adds to its weight, in torch's axis order}."""
    flat, out = traverse_util.flatten_dict(collection), {}
    for path in {path[:-1] for path in flat}:
        a, b = flat[*path, "A"], flat[*path, "B"]
        change = scale * np.einsum("...ir,...ro->...io", a, np.broadcast_to(b, (*a.shape[:-2], *b.shape[-2:])))
        out[".".join(path)] = change.T if change.ndim == 2 else change.transpose(3, 2, 0, 1)
    return out


def peft_model(**settings):
    """A UNet with a random LoRA of peft's, and what that adds to each layer."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 3, "target_modules": ATTENTION} | settings)
    net = peft.get_peft_model(UNet2DConditionModel(**CONFIG), config)
    for name, parameter in net.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped = {name: module for name, module in net.base_model.model.named_modules() if hasattr(module, "lora_A")}
    return net, {name: module.get_delta_weight("default").detach().numpy() for name, module in wrapped.items()}


def assert_does(path, shapes, wanted, factor=1.0):
    ours = changes(*lora.load_lora(path, shapes))
    assert ours.keys() == wanted.keys()
    for layer, change in wanted.items():
        np.testing.assert_allclose(ours[layer], factor * change, rtol=1e-4, atol=1e-5 * np.abs(change).max())


SETTINGS = {
    "alpha": {"lora_alpha": 8},
    "patterns": {
        "lora_alpha": 2,
        "rank_pattern": {"attn2.to_k": 1, r".*mid_block.*to_q": 2},
        "alpha_pattern": {"attn1.to_v": 5, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 7},
    },
    "rslora": {"lora_alpha": 8, "use_rslora": True, "rank_pattern": {"to_v": 5}},
    "convolutions": {"lora_alpha": 4, "target_modules": [*ATTENTION, "conv1", "conv2", "proj_in", "conv_in", "conv"]},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_folder_of_peft(shapes, tmp_path, kind):
    net, wanted = peft_model(**SETTINGS[kind])
    net.save_pretrained(tmp_path / "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    assert_does(tmp_path / "a", shapes, wanted)
    assert_does(tmp_path / "a" / "adapter_model.safetensors", shapes, wanted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that peft wrote, of rank 3 and alpha 8, and what its LoRA adds."""
    path = tmp_path_factory.mktemp("peft")
    net, wanted = peft_model(lora_alpha=8)
    net.save_pretrained(path)
    return path, wanted


def renamed(folder: Path, out: Path, rename, *, name="adapter_model.safetensors", settings=True) -> Path:
    """The same LoRA with other names of tensors, with or without peft's settings beside it."""
    out.mkdir()
    tensors = {rename(key): value for key, value in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, out / name)
    if settings:
        (out / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    return out


@pytest.mark.parametrize(
    "old, new",
    [
        ("base_model.model.", "unet.base_model.model."),
        ("base_model.model.", "base_model.model.unet."),
        ("base_model.model.", "module.base_model.model._orig_mod."),
        ("base_model.model.", ""),
        (".weight", ".default.weight"),
        (".weight", ".my-style_2.weight"),
    ],
)
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors", "other.safetensors"])
def test_names_of_peft(shapes, folder, tmp_path, old, new, file):
    out = renamed(folder[0], tmp_path / "x", lambda name: name.replace(old, new), name=file)
    plain = not new and file != "adapter_model.safetensors"  # diffusers' own names: alpha is the rank, as there
    assert_does(out, shapes, folder[1], factor=3 / 8 if plain else 1.0)


@pytest.mark.parametrize("new", ["base_model.model.", "unet.base_model.model."])
def test_no_scale_is_made_up(shapes, folder, tmp_path, new):
    out = renamed(folder[0], tmp_path / "x", lambda name: name.replace("base_model.model.", new), settings=False)
    with pytest.raises(InputError, match="adapter_model.safetensors: .* adapter_config.json, which is not beside it"):
        lora.load_lora(out, shapes)
    (out / "adapter_config.json").write_text('{"lora_alpha": 8}')
    assert_does(out, shapes, folder[1])
    for content, said in (
        ("{}", "lora_alpha is missing"),
        ("[", "not readable as json"),
        ('{"lora_alpha": 8, "r": 4}', "has rank 3, and the settings say r=4"),
        ('{"lora_alpha": "x"}', "is x; wants a number"),
        ('{"lora_alpha": 8, "rank_pattern": [3]}', "rank_pattern in peft's settings is no json object"),
        ('{"lora_alpha": 8, "alpha_pattern": {"(": 3}}', "alpha_pattern '\\(' in peft's settings"),
    ):
        (out / "adapter_config.json").write_text(content)
        with pytest.raises(InputError, match=said):
            lora.load_lora(out, shapes)


@pytest.mark.parametrize(
    "key, value",
    [
        *(("use_dora", True), ("bias", "lora_only"), ("modules_to_save", ["conv_in"]), ("lora_bias", True)),
        *(
            ("fan_in_fan_out", True),
            ("init_lora_weights", "pissa"),
            ("peft_type", "LOHA"),
            ("layer_replication", [[0, 1]]),
        ),
        *(("use_qalora", True), ("a_setting_to_come", "on"), ("target_parameters", ["x"])),
    ],
)
def test_settings_that_change_the_numbers_are_refused(shapes, folder, tmp_path, key, value):
    out = renamed(folder[0], tmp_path / "x", str)
    settings = json.loads((out / "adapter_config.json").read_text()) | {key: value}
    (out / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=f"adapter_config.json: {key}=.* is not supported; wants plain LoRA") as error:
        lora.load_lora(out, shapes)
    assert "\n" not in str(error.value)


def test_every_setting_of_peft_is_known():
    """Read, without effect on what the tensors mean, or refused where it is set."""
    peft = pytest.importorskip("peft")
    defaults = peft.LoraConfig(target_modules=["to_q"]).to_dict()
    known = {*lora_files._READ, *lora_files._WITHOUT_EFFECT, *lora_files._ACCEPTED}
    refused = {"use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "layer_replication", "use_qalora"}
    refused |= {"trainable_token_indices", "target_parameters", "megatron_config", "arrow_config", "kasa_config"}
    refused |= {"alora_invocation_tokens", "use_bdlora", "velora_config", "monteclora_config"}
    assert refused & known == set()
    for key, value in defaults.items():
        assert key in known or not value, key  # what peft writes by default loads


# ---- other files


def processor_tensors(folder) -> dict[str, np.ndarray]:
    """The LoRA as diffusers' attention processors named it, which is what ddpo-pytorch writes."""
    out = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        layer, kind = name.removeprefix("base_model.model.").split(".lora_")
        attention, projection = layer.rsplit(".to_", 1)
        kind = "down" if kind.startswith("A") else "up"
        out[f"{attention}.processor.to_{projection.removesuffix('.0')}_lora.{kind}.weight"] = value
    return out


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_pickled_attention_processors(shapes, folder, tmp_path, zipped, nested):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(value) for name, value in processor_tensors(folder[0]).items()}
    path = tmp_path / "pytorch_lora_weights.bin"
    torch.save({"state_dict": tensors} if nested else tensors, path, _use_new_zipfile_serialization=zipped)
    for where in (path, tmp_path):
        assert_does(where, shapes, folder[1], factor=3 / 8)  # such a file says no alpha: it is the rank


def test_a_pickled_folder_of_peft(shapes, folder, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = load_file(folder[0] / "adapter_model.safetensors")
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_bytes((folder[0] / "adapter_config.json").read_bytes())
    assert_does(tmp_path, shapes, folder[1])


def test_a_pickle_that_wants_more_is_refused(shapes, tmp_path):
    import pickle

    (tmp_path / "pytorch_lora_weights.bin").write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(InputError, match="pytorch_lora_weights.bin: not a readable LoRA file: "):
        lora.load_lora(tmp_path, shapes)


def test_which_file_of_a_folder(shapes, folder, tmp_path):
    (tmp_path / "notes.txt").write_text("a style")
    with pytest.raises(
        InputError, match="no folder with pytorch_lora_weights.safetensors or adapter_model.safetensors"
    ):
        lora.load_lora(tmp_path, shapes)
    tensors = processor_tensors(folder[0])
    save_file(tensors, tmp_path / "style-000001.safetensors")
    assert_does(tmp_path, shapes, folder[1], factor=3 / 8)
    save_file(tensors, tmp_path / "style-000002.safetensors")
    with pytest.raises(
        InputError, match=r"several files \(style-000001.safetensors, style-000002.safetensors\); give one"
    ):
        lora.load_lora(tmp_path, shapes)
    save_file(tensors, tmp_path / lora.LORA_FILE)  # the name that diffusers looks for goes before others
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"the same, pickled")
    assert_does(tmp_path, shapes, folder[1], factor=3 / 8)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="several files .adapter_model.safetensors, pytorch_lora_weights.safetensors"):
        lora.load_lora(tmp_path, shapes)
    renamed(folder[0], tmp_path / "below", str).rename(tmp_path / "b")
    (tmp_path / "c").mkdir()
    renamed(folder[0], tmp_path / "c" / "default", str)
    with pytest.raises(InputError, match="; there are some in its subfolders default"):
        lora.load_lora(tmp_path / "c", shapes)


def test_several_loras_in_one_file(shapes, folder, tmp_path):
    tensors = load_file(folder[0] / "adapter_model.safetensors")
    both = {
        name.replace(".weight", f".{adapter}.weight"): x for name, x in tensors.items() for adapter in ("one", "two")
    }
    save_file(both, tmp_path / "x.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((folder[0] / "adapter_config.json").read_bytes())
    with pytest.raises(InputError, match=r"holds 2 LoRAs \(one, two\); wants one a file"):
        lora.load_lora(tmp_path, shapes)


def test_a_layer_twice(shapes, tmp_path):
    lora.save_lora(tmp_path / "x.safetensors", random_lora(shapes), alpha=3.0)
    tensors = load_file(tmp_path / "x.safetensors")
    name = sorted(tensors)[0]
    save_file(tensors | {name.removeprefix("unet."): tensors[name]}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="two tensors for the same of a layer: .* and "):
        lora.load_lora(tmp_path, shapes)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("base_model.model.{}.lora_magnitude_vector", "DoRA"),
        ("lora_unet_{}.dora_scale", "DoRA"),
        ("lora_unet_{}.hada_w1_a", "LoHa"),
        ("lora_unet_{}.lokr_w2", "LoKr"),
        ("lora_unet_{}.lora_mid.weight", "a LoRA with a core tensor"),
        ("oft_unet_{}.oft_blocks", "OFT"),
        ("unet.{}.lora_B.bias", "a LoRA with biases"),
        ("diffusion_model.{}.diff_b", "changed weights"),
        ("bundle_emb.style.string_to_param.*", "a textual inversion"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "a LoRA of a transformer model"),
    ],
)
def test_other_kinds_are_named(shapes, tmp_path, name, kind):
    name = name.format("mid_block.attentions.0.proj_in")
    save_file({name: np.zeros((3, 3), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=f": {kind}.*, which is not supported$"):
        lora.load_lora(tmp_path, shapes)


def test_a_lora_of_the_text_encoder_alone(shapes, tmp_path):
    name = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: np.zeros((3, 3), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="holds no LoRA of a UNet, only 1 text encoder tensors"):
        lora.load_lora(tmp_path, shapes)


def test_kohyas_convolutions(shapes, tmp_path):
    """LoCon: 3x3 convolutions, by both ways to count the blocks, with an alpha each."""
    targets = lora.target_layers(("convolutions", "projections"), LORA_TARGETS)
    wide = random_lora(shapes, targets=(*targets, "conv_in"))
    original = original_names.unet_names(changes(wide, 1.0))
    assert original["down_blocks.0.downsamplers.0.conv"] == "input_blocks.2.0.op"
    assert original["up_blocks.0.upsamplers.0.conv"] == "output_blocks.1.1.conv"
    for style in ("diffusers", "original"):
        tensors = {}
        for path, value in traverse_util.flatten_dict(wide).items():
            layer = ".".join(path[:-1])
            name = "lora_unet_" + (original[layer] if style == "original" else layer).replace(".", "_")
            value = value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1)
            tensors[f"{name}.lora_{'down' if path[-1] == 'A' else 'up'}.weight"] = np.ascontiguousarray(value)
            tensors[f"{name}.alpha"] = np.array(1.5, np.float32)
        save_file(tensors, tmp_path / f"{style}.safetensors")
        assert_does(tmp_path / f"{style}.safetensors", shapes, changes(wide, 0.5))


def test_the_names_of_a_file_decide_before_its_numbers_are_read(shapes, tmp_path):
    """A whole model given as a LoRA is refused by its names."""
    save_file({"model.diffusion_model.out.2.bias": np.zeros(4, np.float16)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="1 of 1 tensors belong to no layer of this model's UNet"):
        lora.load_lora(tmp_path, shapes)


def test_parse():
    layer = "mid_block.attentions.0.proj_in"
    assert lora_names.parse(f"unet.base_model.model.{layer}.lora_A.weight") == (layer, "A", False, True, None)
    assert lora_names.parse(f"{layer}.lora_B.default.weight") == (layer, "B", False, True, "default")
    assert lora_names.parse(f"unet.{layer}.lora_B.weight") == (layer, "B", False, False, None)


TRANSFORMER = {"transformer_blocks": {"0": {"attn": {"to_q": {"kernel": np.zeros((6, 6), np.float32)}}}}}


def test_files_of_another_network_than_a_unet(shapes, tmp_path):
    """As diffusers writes those of SD 3 and FLUX, as peft does, and by kohya's names; a UNet takes none of them."""
    path, layer = tmp_path / lora.LORA_FILE, "transformer_blocks.0.attn.to_q"
    made = traverse_util.flatten_dict(random_lora(TRANSFORMER, rank=2))
    lora.save_lora(path, traverse_util.unflatten_dict(made), alpha=4.0, prefix="transformer.")
    tensors = load_file(path)
    assert tensors.keys() == {f"transformer.{layer}.lora_{kind}.weight" for kind in "AB"}
    for before in ("transformer.", "base_model.model.", "diffusion_model.", "lora_transformer_"):
        name = layer if before.endswith(".") else layer.replace(".", "_")
        other = {
            f"{before}{name}.lora_{kind}.weight": tensors[f"transformer.{layer}.lora_{kind}.weight"] for kind in "AB"
        }
        header = {"r": 2, "lora_alpha": 4.0} if before == "base_model.model." else {}
        header = header or {"transformer.r": 2, "transformer.lora_alpha": 4.0}
        save_file(other, path, {lora.METADATA: json.dumps(header)})
        loaded, scale = lora.load_lora(path, TRANSFORMER, prefix="transformer.")
        assert scale == 2.0
        for key, value in traverse_util.flatten_dict(loaded).items():
            np.testing.assert_array_equal(value, made[key])
    with pytest.raises(InputError, match="no layer of this model's UNet .*: a LoRA of a transformer model"):
        lora.load_lora(path, shapes)
    lora.save_lora(path, random_lora(shapes), alpha=4.0)
    with pytest.raises(InputError, match=r"no layer of this model's transformer .*: a LoRA of a UNet \(Stable Diff"):
        lora.load_lora(path, TRANSFORMER, prefix="transformer.")


@pytest.mark.parametrize(
    "layers",
    [
        ["transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.1.proj_mlp", "proj_out"],
        ["down_blocks.resnets.0.conv1", "up_blocks.attentions.1.proj_in", "mid_block.3.resnets.0.conv1"],
        ["down_blocks.0.attentions.0.proj_in", "up_blocks.0.upsamplers.0.conv"],
        ["layers.0"],
        [],
    ],
)
def test_the_layers_of_any_network_have_spellings(layers):
    found = lora_names.spellings(layers)
    assert set(found.values()) == set(layers)
    for layer in layers:
        assert found[layer] == found[layer.replace(".", "_")] == layer
