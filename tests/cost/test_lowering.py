"""Every program of a run lowers for NVIDIA GPUs (with cuDNN's attention) and for TPUs (with jax's), which are not here.

Tracing and lowering are the real ones, with jax's own checks of shapes and types; replaced is only the detection of the
device. The models have the published topologies, lengths (77 tokens, 4096 pixels; 257 and 197 patches) and widths of
heads that cuDNN takes; there are fewer layers, and no weights. The slow tests at the end have the real sizes.
"""

import functools
import importlib
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import alignprop, ddpo
from diffexp_jax import parallel
from diffexp_jax.algorithms import METHODS
from diffexp_jax.cost import dry_run
from diffexp_jax.experiment import Experiment
from diffexp_jax.models import attention, blip
from diffexp_jax.models import sizes as clip_sizes
from diffexp_jax.pipelines import sizes
from diffexp_jax.programs import make_explore
from diffexp_jax.rewards import load_reward
from diffexp_jax.settings import checked
from tests.support.absent import believe, lower

HALF = ("bfloat16", "float16")
# The kernels of attention, and of its gradient; a TPU's is for bfloat16
FUSED = {"gpu": ("__cudnn$fmha", "__cudnn$fmhaSoftmaxBackward"), "tpu": ("splash_mha_fwd", "splash_mha_dkv")}
UNET = {"block_out_channels": [64, 64], "layers_per_block": 1, "in_channels": 4, "out_channels": 4, "sample_size": 64}
UNET |= {"norm_num_groups": 8}
VAE = {"block_out_channels": [8] * 4, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"max_position_embeddings": 77, "hidden_act": "quick_gelu", "projection_dim": 16, "vocab_size": 49408}
TEXT |= {"eos_token_id": 2}
ATTENTION = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
ATTENTION |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
SDXL = {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "sample_size": 128, "use_linear_projection": True}
SDXL |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 2]}
SDXL |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "cross_attention_dim": 64}
PARTS = {  # family: its UNet and text encoders
    "sd15": (UNET | ATTENTION | {"attention_head_dim": 8, "cross_attention_dim": 32}, [TEXT]),
    "sd2": (
        UNET | ATTENTION | {"attention_head_dim": [1, 1], "cross_attention_dim": 32, "use_linear_projection": True},
        [TEXT | {"hidden_act": "gelu"}],
    ),
    "sdxl": (UNET | SDXL | {"attention_head_dim": [1, 1]}, [TEXT, TEXT | {"hidden_act": "gelu"}]),
}
CLIP = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "hidden_act": "gelu"}
CLIP_L14 = {
    "text_config": CLIP | {"hidden_size": 64, "projection_dim": 64, "vocab_size": 49408},
    "vision_config": CLIP | {"hidden_size": 64, "image_size": 224, "patch_size": 14},
    "projection_dim": 768,
}


def pipeline(family):
    """model_index.json and the config.json files of a small model of the family."""
    unet, texts = PARTS[family]
    scheduler = sizes._SCHEDULER | ({"prediction_type": "v_prediction"} if family == "sd2" else {})
    names = ("text_encoder", "text_encoder_2")[: len(texts)]
    kind = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    parts = {"unet": unet, "vae": VAE | {"force_upcast": family == "sdxl"}, "scheduler": scheduler}
    return {"_class_name": kind}, parts | dict(zip(names, texts, strict=True))


@pytest.fixture
def gpu(monkeypatch):
    believe(monkeypatch, "gpu")
    return "gpu"


@pytest.fixture
def tpu(monkeypatch):
    believe(monkeypatch, "tpu")
    return "tpu"


@pytest.fixture(params=["gpu", "tpu"])
def device(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def small_sizes(monkeypatch):
    """The built-in sizes of models and rewards, with fewer layers."""
    for family in PARTS:
        monkeypatch.setitem(sizes.PIPELINES, family, pipeline(family))
    monkeypatch.setattr(clip_sizes, "CLIP_L14", CLIP_L14)
    monkeypatch.setattr(clip_sizes, "CLIP_H14", CLIP_L14)
    one_layer = functools.partial(blip.BLIPConfig, vision_layers=1, num_hidden_layers=1)
    monkeypatch.setattr(blip, "BLIPConfig", one_layer)


def lower_all(device, config, *, without=()) -> dict[str, str]:
    """{name: text} of every program of the run, but for those named."""
    experiment = Experiment.build(checked(config), weights=False)
    texts = {
        name: lower(device, function, *args)
        for name, function, args, _ in dry_run.programs_of(experiment)
        if name not in without
    }
    texts["explore"] = lower(device, make_explore(experiment), *explored(config, experiment))
    return texts


def explored(config, experiment):
    n = config.batch.samples
    cond, units = jax.tree.map(lambda x: x[[0] * n], (experiment.train.cond, experiment.units))
    null = jax.tree.map(lambda x: np.broadcast_to(x, (n, *x.shape)), experiment.sampler.empty)
    return parallel.shard((cond, null, units, parallel.sample_keys(jax.random.key(0), n)), n)


def make(algorithm, family, dtype, **changes):
    config = {"ddpo": ddpo, "alignprop": alignprop}[algorithm].get_config()
    settings = {"model.path": family, "model.dtype": dtype, "batch.samples": 4, "batch.samples_per_forward": 1}
    settings |= {"reward": "aesthetic", "eval.rewards": (), "model.vae_slice": 1, "sampling.steps": 2}
    config.update_from_flattened_dict(settings | changes)
    return config


EVERY = {(algorithm, family, dtype) for algorithm in ("ddpo", "alignprop") for family in PARTS for dtype in HALF}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm, family, dtype", sorted(EVERY))
def test_programs_of_a_run(device, small_sizes, algorithm, family, dtype):
    texts = lower_all(device, make(algorithm, family, dtype))
    assert texts.keys() == {"update", "evaluate", "explore"} | ({"sample"} if algorithm == "ddpo" else set())
    fuses = {name: name != "explore" and (device == "gpu" or dtype == "bfloat16") for name in texts}
    assert {name: FUSED[device][0] in text for name, text in texts.items()} == fuses
    assert (FUSED[device][1] in texts["update"]) == fuses["update"]  # its gradient is fused too


@pytest.mark.parametrize("device", ["gpu", pytest.param("tpu", marks=pytest.mark.slow)], indirect=True)
def test_gradients_while_sampling(device, small_sizes):
    """DDPO in one pass: each sample's gradient by vmap, attention and its backward pass still fused."""
    config = make("ddpo", "sd15", "bfloat16", **{"ddpo.updates": 1})
    sampling, *_ = dry_run.programs_of(Experiment.build(checked(config), weights=False))
    assert sampling.name == "sample"
    assert FUSED[device][1] in lower(device, sampling.function, *sampling.args)


@pytest.mark.slow
def test_an_odd_length_would_not_have_a_gradient(small_sizes, monkeypatch, request):
    """What these tests are for: without the padding, jax refuses a prompt of 77 tokens."""
    monkeypatch.setattr(attention, "attention_of_even_length", jax.nn.dot_product_attention)
    request.getfixturevalue("gpu")
    with pytest.raises(NotImplementedError, match="Unsupported sequence length Q 4096, KV 77"):
        lower_all("gpu", make("alignprop", "sd15", "bfloat16"))


@pytest.mark.slow
@pytest.mark.parametrize("device", ["gpu", "tpu"], indirect=True)
@pytest.mark.parametrize("algorithm", ["ddpo", "alignprop"])
def test_the_emoji_world(device, algorithm):
    """The quickstart, and its like by DDPO, as they are configured: bfloat16 on such devices."""
    module = {"ddpo": ddpo, "alignprop": alignprop}[algorithm]
    texts = lower_all(device, module.get_config("model=emoji,explore=true"))
    assert all("bf16" in texts[name] for name in texts.keys() - {"explore"})


REWARDS = ("aesthetic", "pickscore", "hpsv2", "imagereward")  # 257, 257 and 77, the same, 197 and 35 tokens
REWARDS += ("textnorm(pickscore)", "textnorm(imagereward)", "emoji_pickscore", "emoji_aesthetic", "emoji_judge")
ALIKE = {"textnorm(imagereward)", "emoji_aesthetic", "emoji_judge"}  # by the same networks as another


@pytest.mark.parametrize(
    "device, dtype",
    [
        pytest.param(*case, marks=[] if case == ("gpu", "bfloat16") else pytest.mark.slow)
        for case in itertools.product(("gpu", "tpu"), ("float32", "bfloat16", "float16"))
    ],
    indirect=["device"],
)
@pytest.mark.parametrize("spec", [pytest.param(x, marks=[pytest.mark.slow] * (x in ALIKE)) for x in REWARDS])
def test_rewards(device, small_sizes, spec, dtype):
    """Scores, their gradient in the image, and the published path."""
    reward = load_reward(spec, dtype=dtype, shapes_only=True)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), reward.params)
    tokens = reward.tokenize(["a dog riding a bike"])
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)

    def slope(params, images, tokens):
        return jax.grad(lambda images: reward.score(params, images, tokens)[0].sum())(images)

    pixels = jax.tree.map(lambda x: x[None], reward.prepare(np.zeros((64, 64, 3), np.uint8)))
    for function, seen in ((reward.score, images), (slope, images), (reward.score_prepared, pixels)):
        found = products(lower(device, jax.jit(function), params, seen, tokens))
        if function is slope and spec == "emoji_judge":
            assert not found  # made of argmaxes, it has no gradient
        else:
            assert found and (found == {"HIGHEST"}) == (dtype == "float32")  # else TF32, or a pass of bfloat16


def products(text: str) -> set[str]:
    """The precisions that the program asks for, of its matrix products and convolutions."""
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line or "stablehlo.convolution" in line]
    return {precision for line in lines for precision in re.findall(r"HIGHEST|HIGH|DEFAULT", line) or ["DEFAULT"]}


@pytest.mark.parametrize("device", ["gpu", pytest.param("tpu", marks=pytest.mark.slow)], indirect=True)
def test_float32_networks_multiply_in_full(device, small_sizes):
    """By default; another setting is what the program asks for."""
    config = make("ddpo", "sd15", "float32")
    (_, function, args, _), *_ = dry_run.programs_of(Experiment.build(checked(config), weights=False))
    full = lower(device, function, *args).count("precision = [HIGHEST, HIGHEST]")
    config = make("ddpo", "sd15", "float32", **{"model.matmul_precision": "tensorfloat32", "reward_dtype": "bfloat16"})
    (_, function, args, _), *_ = dry_run.programs_of(Experiment.build(checked(config), weights=False))
    text = lower(device, function, *args)
    assert text.count("precision = [HIGH, HIGH]") > 20
    lora = text.count("precision = [HIGHEST, HIGHEST]")  # LoRA's own products are always in full
    assert 0 < lora < full - 20


# ---------------------------------------------------------------------------------------------------------- real sizes

HEADS = {  # queries, keys, heads, width of a head
    "SD 1.5, 4096 to 77": (4096, 77, 8, 40),
    "SD 1.5, 1024 to 1024": (1024, 1024, 8, 80),
    "SD 2.1, 9216 to 77": (9216, 77, 5, 64),
    "SDXL, 4096 to 77": (4096, 77, 10, 64),
    "SD 3.5 medium, 4429 to 4429": (4429, 4429, 24, 64),  # image, CLIP's 77 and T5's 256 tokens
    "FLUX, 4608 to 4608": (4608, 4608, 24, 128),  # image and T5's 512
    "CLIP, 577 to 577": (577, 577, 16, 64),
}
OF_ONE_KERNEL = {"SD 2.1, 9216 to 77", "SDXL, 4096 to 77"}  # the same as of another
BATCHED = {"all": (0, 0, 0), "queries": (0, None, None), "keys and values": (None, 0, 0), "values": (None, None, 0)}


@pytest.mark.parametrize("batched", BATCHED)
@pytest.mark.parametrize("shape", [pytest.param(x, marks=[pytest.mark.slow] * (x in OF_ONE_KERNEL)) for x in HEADS])
def test_attention_under_vmap(device, shape, batched):
    """Of each sample a gradient of its own, as DDPO makes it in one pass: jax's rules take what is batched or not."""
    n_queries, n_keys, heads, width = HEADS[shape]

    def slope(q, k, v):
        return jax.grad(lambda *qkv: attention.attention(*qkv, heads).astype(jnp.float32).sum(), argnums=(0, 1, 2))(
            q, k, v
        )

    axes = BATCHED[batched]
    args = [
        jax.ShapeDtypeStruct((*[2] * (axis == 0), 1, n, heads * width), jnp.bfloat16)
        for axis, n in zip(axes, (n_queries, n_keys, n_keys), strict=True)
    ]
    text = lower(device, jax.vmap(slope, in_axes=axes), *args)
    assert all(kernel in text for kernel in FUSED[device])


@pytest.mark.parametrize("precision", ["tensorfloat32", "float32"])
def test_attention_at_other_precisions(tpu, precision):
    """The kernel's products stay as they are: it refuses other precisions."""
    x = jax.ShapeDtypeStruct((1, 1024, 80), jnp.bfloat16)
    with jax.default_matmul_precision(precision):
        text = lower(tpu, jax.grad(lambda x: attention.attention(x, x, x, 2).astype(jnp.float32).sum()), x)
    assert all(kernel in text for kernel in FUSED["tpu"])


# Each method as published, and DDPO in one pass; with each model and device, and each of these with each of the others
CONFIGS = {name: importlib.import_module(f"configs.{name}") for name in (*METHODS, "grpo")}
ONE_PASS = {"ddpo.updates": 1, "ddpo.gradient": "onepass"}
VARIANTS = [(method, {}) for method in METHODS] + [("ddpo", ONE_PASS)]
MODELS, DEVICES, REMAT = ("sd15", "sd21", "sdxl"), ("gpu", "tpu"), ("none", "step", "block")
PUBLISHED = ("aesthetic", "pickscore", "hpsv2", "imagereward", "hpsv2+aesthetic+pickscore", "textnorm(imagereward)")
REAL_SIZES = [
    pytest.param(*variant, model, device, REMAT[(i + j + k) % 3], PUBLISHED[(i + 2 * j + k) % 6])
    for i, variant in enumerate(VARIANTS)
    for j, model in enumerate(MODELS)
    for k, device in enumerate(DEVICES)
]
REAL_SIZES += [
    pytest.param(method, changes, "sd35m", device, remat, "pickscore")
    for method, changes, remat in (
        ("ddpo", {}, "block"),
        ("ddpo", ONE_PASS, "block"),
        ("grpo", {}, "block"),
        ("draft", {}, "step"),
        ("alignprop", {}, "block"),
    )
    for device in DEVICES
]
REAL_SIZES += [
    pytest.param("ddpo", {}, "flux", "gpu", "block", "pickscore"),
    pytest.param("ddpo", ONE_PASS, "flux", "tpu", "block", "pickscore"),
    pytest.param("grpo", {}, "flux", "tpu", "block", "pickscore"),
    pytest.param("alignprop", {}, "flux", "tpu", "block", "pickscore"),
    pytest.param("draft", {}, "flux_schnell", "tpu", "block", "aesthetic"),
    pytest.param("nft", {}, "flux", "gpu", "block", "pickscore"),
    pytest.param("awm", {}, "flux", "tpu", "block", "pickscore"),
]
# What is off by default and changes a program
ADDITIONS = [
    ("ddpo", {"ddpo.kl_weight": 0.01, "optim.ema": 0.9}),
    ("ddpo", {"ddpo.proportionate": True}),
    ("ddpo", {"ddpo.keep": 0.5, "batch.group": 4, "ddpo.updates": 1}),
    ("ddpo", {"reward": "textnorm(pickscore)+textnorm(hpsv2)", "textnorm.uncertainty": 0.5}),
    ("alignprop", {"alignprop.kl_weight": 0.01, "sampling.eta": 1.0}),
    ("draft", {"draft.kl_weight": 0.01, "draft.lv_samples": 2, "sampling.eta": 1.0}),
    ("entropy", {"entropy.start": True, "sampling.eta": 0.5}),
    ("rwr", {"rwr.prior_weight": 0.5, "rwr.weighting": "quantile"}),
    ("seiko", {"seiko.optimism": "bootstrap"}),
    ("seiko", {"seiko.features": "pickscore", "seiko.reads_text": True}),
]
REAL_SIZES += [
    pytest.param(*addition, "sd15", device, "step", "pickscore") for addition in ADDITIONS for device in DEVICES
]


@pytest.mark.slow  # half a minute to two each
@pytest.mark.parametrize("name, changes, model, device, remat, reward", REAL_SIZES, indirect=["device"])
def test_real_sizes(device, name, changes, model, remat, reward):
    """Every program of every method, of the published models and rewards in all their layers, as configs/ has them."""
    config = CONFIGS[name].get_config(f"model={model},reward={reward},prompts=animals")
    method, few = config.algorithm, {"model.remat": remat, "eval.rewards": (), "batch.samples": 4}
    few["batch.samples_per_forward"] = min(config.batch.samples_per_forward, 2)
    if config[method].get("updates", 1) > 2:  # of dpok 32, of two images each
        few[f"{method}.updates"] = 2
    if name == "grpo":  # two updates of a group each
        few |= {"batch.group": 4, "batch.samples": 8}
    elif METHODS[method]().compares_groups:
        few |= {"batch.group": 4, f"{method}.updates": 1}
    if METHODS[method].needs.features:
        few |= {f"{method}.features": "aesthetic", f"{method}.updates": 1}
    config.update_from_flattened_dict(few | changes)
    evaluates = method == "ddpo"  # it is the same for all
    texts = lower_all(device, config, without=() if evaluates else ("evaluate",))
    programs = {"update"} if METHODS[method].needs.reward_gradient else {"sample", "update"}
    assert texts.keys() == programs | {"explore"} | ({"evaluate"} if evaluates else set())
    where = "sample" if changes == ONE_PASS else "update"  # where the gradient is made
    assert FUSED[device][1] in texts[where]
