"""LoRA: the collection, its files, and diffusers reading ours and we theirs."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from diffexp_jax.errors import InputError
from diffexp_jax.formats import convert
from diffexp_jax.models import lora
from diffexp_jax.models.unet import UNet, UNetConfig
from diffexp_jax.pipelines.stable_diffusion import LORA_TARGETS

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
X = jnp.asarray(RNG.standard_normal((2, 4, 4, 4)), jnp.float32)
T = jnp.array([981, 21])
CONTEXT = jnp.asarray(RNG.standard_normal((2, 5, 12)), jnp.float32)

unet = UNet(UNetConfig.from_dict(CONFIG))
apply = jax.jit(unet.apply)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    shapes = convert.abstract_params(unet, X, T, CONTEXT)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32) / 5, shapes)


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


@pytest.mark.parametrize("alpha", [float(RANK), 1.5])
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


# ---- files that others trained


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
