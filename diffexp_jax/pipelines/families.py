"""What the json files of a pipeline folder say, and which families of pipelines there are.

Nothing outside of this file asks for a family's name: what differs between Stable Diffusion 1.x, 2.x and XL is in
`Family` and in the configs.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from absl import logging
from jax.typing import DTypeLike

from diffexp_jax.errors import InputError
from diffexp_jax.formats import files
from diffexp_jax.formats.config_keys import shown
from diffexp_jax.models.clip import CLIPTextConfig, TextTransformer, TextTransformerWithProjection
from diffexp_jax.models.unet import UNetConfig
from diffexp_jax.models.vae import VAEConfig
from diffexp_jax.pipelines.parts import read_configs


class Family(NamedTuple):
    """How the pipelines of one class are put together; everything else is in their configs."""

    text_encoders: Mapping[str, type]  # subfolder -> network; the last one gives the pooled embedding
    tokenizers: tuple[str, ...]  # subfolders, one per text encoder
    hidden: str  # field of clip.TextOutput that conditions the UNet, of all encoders side by side
    added: bool  # the UNet also takes the pooled embedding and the time ids
    zero_uncond: bool  # default of model_index.json's force_zeros_for_empty_prompt
    old_configs: bool  # diffusers' pipeline corrects what files of its first versions say
    latent_statistics: bool  # diffusers' pipeline takes the VAE's latents_mean and latents_std

    @property
    def parts(self) -> tuple[str, ...]:
        return "unet", "vae", *self.text_encoders, *self.tokenizers, "scheduler"


# by the `_class_name` of model_index.json; SD 2.x is the first, with another text encoder and prediction type
FAMILIES = {
    "StableDiffusionPipeline": Family(
        {"text_encoder": TextTransformer},
        ("tokenizer",),
        "last_hidden_state",
        added=False,
        zero_uncond=False,
        old_configs=True,
        latent_statistics=False,
    ),
    "StableDiffusionXLPipeline": Family(
        {"text_encoder": TextTransformer, "text_encoder_2": TextTransformerWithProjection},
        ("tokenizer", "tokenizer_2"),
        "penultimate",
        added=True,
        zero_uncond=True,
        old_configs=False,
        latent_statistics=True,
    ),
}


class ModelConfig(NamedTuple):
    """What the json files of a pipeline folder say."""

    family: Family
    unet: UNetConfig
    vae: VAEConfig
    text: tuple[CLIPTextConfig, ...]  # one per text encoder
    scheduler: Mapping[str, Any]
    zero_uncond: bool  # the unconditional embedding is zeros, not the encoders' of ""

    def dtype(self, part: str, dtype: DTypeLike) -> DTypeLike:
        """A part's dtype in a model of this one: SDXL's VAE overflows in float16; bfloat16 has float32's range."""
        # diffusers asks its SDXL pipelines alone for the key
        kept = part == "vae" and self.family.added and self.vae.force_upcast and jnp.dtype(dtype) == jnp.float16
        return jnp.float32 if kept else dtype


def model_config(index: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]], where: str = "model") -> ModelConfig:
    """The config of a pipeline.

    Args:
      index: model_index.json.
      parts: the config.json of "unet", "vae", "text_encoder", ..., and scheduler_config.json as "scheduler".
      where: the folder, for the errors.

    Raises:
      InputError: another family of pipelines, a variant that is not implemented, or parts that do not fit together.
    """
    family = _family(index, where)
    unet, vae = UNetConfig.from_dict(parts["unet"]), VAEConfig.from_dict(parts["vae"])
    if family.old_configs:
        unet = _at_true_size(unet, parts["unet"].get("_diffusers_version"), where)
    check_latents(vae, family)
    text = tuple(CLIPTextConfig.from_dict(parts[part], f"{part}/config.json") for part in family.text_encoders)
    width = sum(cfg.hidden_size for cfg in text)
    if unet.cross_attention_dim != width:
        raise InputError(
            f"{where}: the UNet wants text embeddings of width {unet.cross_attention_dim}, "
            f"{' + '.join(family.text_encoders)} give {width}"
        )
    if bool(unet.addition_time_embed_dim) != family.added:
        wanted = "wants" if family.added else "cannot have"
        raise InputError(f"{where}: a {index['_class_name']} {wanted} addition_time_embed_dim in unet/config.json")
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise InputError(
            f"{where}: the UNet has {unet.in_channels} input and {unet.out_channels} output channels, the VAE's "
            f"latents {vae.latent_channels}; wants the same (inpainting models are not supported)"
        )
    zero = index.get("force_zeros_for_empty_prompt", family.zero_uncond)
    if not isinstance(zero, bool):
        raise InputError(f"{where}: force_zeros_for_empty_prompt={shown(zero)}; accepted: true, false")
    return ModelConfig(family, unet, vae, text, parts["scheduler"], zero and family.zero_uncond)


_OLDER_THAN_0_9 = re.compile(r"0\.[0-8](\.|$)")


def _at_true_size(unet: UNetConfig, version: Any, where: str) -> UNetConfig:
    """SD 1.x as diffusers before 0.9 converted it says a smaller sample_size than the 64 that it was trained at."""
    small = isinstance(unet.sample_size, int) and unet.sample_size < 64
    if not (small and isinstance(version, str) and _OLDER_THAN_0_9.match(version)):
        return unet
    logging.warning(
        "%s: unet/config.json is of diffusers %s: its sample_size=%d is taken as 64, as diffusers does",
        where,
        version,
        unet.sample_size,
    )
    return unet.replace(sample_size=64)


def check_latents(vae: VAEConfig, family: Family) -> None:
    """Raises InputError where the VAE wants of its latents what diffusers' pipelines of this family do not do."""
    wanted = {"latents_mean": vae.latents_mean and not family.latent_statistics, "shift_factor": vae.shift_factor}
    for key, value in wanted.items():
        if value:
            raise InputError(
                f"vae/config.json: {key} is not supported in such a pipeline, where diffusers ignores it; wants the "
                "key removed, or null"
            )


def read_jsons(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """model_index.json of a folder and the configs of its parts, for `model_config`.

    Raises:
      InputError: another family of pipelines; or a file or subfolder is missing or broken.
    """
    index = files.read_json(folder / "model_index.json")
    family = _family(index, folder / "model_index.json")
    return index, read_configs(folder, family.parts, networks=("unet", "vae", *family.text_encoders))


def _family(index: Mapping[str, Any], where: str | Path) -> Family:
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(f"{where}: _class_name={shown(name)} is not supported; accepted: {', '.join(FAMILIES)}")
    return FAMILIES[name]
