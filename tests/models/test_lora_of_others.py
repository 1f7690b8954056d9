"""LoRA files of diffusers and of other programs: they load ours, we theirs."""

import json

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from diffexp_jax.errors import InputError
from diffexp_jax.models import lora
from diffexp_jax.pipelines.stable_diffusion import LORA_TARGETS
from tests.support.lora_unet import (
    RANK,
    assert_close_and_not_a_no_op,
    assert_equal_trees,
    pipeline,
    random_lora,
    run,
    their_output,
    their_unet,
    wrong_file,
)


@pytest.mark.parametrize("alpha", [pytest.param(float(RANK), marks=pytest.mark.slow), 1.5])
@pytest.mark.parametrize("way", ["pipeline", "adapter"])
def test_diffusers_loads_ours(params, tmp_path, alpha, way):
    theirs, collection = their_unet(params), random_lora(params)
    lora.save_lora(tmp_path / "pytorch_lora_weights.safetensors", collection, alpha=alpha)
    if way == "pipeline":
        pipeline(theirs).load_lora_weights(tmp_path)
    else:
        theirs.load_lora_adapter(tmp_path, prefix="unet", use_safetensors=True)
    ours = run(params, collection, scale=alpha / RANK)
    assert_close_and_not_a_no_op(ours, their_output(theirs), run(params))


@pytest.mark.parametrize(
    "way, alpha",
    [
        ("pipeline", RANK),
        ("pipeline", 12),
        ("pipeline_without_header", RANK),  # such a file does not say alpha: it is the rank
        ("pipeline_old_names", RANK),
        ("adapter", 12),
    ],
)
def test_we_load_diffusers(params, tmp_path, way, alpha):
    theirs = their_unet(params)
    import torch
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(0)
    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.3)
    tensors = get_peft_model_state_dict(theirs)
    if way == "adapter":
        theirs.save_lora_adapter(tmp_path)
    elif way == "pipeline":
        config = theirs.peft_config["default"].to_dict()
        pipeline(theirs).save_lora_weights(tmp_path, tensors, unet_lora_adapter_metadata=config)
    else:
        tensors = convert_state_dict_to_diffusers(tensors) if way == "pipeline_old_names" else tensors
        pipeline(theirs).save_lora_weights(tmp_path, tensors)

    collection, scale = lora.load_lora(tmp_path, params)
    assert scale == alpha / RANK
    ours = run(params, collection, scale=scale)
    assert_close_and_not_a_no_op(ours, their_output(theirs), run(params))


def test_our_names_are_those_that_diffusers_writes(params, tmp_path):
    theirs = their_unet(params)
    from peft import LoraConfig, get_peft_model_state_dict

    config = LoraConfig(r=RANK, lora_alpha=6, target_modules=list(lora.TARGETS))
    theirs.add_adapter(config)
    metadata = theirs.peft_config["default"].to_dict()
    tensors = get_peft_model_state_dict(theirs)
    pipeline(theirs).save_lora_weights(tmp_path / "theirs", tensors, unet_lora_adapter_metadata=metadata)
    lora.save_lora(tmp_path / "ours" / lora.LORA_FILE, random_lora(params), alpha=6.0)

    shapes, headers = {}, {}
    for who in ("ours", "theirs"):
        with safe_open(tmp_path / who / lora.LORA_FILE, framework="numpy") as file:
            shapes[who] = {name: file.get_tensor(name).shape for name in file.keys()}
            headers[who] = json.loads(file.metadata()["lora_adapter_metadata"])
    assert shapes["ours"] == shapes["theirs"]
    for key in ("unet.r", "unet.lora_alpha"):
        assert headers["ours"][key] == headers["theirs"][key]


def original_names(layer):
    """The layers of CONFIG (one resnet a level) as the original code and so kohya's SDXL files count them, by hand."""
    blocks = {
        "down_blocks.0.attentions.0.": "input_blocks.1.1.",
        "mid_block.attentions.0.": "middle_block.1.",
        "up_blocks.1.attentions.0.": "output_blocks.2.1.",
        "up_blocks.1.attentions.1.": "output_blocks.3.1.",
        "down_blocks.1.resnets.0.time_emb_proj": "input_blocks.3.0.emb_layers.1",
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "up_blocks.0.resnets.1.time_emb_proj": "output_blocks.1.0.emb_layers.1",
        "up_blocks.0.resnets.1.conv_shortcut": "output_blocks.1.0.skip_connection",
        "time_embedding.linear_2": "time_embed.2",
    }
    (found,) = (theirs for ours, theirs in blocks.items() if layer.startswith(ours))
    return found + layer.removeprefix(next(ours for ours in blocks if layer.startswith(ours)))


OTHER_LAYERS = (
    "down_blocks.1.resnets.0.time_emb_proj",
    "mid_block.resnets.1.time_emb_proj",
    "up_blocks.0.resnets.1.time_emb_proj",
    "up_blocks.0.resnets.1.conv_shortcut",  # a 1x1 convolution
    "time_embedding.linear_2",
)


def layer_pairs(collection):
    """{layer: (A [rank, in], B [out, rank])} in torch's axis order."""
    flat = traverse_util.flatten_dict(collection)
    pairs = {path[:-1]: (flat[*path[:-1], "A"], flat[*path[:-1], "B"]) for path in flat}
    return {".".join(path): tuple(np.asarray(x).T.reshape(x.shape[::-1][:2]) for x in ab) for path, ab in pairs.items()}


@pytest.fixture(scope="module")
def wide_lora(params):
    """On attention, feed-forward, 1x1 convolutions (proj_in) and more; ranks 2 and 3."""
    targets = (*lora.TARGETS, "ff.net.0.proj", "ff.net.2", "proj_in")
    flat, kernels = {}, traverse_util.flatten_dict(params)
    rng = np.random.default_rng(3)
    for path, kernel in kernels.items():
        if path[-1] == "kernel" and (path[-2] in targets or ".".join(path[:-1]) in OTHER_LAYERS):
            rank, (*lead, fan_in, fan_out) = 2 + (path[-2] == "to_q"), kernel.shape
            for leaf, shape in (("A", (*lead, fan_in, rank)), ("B", (*lead, rank, fan_out))):
                flat[*path[:-1], leaf] = rng.standard_normal(shape).astype(np.float32) / 3
    return traverse_util.unflatten_dict(flat)


def old_processor_name(layer):
    block, _, projection = layer.rpartition(".to_")
    return f"{block}.processor.to_{projection.removesuffix('.0')}_lora" if block else f"{layer}.lora"


@pytest.mark.parametrize("style", ["kohya", "kohya_original_blocks", "processors", "peft"])
def test_names_of_other_programs(params, wide_lora, tmp_path, style):
    tensors, ranks = {}, {}
    for layer, (a, b) in layer_pairs(wide_lora).items():
        ranks[layer] = len(a)
        conv = (1, 1) if layer.endswith(("proj_in", "conv_shortcut")) else ()
        a, b = a.reshape(*a.shape, *conv), b.reshape(*b.shape, *conv)
        if style.startswith("kohya"):
            name = "lora_unet_" + (original_names(layer) if "original" in style else layer).replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
            tensors[f"{name}.alpha"] = np.float16(len(a) / 2)  # twice as weak as without it
        elif style == "processors":
            name = old_processor_name(layer)
            tensors |= {f"unet.{name}.down.weight": a, f"unet.{name}.up.weight": b}
        else:
            tensors |= {f"unet.{layer}.lora_A.weight": a, f"unet.{layer}.lora_B.weight": b}
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, tmp_path / "lora.safetensors")
    loaded, scale = lora.load_lora(tmp_path / "lora.safetensors", params)
    assert set(ranks.values()) == {2, 3}
    assert scale == (0.5 if style.startswith("kohya") else 1.0)
    assert_equal_trees(loaded, wide_lora)


def test_an_alpha_for_each_layer_goes_into_b(params, tmp_path):
    collection = random_lora(params)
    lora.save_lora(tmp_path / "lora.safetensors", collection, alpha=6.0)
    header = {"unet.r": RANK, "unet.lora_alpha": 6.0, "unet.alpha_pattern": {"attn2.to_k": 1.5}}
    path = tmp_path / "pattern.safetensors"
    save_file(load_file(tmp_path / "lora.safetensors"), path, {"lora_adapter_metadata": json.dumps(header)})
    loaded, scale = lora.load_lora(path, params)
    assert scale == 1.0
    for layer, value in traverse_util.flatten_dict(loaded).items():
        factor = 1 if layer[-1] == "A" else 0.5 if "attn2" in ".".join(layer) and layer[-2] == "to_k" else 2
        np.testing.assert_array_equal(value, factor * traverse_util.flatten_dict(collection)[layer])


def test_text_encoder_tensors_are_left_out_with_a_warning(params, tmp_path, caplog):
    collection, path = random_lora(params), tmp_path / "lora.safetensors"
    lora.save_lora(path, collection, alpha=3.0)
    text = {
        f"{prefix}{layer}.weight": np.zeros((3, 8), np.float32)
        for prefix, layer in (
            ("text_encoder.text_model.encoder.layers.0.self_attn.", "q_proj.lora_A"),
            ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj.", "lora_down"),
        )
    }
    save_file(load_file(path) | text, path)
    assert_equal_trees(lora.load_lora(path, params)[0], collection)
    assert f"{path}: 2 tensors for the text encoders are left out" in caplog.text
    save_file(text, path)
    with pytest.raises(InputError, match="holds no LoRA of a UNet, only 2 text encoder tensors"):
        lora.load_lora(path, params)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 1, 1), (3, 4, 5, 5)])
def test_a_convolution_of_another_size(params, tmp_path, shape):
    tensors = {"lora_unet_conv_in.lora_down.weight": np.zeros(shape, np.float32)}
    tensors["lora_unet_conv_in.lora_up.weight"] = np.zeros((8, 3, 1, 1), np.float32)
    message = wrong_file(tmp_path, params, lambda t: t.update(tensors))
    assert f"lora_down.weight has shape {shape}, the model's layer 4 -> 8 (3x3)" in message


def test_starting_from_a_file_does_what_the_file_does(params, wide_lora, tmp_path):
    key, path = jax.random.key(5), tmp_path / "lora.safetensors"
    assert_equal_trees(lora.initial_lora(key, params, rank=4, alpha=2.0), lora.init_lora(key, params, rank=4))
    tensors = {}
    for layer, (a, b) in layer_pairs(wide_lora).items():
        tensors |= {f"unet.{layer}.lora_A.weight": a, f"unet.{layer}.lora_B.weight": b}
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)
    start = lora.initial_lora(key, params, rank=4, alpha=2.0, path=path)
    assert {x.shape[-1] for p, x in traverse_util.flatten_dict(start).items() if p[-1] == "A"} == {4}
    ours, theirs = run(params, start, scale=2.0 / 4), run(params, wide_lora)
    assert_close_and_not_a_no_op(ours, theirs, run(params))
    with pytest.raises(InputError, match="lora.rank=2: .* has rank 3; wants that or more"):
        lora.initial_lora(key, params, rank=2, alpha=2.0, path=path)

    lora.save_lora(path, start, alpha=2.0)  # with its 1x1 convolutions back to diffusers
    theirs = their_unet(params)
    pipeline(theirs).load_lora_weights(path)
    assert_close_and_not_a_no_op(ours, their_output(theirs), run(params))


def test_every_target_goes_to_diffusers_and_back(params, tmp_path):
    """Feed-forward layers, projections and 3x3 convolutions of each stride, by the file that a run writes."""
    collection = random_lora(params, rank=2, targets=lora.target_layers(tuple(LORA_TARGETS), LORA_TARGETS))
    lora.save_lora(tmp_path / lora.LORA_FILE, collection, alpha=3.0)
    loaded, scale = lora.load_lora(tmp_path, params)
    assert_equal_trees(loaded, collection)
    layers = [".".join(path[:-1]) for path in traverse_util.flatten_dict(collection)]
    for end in (
        "ff.net.0.proj",
        "proj_out",
        "resnets.1.conv2",
        "conv_shortcut",
        "downsamplers.0.conv",
        "upsamplers.0.conv",
    ):
        assert any(layer.endswith(end) for layer in layers), end
    theirs = their_unet(params)
    pipeline(theirs).load_lora_weights(tmp_path)
    assert_close_and_not_a_no_op(run(params, collection, scale=scale), their_output(theirs), run(params))
    of_attention = {path: x for path, x in traverse_util.flatten_dict(collection).items() if path[-2] in lora.TARGETS}
    theirs = run(params, traverse_util.unflatten_dict(of_attention), scale=scale)
    assert np.abs(theirs - run(params, collection, scale=scale)).max() > 1e-2 * np.abs(theirs).max()
