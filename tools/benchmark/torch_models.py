"""The models of benchmark.py's other side: diffusers' networks, what they read of the prompts, and their steps."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffexp_jax.pipelines import sizes

EMOJI = Path(__file__).resolve().parents[2] / "diffexp_jax" / "emoji" / "assets" / "model"
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
# Not the second attention's, which is the image's alone
MMDIT_TARGETS = [f"attn.{layer}" for layer in (*UNET_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
VAE_DEFAULTS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
VAE_DEFAULTS |= {"force_upcast": False}
# What diffusers' config of SDXL also says; ours takes it from the shapes.
PROJECTION = {"stabilityai/stable-diffusion-xl-base-1.0": {"projection_class_embeddings_input_dim": 2816}}

# ----------------------------------------------------------------------------------------------------------- the steps


class Step(NamedTuple):
    """`move(x, out)` is the mean of p(x_{t-1} | x_t), of the guided output; `std` that of its noise."""

    t: float
    std: float
    move: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def ddim_steps(n: int, eta: float) -> Iterator[Step]:
    """DDIM's on Stable Diffusion's noise schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a = torch.cumprod(1 - betas, 0)
    for i in reversed(range(n)):
        t = i * (1000 // n) + 1
        prev = t - 1000 // n
        a_t, a_prev = float(a[t]), float(a[prev] if prev >= 0 else a[0])
        std = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)) ** 0.5
        yield Step(t, std, partial(_ddim, a_t=a_t, a_prev=a_prev, std=std))


def _ddim(x: torch.Tensor, eps: torch.Tensor, *, a_t: float, a_prev: float, std: float) -> torch.Tensor:
    x_0 = (x - (1 - a_t) ** 0.5 * eps) / a_t**0.5
    return a_prev**0.5 * x_0 + (1 - a_prev - std**2) ** 0.5 * eps


def flow_steps(n: int, eta: float, *, shift: float = 3.0) -> Iterator[Step]:
    """Those of flow matching with Flow-GRPO's noise, on Stable Diffusion 3's levels."""

    def shifted(s):
        return shift * s / (1 + (shift - 1) * s)

    levels = shifted(torch.linspace(1.0, shifted(1 / 1000), n, dtype=torch.float64)).tolist()
    for s, after in zip(levels, [*levels[1:], 0.0], strict=True):
        g = eta * (s / (1 - (s if s < 1 else levels[1]))) ** 0.5
        move = partial(_flow, s=s, ds=after - s, drift=g**2 / (2 * s))
        yield Step(1000 * s, g * (s - after) ** 0.5, move)


def _flow(x: torch.Tensor, v: torch.Tensor, *, s: float, ds: float, drift: float) -> torch.Tensor:
    return x + (v + drift * (x + (1 - s) * v)) * ds


# ---------------------------------------------------------------------------------------------------------- the models


class Parts(NamedTuple):
    """A model, and what its network reads of the prompts, by its own names."""

    network: Any
    vae: Any
    cond: dict[str, torch.Tensor]  # [P, ...]
    uncond: dict[str, torch.Tensor]  # of "", [1, ...]
    added: dict[str, torch.Tensor]  # the same for all prompts, [1, ...]: SDXL's `added_cond_kwargs`
    steps: Callable[[int, float], Iterator[Step]]  # of (their number, eta)
    targets: list[str]  # layers with a LoRA


@torch.no_grad()
def of_folder(folder: Path, texts: list[str]) -> Parts:
    """A pipeline's parts, and its prompts encoded: of Stable Diffusion 1.x, or of 3 without T5."""
    if (folder / "transformer").is_dir():
        without = {"text_encoder_3": None, "tokenizer_3": None}
        pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32, **without)
        rows, _, pooled, _ = pipe.encode_prompt([*texts, ""], None, None, do_classifier_free_guidance=False)
        return _flow_parts(pipe.transformer, pipe.vae, rows, pooled)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    ids = [pipe.tokenizer(t, padding="max_length", return_tensors="pt").input_ids for t in [*texts, ""]]
    return _unet_parts(pipe.unet, pipe.vae, torch.cat([pipe.text_encoder(x).last_hidden_state for x in ids]), {})


def random_parts(name: str, texts: list[str], device: str) -> Parts:
    """A published model's sizes with random weights and embeddings; SDXL's pooled ones are the same for all."""
    _, configs = sizes.PIPELINES[name]
    with torch.device(device):
        vae, n = diffusers.AutoencoderKL.from_config(VAE_DEFAULTS | configs["vae"]), len(texts) + 1
        if "transformer" in configs:
            network = diffusers.SD3Transformer2DModel.from_config(configs["transformer"])
            rows = torch.randn(n, 77 + 256, network.config.joint_attention_dim)  # CLIP's and T5's tokens, as published
            return _flow_parts(network, vae, rows, torch.randn(n, network.config.pooled_projection_dim))
        unet = diffusers.UNet2DConditionModel.from_config(configs["unet"] | PROJECTION.get(name, {}))
        added = {}
        if unet.config.addition_embed_type == "text_time":
            side = 8.0 * unet.config.sample_size
            added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.tensor([[side, side, 0, 0, side, side]])}
        return _unet_parts(unet, vae, torch.randn(n, 77, unet.config.cross_attention_dim), added)


def _unet_parts(unet: Any, vae: Any, rows: torch.Tensor, added: dict[str, torch.Tensor]) -> Parts:
    """`rows` are the prompts' embeddings, and last that of ""."""
    cond, uncond = ({"encoder_hidden_states": x} for x in (rows[:-1], rows[-1:]))
    return Parts(unet, vae, cond, uncond, added, ddim_steps, UNET_TARGETS)


def _flow_parts(network: Any, vae: Any, rows: torch.Tensor, pooled: torch.Tensor) -> Parts:
    """As `_unet_parts`; `pooled` are the prompts' too."""
    cond, uncond = (
        {"encoder_hidden_states": rows[part], "pooled_projections": pooled[part]}
        for part in (slice(-1), slice(-1, None))
    )
    return Parts(network, vae, cond, uncond, {}, flow_steps, MMDIT_TARGETS)


# ------------------------------------------------------------------------------------------------------ random folders

MID_UNET = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 384, 384),
    "layers_per_block": 1,
    "cross_attention_dim": 256,
    "attention_head_dim": 8,
}
MID_MMDIT = {
    "sample_size": 32,
    "num_layers": 8,
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "caption_projection_dim": 384,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 256,
    "pos_embed_max_size": 32,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0, 1, 2, 3),
}
MID_VAE = {
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "sample_size": 256,
}
FLOW_VAE = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
FLOW_VAE |= {"use_quant_conv": False, "use_post_quant_conv": False}


def write_mid(folder: Path) -> None:
    """A random pipeline of SD 1.5's shape with the emoji tokenizer."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(EMOJI, torch_dtype=torch.float32)
    torch.manual_seed(0)
    mid = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(**MID_UNET),
        vae=diffusers.AutoencoderKL(**MID_VAE),
        text_encoder=CLIPTextModel(_text_config(pipe, 256)),
        tokenizer=pipe.tokenizer,
        scheduler=pipe.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    mid.save_pretrained(folder)


def write_mid_sd3(folder: Path, **changes: Any) -> None:
    """A random pipeline of SD 3.5's shape with the emoji tokenizer and no T5; `changes` are of its transformer."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(EMOJI, torch_dtype=torch.float32)
    torch.manual_seed(0)
    config = MID_MMDIT | changes
    texts = [_text_config(pipe, config["joint_attention_dim"] // 2) for _ in range(2)]  # their widths add up
    mid = diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(**config),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKL(**(MID_VAE | FLOW_VAE)),
        text_encoder=CLIPTextModelWithProjection(texts[0]),
        tokenizer=pipe.tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(texts[1]),
        tokenizer_2=pipe.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    mid.save_pretrained(folder)


WRITERS = {"mid": write_mid, "mid_sd3": write_mid_sd3}


def _text_config(pipe: Any, width: int) -> CLIPTextConfig:
    """Two layers of this width, for the pipeline's tokenizer."""
    old = pipe.text_encoder.config
    kept = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    widths = {"hidden_size": width, "projection_dim": width, "intermediate_size": 2 * width}
    return CLIPTextConfig(
        **widths, num_hidden_layers=2, num_attention_heads=4, **{key: getattr(old, key) for key in kept}
    )
