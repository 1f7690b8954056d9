"""Tiny pipelines that diffusers makes, of each family; and ours beside them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffexp_jax.emoji.tokenizer import write_tokenizer
from diffexp_jax.models import lora
from diffexp_jax.pipelines import Pipeline, load_pipeline
from diffexp_jax.sampling import rollout

PROMPTS = ["a dog riding a bike", "an ant"]
SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
SD15 |= {"set_alpha_to_one": False, "steps_offset": 1}
ATTENTION = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
ATTENTION |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
FAMILIES = {
    "sd15": (
        "StableDiffusionPipeline",
        dict(attention_head_dim=2, cross_attention_dim=16, **ATTENTION),
        [dict(hidden_size=16, hidden_act="quick_gelu")],
        dict(SD15),
    ),
    "sd2": (
        "StableDiffusionPipeline",
        dict(attention_head_dim=[1, 2], cross_attention_dim=24, use_linear_projection=True, **ATTENTION),
        [dict(hidden_size=24, hidden_act="gelu", projection_dim=10)],
        dict(SD15, prediction_type="v_prediction"),
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        dict(
            attention_head_dim=[1, 2],
            cross_attention_dim=40,
            transformer_layers_per_block=[1, 2],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=6,
            projection_class_embeddings_input_dim=6 * 6 + 12,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        [dict(hidden_size=16, hidden_act="quick_gelu"), dict(hidden_size=24, hidden_act="gelu", projection_dim=12)],
        dict(SD15),
    ),
}


class Both(NamedTuple):
    theirs: Any  # diffusers' pipeline
    ours: Pipeline  # our model of its files
    folder: Path
    sample: Callable  # ours, compiled


def both_of(theirs, folder: Path, **options) -> Both:
    """diffusers' pipeline, whose files are written to the folder, and ours of them, by these options."""
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder)
    ours = load_pipeline(folder, **options)
    return Both(theirs, ours, folder, sampler(ours))


def sampler(model: Pipeline) -> Callable:
    """A compiled program (params, lora, x_T, context, steps, keys) -> images."""

    @jax.jit
    def sample(params, collection, x_T, context, steps, keys):
        denoise = functools.partial(model.network(), params, collection)  # at any guidance
        x_0, _ = rollout(model.process, denoise, x_T, context, steps, keys)
        return model.decode(params, x_0).clip(0.0, 1.0)

    return sample


def saved_lora(model: Pipeline, folder: Path, targets: list[str]) -> Any:
    """A LoRA of rank 3 and alpha 1.5 that does something, and is in a file in the folder."""
    rng, layers = np.random.default_rng(2), lora.target_layers(targets, model.lora_targets)
    start = lora.init_lora(jax.random.key(0), model.base, rank=3, targets=layers)
    collection = jax.tree.map(lambda x: np.asarray(x) + rng.standard_normal(x.shape, np.float32) / 8, start)
    lora.save_lora(folder / lora.LORA_FILE, collection, alpha=1.5, prefix=model.lora_prefix)
    return collection


def tokenizers(folder, n):
    """As published: the second tokenizer differs by its padding."""
    from transformers import CLIPTokenizer

    write_tokenizer(folder)
    return [CLIPTokenizer.from_pretrained(folder, **({"pad_token": "!"} if i else {})) for i in range(n)]


def pipeline(name, folder):
    """diffusers' pipeline of random weights."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    kind, unet, text, scheduler = FAMILIES[name]
    tokens = tokenizers(folder, len(text))
    sizes = dict(intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=32)
    sizes |= dict(vocab_size=len(tokens[0]), eos_token_id=tokens[0].eos_token_id, initializer_range=0.3)
    texts = [CLIPTextConfig(**sizes, **more) for more in text]
    parts = {
        "unet": diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **unet
        ),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, scaling_factor=0.5,
        ),
        "text_encoder": CLIPTextModel(texts[0]),
        "tokenizer": tokens[0],
        "scheduler": diffusers.DDIMScheduler(**scheduler),
    }  # fmt: skip
    with torch.no_grad():
        for parameter in [*parts["unet"].parameters(), *parts["vae"].parameters()]:
            parameter += 0.05 * torch.randn_like(parameter)
    if len(texts) > 1:
        return diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=CLIPTextModelWithProjection(texts[1]), tokenizer_2=tokens[1], add_watermarker=False
        )
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
