"""Stable Diffusion 3 and 3.5 from a folder in diffusers' pipeline format (Esser et al. 2024)."""

from collections.abc import Iterator, Mapping
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
from diffexp_jax.formats.lora_names import TRANSFORMER
from diffexp_jax.formats.tokenizers import load_t5_tokenizer, load_tokenizer
from diffexp_jax.models import t5
from diffexp_jax.models.blocks import TRANSFORMER_BLOCKS
from diffexp_jax.models.clip import CLIPTextConfig, TextTransformerWithProjection
from diffexp_jax.models.clip_files import canonical_text_names
from diffexp_jax.models.mmdit import LORA_TARGETS, MMDiT, MMDiTConfig, middle_of_table
from diffexp_jax.models.precision import in_precision
from diffexp_jax.models.vae import AutoencoderKL, VAEConfig
from diffexp_jax.pipelines.parts import decoder, loaded, read_configs, type_of_t5, variables
from diffexp_jax.pipelines.pipeline import Pipeline
from diffexp_jax.pipelines.stable_diffusion import check_same_tokens, check_tokenizer
from diffexp_jax.sampling import load_process

CLIPS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}  # L and G
T5, T5_TOKENIZER = "text_encoder_3", "tokenizer_3"
NETWORKS = ("transformer", "vae", *CLIPS)
PARTS = (*NETWORKS, T5, *CLIPS.values(), T5_TOKENIZER, "scheduler")
T5_TOKENS = 256  # of a prompt, as published
TABLE = "pos_embed.pos_embed"


class ModelConfig(NamedTuple):
    """What the json files of a pipeline folder say."""

    transformer: MMDiTConfig
    vae: VAEConfig
    clips: tuple[CLIPTextConfig, ...]
    t5: t5.T5Config | None  # None: there is no third text encoder
    scheduler: Mapping[str, Any]


class TextEmbedding(NamedTuple):
    """What conditions the transformer: the embedding of a prompt (or of a batch of prompts: B first)."""

    clip: Float[Array, "*B L D"]  # a vector for each of CLIP's tokens, of both encoders side by side
    t5: Float[Array, "*B M J"] | None  # for each of T5's; None where there is no third encoder
    pooled: Float[Array, "*B P"]  # of the whole prompt, by both CLIPs


# ----------------------------------------------------------------------------------------------------------- the files


def read_jsons(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """model_index.json of a folder and the configs of its parts, for `model_config`.

    Raises:
      InputError: a file or subfolder is missing or broken. The third text encoder may be missing, if the index says so.
    """
    index = files.read_json(folder / "model_index.json")
    of_t5 = (T5, T5_TOKENIZER)
    if index.get(T5) in (None, [None, None]):
        return index, read_configs(folder, [part for part in PARTS if part not in of_t5], networks=NETWORKS)
    hints = dict.fromkeys(of_t5, f", or null for {T5} in model_index.json")
    return index, read_configs(folder, PARTS, networks=(*NETWORKS, T5), hints=hints)


def model_config(parts: Mapping[str, Mapping[str, Any]], where: str = "model") -> ModelConfig:
    """The config of a pipeline, of its parts' config.json; `where` is the folder, for the errors.

    Raises:
      InputError: a variant that is not implemented, or parts that do not fit together.
    """
    transformer, vae = MMDiTConfig.from_dict(parts["transformer"]), VAEConfig.from_dict(parts["vae"])
    clips = tuple(CLIPTextConfig.from_dict(parts[part], f"{part}/config.json") for part in CLIPS)
    third = t5.T5Config.from_dict(parts[T5], f"{T5}/config.json") if T5 in parts else None
    if vae.latents_mean:
        raise InputError(
            "vae/config.json: latents_mean is not supported in such a pipeline, where diffusers ignores it"
        )
    if vae.latent_channels != transformer.in_channels:
        channels = f"{transformer.in_channels} channels, the VAE's latents {vae.latent_channels}"
        raise InputError(f"{where}: the transformer has {channels}; wants the same")
    width, pooled = (sum(getattr(cfg, key) for cfg in clips) for key in ("hidden_size", "projection_dim"))
    if width > transformer.joint_attention_dim or (third and third.d_model != transformer.joint_attention_dim):
        found = f"{width} of both CLIPs" + (f", {third.d_model} of {T5}" if third else "")
        wanted = f"{transformer.joint_attention_dim} (joint_attention_dim)"
        raise InputError(f"{where}: text embeddings have width {found}; the transformer wants {wanted}, CLIP's no more")
    if pooled != transformer.pooled_projection_dim:
        wanted = f"{transformer.pooled_projection_dim} (pooled_projection_dim)"
        raise InputError(f"{where}: the CLIPs' pooled embeddings have width {pooled}; the transformer wants {wanted}")
    return ModelConfig(transformer, vae, clips, third, parts["scheduler"])


class _AtSize(Mapping[str, np.ndarray]):
    """A view of a transformer's tensors, of whose table of places the middle is taken: the whole is 0.8 GiB."""

    def __init__(self, tensors: Mapping[str, np.ndarray], config: MMDiTConfig, side: int, where: str):
        self._tensors, self._config, self._side, self._where = tensors, config, side, where
        self.file_of = getattr(tensors, "file_of", lambda name: None)

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        if name != TABLE:
            return tensor
        wanted = (1, self._config.pos_embed_max_size**2, self._config.caption_projection_dim)
        if tensor.shape != wanted:
            raise InputError(f"{self._where}: {name} is {tensor.shape}, the config wants {wanted}")
        return middle_of_table(tensor, self._side, self._side)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def load(folder: Path, *, dtype: DTypeLike = jnp.float32, variant: str | None = None, **options) -> Pipeline:
    """The pipeline in a folder; see `pipelines.load_pipeline`. `options` are those of `build`."""
    _, parts = read_jsons(folder)
    config = model_config(parts, str(folder))
    pipeline = build(config, dtype=dtype, **options)
    tensors = {part: files.open_weights(folder / part, variant=variant) for part in pipeline.params}
    tensors |= {part: canonical_text_names(tensors[part]) for part in CLIPS}
    if config.t5:
        tensors[T5] = t5.canonical_names(tensors[T5])
    side = pipeline.latent_shape[0] // config.transformer.patch_size
    tensors["transformer"] = _AtSize(tensors["transformer"], config.transformer, side, str(folder / "transformer"))
    params = loaded(pipeline.params, tensors, folder)
    tokenizers = [load_tokenizer(folder / name) for name in CLIPS.values()]
    for name, tokenizer, clip in zip(CLIPS.values(), tokenizers, config.clips, strict=True):
        check_tokenizer(tokenizer, clip, f"{folder}: {name}")
    check_same_tokens(tokenizers, tuple(CLIPS.values()), str(folder))
    lengths = [tokenizer.model_max_length for tokenizer in tokenizers]
    if config.t5:
        lengths.append(pipeline.lengths[-1])
        tokenizers.append(load_t5_tokenizer(folder / T5_TOKENIZER, size=config.t5.vocab_size, length=lengths[-1]))
    return pipeline._replace(params=params, tokenizers=tuple(tokenizers), lengths=tuple(lengths))


def shapes(index: Mapping[str, Any], parts: Mapping[str, Any], where: str, **options) -> Pipeline:
    """The pipeline that such json files describe: shapes for weights, and no tokenizers; `options` as of `build`."""
    return build(model_config(parts, where), **options)


# ------------------------------------------------------------------------------------------------------- the functions


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
    """The functions of such a model, with shapes for weights and without tokenizers.

    `t5_tokens` is how many of T5's tokens a prompt has, None: as published; further arguments as of
    `stable_diffusion.build`.
    """
    side = latent_side(config, image_size)
    t5_tokens = t5_tokens or (config.t5.prompt_length(T5_TOKENS) if config.t5 else T5_TOKENS)
    t5_dtype = type_of_t5(dtype)
    transformer, vae = MMDiT(config.transformer, dtype, remat_blocks), AutoencoderKL(config.vae, dtype, remat_blocks)
    clips = {part: TextTransformerWithProjection(cfg, dtype) for part, cfg in zip(CLIPS, config.clips, strict=True)}
    third = t5.T5Encoder(config.t5, t5_dtype) if config.t5 else None
    joint = config.transformer.joint_attention_dim

    def encode(params, ids):
        outputs = [net.apply({"params": params[part]}, x) for (part, net), x in zip(clips.items(), ids, strict=False)]
        clip = jnp.concatenate([out.penultimate for out in outputs], axis=-1).astype(t5_dtype)  # [B, L, D]
        pooled = jnp.concatenate([out.pooled for out in outputs], axis=-1).astype(jnp.float32)
        of_t5 = third.apply({"params": params[T5]}, ids[-1]).astype(t5_dtype) if third else None
        return TextEmbedding(clip, of_t5, pooled)

    def denoise(params, lora, x_t, step, text):
        tokens = joined(text, joint, t5_tokens)
        return transformer.apply(variables(params["transformer"], lora), x_t, step.t, tokens, text.pooled)

    params = abstract_params(config, side)
    return Pipeline(
        params={part: convert.typed(tree, t5_dtype if part == T5 else dtype) for part, tree in params.items()},
        trainable="transformer",
        text_parts=(*CLIPS, *([T5] if third else ())),
        tokenizers=(),
        lengths=(*(cfg.max_position_embeddings for cfg in config.clips), *([t5_tokens] if third else ())),
        weighted=(0, 2) if third else (0,),  # both CLIPs' tokenizers make the same tokens
        encode=in_precision(encode, dtype, matmul_precision),
        reweight=reweight,
        unconditional=lambda empty: empty,
        denoise=in_precision(denoise, dtype, matmul_precision),
        decode=in_precision(decoder(vae, vae_slice), dtype, matmul_precision),
        process=load_process(config.scheduler, scheduler, old_configs=False),
        latent_shape=(side, side, config.transformer.in_channels),
        lora_targets=LORA_TARGETS,
        lora_prefix=TRANSFORMER,
        blocks=(TRANSFORMER_BLOCKS,),
    )


def latent_side(config: ModelConfig, image_size: int | None) -> int:
    """Latent pixels of a side of images of so many pixels a side; None: of what the transformer was trained at.

    Raises:
      InputError: it is no whole number of the transformer's tokens, or more than it has places for.
    """
    patch, scale = config.transformer.patch_size, config.vae.downsampling
    side = config.transformer.sample_size if image_size is None else image_size // scale
    most = config.transformer.pos_embed_max_size * patch
    if side % patch or not 0 < side <= most or (image_size or 0) % scale:
        said = f"image_size {image_size}" if image_size else f"transformer/config.json: sample_size={side}"
        raise InputError(f"{said}: wants a multiple of {patch * scale} pixels, at most {most * scale}")
    return side


def joined(text: TextEmbedding, width: int, t5_tokens: int) -> Float[Array, "B L J"]:
    """CLIP's tokens, filled up with zeros, and T5's after them; zeros in T5's place where there are none."""
    missing = t5_tokens if text.t5 is None else 0
    clip = jnp.pad(text.clip, ((0, 0), (0, missing), (0, width - text.clip.shape[-1])))
    return clip if text.t5 is None else jnp.concatenate([clip, text.t5], axis=1)


def reweight(cond: TextEmbedding, null: TextEmbedding, weights: Float[Array, "L"]) -> TextEmbedding:
    """DiffExp's prompt weighting of CLIP's and T5's tokens; what is of the whole prompt stays as it is."""
    n = len(cond.clip)
    clip = reweight_prompt(cond.clip, null.clip, weights[:n])
    of_t5 = None if cond.t5 is None else reweight_prompt(cond.t5, null.t5, weights[n:])
    return cond._replace(clip=clip, t5=of_t5)


def abstract_params(config: ModelConfig, side: int) -> dict[str, Any]:
    """The shapes of every parameter, without computing anything; `side` is of the latents."""
    return {part: convert.abstract_params(network, *args) for part, (network, args) in networks(config, side).items()}


def networks(config: ModelConfig, side: int) -> dict[str, tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]]:
    """Every network in float32, and shapes of arguments that its parameters' shapes follow from."""

    def numbers(*shape):
        return jax.ShapeDtypeStruct(shape, np.float32)

    ids, cfg, vae = jax.ShapeDtypeStruct((1, 4), np.int32), config.transformer, config.vae
    latents, text = numbers(1, side, side, cfg.in_channels), numbers(1, 4, cfg.joint_attention_dim)
    image = numbers(1, vae.downsampling, vae.downsampling, vae.in_channels)
    clips = {
        part: (TextTransformerWithProjection(clip), (ids,)) for part, clip in zip(CLIPS, config.clips, strict=True)
    }
    return {
        "transformer": (MMDiT(cfg), (latents, numbers(), text, numbers(1, cfg.pooled_projection_dim))),
        "vae": (AutoencoderKL(vae), (image,)),
        **clips,
        **({T5: (t5.T5Encoder(config.t5), (ids,))} if config.t5 else {}),
    }
