"""Stable Diffusion 1.x, 2.x and XL from a folder in diffusers' pipeline format."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from diffexp_jax.errors import InputError
from diffexp_jax.exploration import reweight_prompt
from diffexp_jax.formats import convert, files
from diffexp_jax.formats.lora_names import UNET
from diffexp_jax.formats.tokenizers import load_tokenizer
from diffexp_jax.models.blocks import TRANSFORMER_BLOCKS
from diffexp_jax.models.clip import LEGACY_EOS, CLIPTextConfig
from diffexp_jax.models.clip_files import canonical_text_names
from diffexp_jax.models.lora import TARGETS
from diffexp_jax.models.precision import in_precision
from diffexp_jax.models.unet import UNet
from diffexp_jax.models.vae import AutoencoderKL
from diffexp_jax.pipelines.families import ModelConfig, model_config, read_jsons
from diffexp_jax.pipelines.parts import decoder, variables
from diffexp_jax.pipelines.pipeline import Pipeline
from diffexp_jax.sampling import load_process

# The last parts of the names of a UNet's layers
LORA_TARGETS = {
    "attention": TARGETS,
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    "projections": ("proj_in", "proj_out"),  # around the transformer blocks: linear, or 1x1 convolutions
    "convolutions": ("conv1", "conv2", "conv_shortcut", "conv"),  # of residual blocks; between levels
}


class TextEmbedding(NamedTuple):
    """What conditions the UNet: the embedding of a prompt (or of a batch of prompts: B first)."""

    embedding: Float[Array, "*B L D"]  # a vector per token
    # SDXL, else None: a vector of the whole prompt; original size, crop corner and target size in pixels (y, x each)
    added: tuple[Float[Array, "*B P"], Float[Array, "*B 6"]] | None = None


def load(folder: Path, *, dtype: DTypeLike = jnp.float32, variant: str | None = None, **options) -> Pipeline:
    """The pipeline in a folder; see `pipelines.load_pipeline`. `options` are those of `build`."""
    config = model_config(*read_jsons(folder), str(folder))
    tokenizers = tuple(load_tokenizer(folder / name) for name in config.family.tokenizers)
    tensors = {part: files.open_weights(folder / part, variant=variant) for part in ("unet", "vae")}
    tensors["vae"] = modern_attention_names(tensors["vae"])
    for part in config.family.text_encoders:
        tensors[part] = canonical_text_names(files.open_weights(folder / part, variant=variant))
    return assemble(config, tokenizers, tensors, {part: str(folder / part) for part in tensors}, dtype=dtype, **options)


def assemble(
    config: ModelConfig,
    tokenizers: tuple[Any, ...],
    tensors: Mapping[str, Mapping[str, Any]],
    where: Mapping[str, str],
    *,
    dtype: DTypeLike = jnp.float32,
    **options,
) -> Pipeline:
    """The pipeline of a config with weights.

    Args:
      tensors: of each part, under diffusers' and transformers' names; they are read one at a time.
      where: each part's file or folder, for the errors.
      **options: of `build`.

    Raises:
      InputError: tensors or tokenizers do not fit.
    """
    folder = where["unet"].rpartition("/")[0]
    for name, tokenizer, cfg in zip(config.family.tokenizers, tokenizers, config.text, strict=True):
        check_tokenizer(tokenizer, cfg, f"{folder}: {name}")
    check_same_tokens(tokenizers, config.family.tokenizers, folder)
    params, lengths = {}, tuple(tokenizer.model_max_length for tokenizer in tokenizers)
    for part, shapes in abstract_params(config).items():
        params[part] = convert.from_torch(tensors[part], shapes, where=where[part], dtype=config.dtype(part, dtype))
    return build(config, dtype=dtype, **options)._replace(params=params, tokenizers=tokenizers, lengths=lengths)


def shapes(
    index: Mapping[str, Any], parts: Mapping[str, Any], where: str, *, dtype: DTypeLike = jnp.float32, **options
) -> Pipeline:
    """The pipeline that such json files describe (see `model_config`): shapes for weights, and no tokenizers."""
    config = model_config(index, parts, where)

    shapes = abstract_params(config)
    params = {part: convert.typed(tree, config.dtype(part, dtype)) for part, tree in shapes.items()}
    return build(config, dtype=dtype, **options)._replace(params=params)


def build(
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    image_size: int | None = None,
    matmul_precision: str = "auto",
    remat_blocks: bool = False,
    vae_slice: int = 32,
    t5_tokens: int | None = None,
    scheduler: Mapping[str, Any] = {},
) -> Pipeline:
    """The functions of such a model, without weights or tokenizers.

    `matmul_precision` is one of `precision.MATMUL_PRECISIONS`; `remat_blocks` is the networks' `remat`; `vae_slice` is
    how many images are decoded at once; `scheduler` has what is to be otherwise than scheduler_config.json says.
    """
    check_without_t5(t5_tokens)
    family, scale = config.family, config.vae.downsampling
    side = latent_side(config, image_size)
    pixels = side * scale
    unet = UNet(config.unet, dtype, remat_blocks)
    vae = AutoencoderKL(config.vae, config.dtype("vae", dtype), remat_blocks)
    encoders = {
        part: network(cfg, dtype)
        for (part, network), cfg in zip(family.text_encoders.items(), config.text, strict=True)
    }

    def encode(params, ids):
        outputs = [net.apply({"params": params[part]}, x) for (part, net), x in zip(encoders.items(), ids, strict=True)]
        embedding = jnp.concatenate([getattr(out, family.hidden) for out in outputs], axis=-1).astype(jnp.float32)
        if not family.added:
            return TextEmbedding(embedding)
        sizes = jnp.array([pixels, pixels, 0, 0, pixels, pixels], jnp.float32)  # uncropped, of the size that is wanted
        return TextEmbedding(
            embedding, (outputs[-1].pooled.astype(jnp.float32), jnp.broadcast_to(sizes, (len(embedding), 6)))
        )

    def denoise(params, lora, x_t, step, text):
        return unet.apply(variables(params["unet"], lora), x_t, step.t, text.embedding, text.added)

    return Pipeline(
        params={},
        trainable="unet",
        text_parts=tuple(family.text_encoders),
        tokenizers=(),
        lengths=tuple(cfg.max_position_embeddings for cfg in config.text),
        weighted=(0,),  # all tokenizers make the same tokens, and the encoders' vectors lie side by side
        encode=in_precision(encode, dtype, matmul_precision),
        reweight=reweight,
        unconditional=zeros if config.zero_uncond else lambda empty: empty,
        denoise=in_precision(denoise, dtype, matmul_precision),
        decode=in_precision(decoder(vae, vae_slice), config.dtype("vae", dtype), matmul_precision),
        process=load_process(config.scheduler, scheduler, old_configs=family.old_configs),
        latent_shape=(side, side, config.unet.in_channels),
        lora_targets=LORA_TARGETS,
        lora_prefix=UNET,
        blocks=(TRANSFORMER_BLOCKS,),
    )


def check_without_t5(t5_tokens: int | None) -> None:
    """Raises InputError where so many tokens of T5 are asked for, of a model that has none."""
    if t5_tokens is not None:
        raise InputError(f"model.t5_tokens={t5_tokens}: the model has no T5; wants None")


def latent_side(config: ModelConfig, image_size: int | None) -> int:
    """Latent pixels of a side of images of so many pixels a side; None: of what the UNet was trained at.

    Raises:
      InputError: the VAE does not divide it, or it was trained at no square.
    """
    scale, side = config.vae.downsampling, config.unet.side
    if image_size is not None:
        if image_size < scale or image_size % scale:
            raise InputError(f"image_size {image_size}: wants a multiple of {scale} pixels")
        return image_size // scale
    if side is None:
        size = list(config.unet.sample_size)
        raise InputError(f"unet/config.json: sample_size={size} is no square; wants model.image_size (or --image_size)")
    return side


def reweight(cond: TextEmbedding, null: TextEmbedding, weights: Float[Array, "L"]) -> TextEmbedding:
    """DiffExp's prompt weighting of the tokens' vectors; what is of the whole prompt stays as it is."""
    return cond._replace(embedding=reweight_prompt(cond.embedding, null.embedding, weights))


def zeros(empty: TextEmbedding) -> TextEmbedding:
    """SDXL's unconditional embedding: zeros, but the same sizes. The null of Eq. 8 stays the embedding of ""."""
    pooled, time_ids = empty.added
    return TextEmbedding(np.zeros_like(empty.embedding), (np.zeros_like(pooled), time_ids))


def abstract_params(config: ModelConfig) -> dict[str, Any]:
    """The shapes of every parameter, without computing anything."""
    unet, vae = config.unet, config.vae
    ids, numbers = np.zeros((1, 4), np.int32), partial(jax.ShapeDtypeStruct, dtype=np.float32)
    side = 2 ** (len(unet.block_out_channels) - 1)
    latents = numbers((1, side, side, unet.in_channels))
    embedding = numbers((1, 4, unet.cross_attention_dim))
    added = (numbers((1, config.text[-1].projection_dim)), numbers((1, 6))) if config.family.added else None
    image = numbers((1, vae.downsampling, vae.downsampling, vae.in_channels))
    shapes = {
        "unet": convert.abstract_params(UNet(unet), latents, np.zeros((), np.int32), embedding, added),
        "vae": convert.abstract_params(AutoencoderKL(vae), image),
    }
    for (part, network), cfg in zip(config.family.text_encoders.items(), config.text, strict=True):
        shapes[part] = convert.abstract_params(network(cfg), ids)
    return shapes


# ----------------------------------------------------------------------------------------------------------- tokenizers

# without "!": SDXL's second tokenizer pads with it, and so takes it for the padding token in a prompt too
_PROBE = "A dolphin, riding (bikes) at 12:30 o'clock - déjà-vu?"


def check_tokenizer(tokenizer: Any, text: CLIPTextConfig, where: str) -> None:
    """Raises InputError where a CLIP tokenizer's ids, length or end token are not those of its text encoder.

    Nothing would fail later: an id outside of the embedding table is silently read as its last row.
    """
    name = f"{where} does not fit its text encoder"
    if len(tokenizer) != text.vocab_size:
        raise InputError(f"{name}: {len(tokenizer)} tokens, the encoder has {text.vocab_size}")
    if (last := max(tokenizer.get_vocab().values())) >= text.vocab_size:
        raise InputError(f"{name}: a token's id is {last}, accepted: to {text.vocab_size - 1}")
    if (length := tokenizer.model_max_length) > text.max_position_embeddings:
        raise InputError(f"{name}: length {length}, accepted: to {text.max_position_embeddings}")
    if text.eos_token_id not in (LEGACY_EOS, tokenizer.eos_token_id):
        ends = f"{tokenizer.eos_token_id}, the encoder's config says {text.eos_token_id}"
        raise InputError(f"{name}: the end token's id is {ends}")


def check_same_tokens(tokenizers: Sequence[Any], names: Sequence[str], where: str) -> None:
    """Raises InputError where tokenizers differ in more than in how they pad: their encoders' vectors are joined."""
    first = tokenizers[0]
    for tokenizer, name in zip(tokenizers, names, strict=True):
        same = tokenizer.model_max_length == first.model_max_length and tokenizer.get_vocab() == first.get_vocab()
        probes = [t(_PROBE, verbose=False).input_ids for t in (tokenizer, first)]  # it may be too long for the model
        if not same or probes[0] != probes[1]:
            raise InputError(
                f"{where}: {name} does not fit the first tokenizer: wants the same tokens and length; only padding may "
                "differ"
            )


# ---------------------------------------------------------------------------------------------------------------- names

# Attention layers of VAEs saved before diffusers 0.18.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern_attention_names(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """VAE tensors under today's names: attentions.0.query -> attentions.0.to_q, and so on."""

    def rename(name):
        return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", _modern, name)

    return files.Renamed(tensors, rename)


def _modern(match: re.Match) -> str:
    return f"{match[1]}.{_OLD_ATTENTION[match[2]]}."
