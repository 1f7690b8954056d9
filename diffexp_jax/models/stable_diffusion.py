"""A Stable Diffusion model as a bundle of pure functions, read from a folder in diffusers' pipeline format."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from diffexp_jax import InputError
from diffexp_jax.models import convert, files
from diffexp_jax.models.clip import CLIPTextConfig, TextTransformer, canonical_text_names
from diffexp_jax.models.unet import UNet, UNetConfig
from diffexp_jax.models.vae import AutoencoderKL, VAEConfig, in_slices

EMOJI = Path(__file__).parents[1] / "emoji" / "assets" / "model"  # the model that the package ships

_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


class StableDiffusion(NamedTuple):
    """Functions of (params, ...); `params` = {"unet", "vae", "text_encoder"} is an argument, never closed over."""

    params: dict[str, Any]
    tokenizer: Any  # transformers' CLIPTokenizer
    encode: Callable[[Any, Int[Array, "B L"]], Float[Array, "B L D"]]  # (params, token ids)
    unet: Callable[..., Float[Array, "B h w c"]]  # (params, lora or None, x_t, t, embedding, added)
    decode: Callable[[Any, Float[Array, "B h w c"]], Float[Array, "B H W 3"]]  # images in [0,1], not clipped
    scheduler_config: Mapping[str, Any]
    latent_shape: tuple[int, int, int]  # (h, w, c)


def load(
    path: str | Path, *, dtype: DTypeLike = jnp.float32, image_size: int | None = None, **kwargs
) -> StableDiffusion:
    """Loads a pipeline folder, or the shipped model for "emoji".

    Args:
      dtype: of the weights and the networks' arithmetic; timestep embeddings, norms and softmax stay float32.
      image_size: pixels of a square image's side; default: the size that the UNet was trained at.
      **kwargs: for `build`.

    Raises:
      InputError: a file is missing or broken, its tensors do not fit, or a config asks for what is not implemented.
    """
    folder = EMOJI if str(path) == "emoji" else Path(path)
    if not folder.is_dir():
        raise InputError(f"model {str(path)!r}: no such folder; accepted: emoji, or a folder in diffusers' format")
    files.read_json(folder / "model_index.json")
    for part in _PARTS:
        if not (folder / part).is_dir():
            raise InputError(f"{folder}: the subfolder {part}/ is missing; a pipeline has {', '.join(_PARTS)}")
    configs = {part: files.read_json(folder / part / "config.json") for part in ("unet", "vae", "text_encoder")}
    scheduler = files.read_json(folder / "scheduler" / "scheduler_config.json")
    unet_cfg, vae_cfg = UNetConfig.from_dict(configs["unet"]), VAEConfig.from_dict(configs["vae"])
    text_cfg = CLIPTextConfig.from_dict(configs["text_encoder"])
    size = unet_cfg.sample_size if image_size is None else image_size // vae_cfg.downsampling
    bundle = build(unet_cfg, vae_cfg, text_cfg, dtype=dtype, scheduler_config=scheduler, latent_size=size, **kwargs)
    rename = {"vae": modern_attention_names, "text_encoder": canonical_text_names}
    params = {}
    for part, shapes in abstract_params(unet_cfg, vae_cfg, text_cfg).items():
        tensors = files.open_weights(folder / part)
        tensors = rename.get(part, lambda t: t)(tensors)
        params[part] = convert.from_torch(tensors, shapes, where=str(folder / part), dtype=dtype)
    return bundle._replace(params=params, tokenizer=load_tokenizer(folder / "tokenizer"))


def build(
    unet_cfg: UNetConfig,
    vae_cfg: VAEConfig,
    text_cfg: CLIPTextConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    scheduler_config: Mapping[str, Any],
    latent_size: int,
    remat_blocks: bool = False,
    vae_slice: int = 32,
) -> StableDiffusion:
    """The functions of a model of these sizes, without weights or tokenizer.

    `remat_blocks` is the UNet's `remat`; `vae_slice` is how many images are decoded at once.
    """
    unet, vae = UNet(unet_cfg, dtype, remat_blocks), AutoencoderKL(vae_cfg, dtype)
    text = TextTransformer(text_cfg, dtype)

    def encode(params, ids):
        return text.apply({"params": params["text_encoder"]}, ids).last_hidden_state.astype(jnp.float32)

    def apply_unet(params, lora, x_t, t, embedding, added=None):
        variables = {"params": params["unet"]} | ({"lora": lora} if lora is not None else {})
        return unet.apply(variables, x_t, t, embedding, added)

    def decode(params, latents):
        return in_slices(lambda z: vae.apply({"params": params["vae"]}, z, method="decode"), latents, vae_slice)

    shape = (latent_size, latent_size, unet_cfg.in_channels)
    return StableDiffusion({}, None, encode, apply_unet, decode, scheduler_config, shape)


def abstract_params(unet_cfg: UNetConfig, vae_cfg: VAEConfig, text_cfg: CLIPTextConfig) -> dict[str, Any]:
    """The shapes of every parameter, without computing anything."""
    ids = jnp.zeros((1, 4), jnp.int32)
    side = 2 ** (len(unet_cfg.block_out_channels) - 1)
    latents = jnp.zeros((1, side, side, unet_cfg.in_channels))
    embedding = jnp.zeros((1, 4, unet_cfg.cross_attention_dim))
    image = jnp.zeros((1, vae_cfg.downsampling, vae_cfg.downsampling, vae_cfg.in_channels))
    return {
        "unet": convert.abstract_params(UNet(unet_cfg), latents, jnp.zeros((), jnp.int32), embedding),
        "vae": convert.abstract_params(AutoencoderKL(vae_cfg), image),
        "text_encoder": convert.abstract_params(TextTransformer(text_cfg), ids),
    }


def load_tokenizer(folder: Path):
    """The folder's CLIPTokenizer."""
    from transformers import CLIPTokenizer  # seconds to import: only where it is used

    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file() and not (folder / "tokenizer.json").is_file():
            raise InputError(f"{folder / name}: the file is missing")
    return CLIPTokenizer.from_pretrained(str(folder))


def token_ids(tokenizer, texts: Sequence[str]) -> tuple[Int[np.ndarray, "B L"], list[str]]:
    """Token ids padded to the tokenizer's length, and those of the texts that had to be cut."""
    length = tokenizer.model_max_length
    full = tokenizer(list(texts), padding="max_length", max_length=length).input_ids
    cut = [text for text, ids in zip(texts, full, strict=True) if len(ids) > length]
    ids = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True).input_ids
    return np.asarray(ids, np.int32), cut


# Attention layers of VAEs saved before diffusers 0.18.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern_attention_names(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """VAE tensors under today's names: attentions.0.query -> attentions.0.to_q, and so on."""

    def rename(name):
        return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", _modern, name)

    return files.Renamed(tensors, rename)


def _modern(match: re.Match) -> str:
    return f"{match[1]}.{_OLD_ATTENTION[match[2]]}."


def count(params: Any) -> int:
    """Number of parameters in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
