"""FLUX.1, dev and schnell, from a folder in diffusers' pipeline format (Black Forest Labs 2024)."""

from collections.abc import Mapping
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
from diffexp_jax.models.clip import CLIPTextConfig, TextTransformer
from diffexp_jax.models.clip_files import canonical_text_names
from diffexp_jax.models.flux import LORA_TARGETS, PATCH, SINGLE_BLOCKS, Flux, FluxConfig
from diffexp_jax.models.precision import in_precision
from diffexp_jax.models.vae import AutoencoderKL, VAEConfig
from diffexp_jax.pipelines.parts import decoder, loaded, read_configs, type_of_t5, variables
from diffexp_jax.pipelines.pipeline import Pipeline
from diffexp_jax.pipelines.stable_diffusion import check_tokenizer
from diffexp_jax.sampling import EMBEDDED, load_process

CLIP, T5 = "text_encoder", "text_encoder_2"
TOKENIZERS = ("tokenizer", "tokenizer_2")
NETWORKS = ("transformer", "vae", CLIP, T5)
PARTS = (*NETWORKS, *TOKENIZERS, "scheduler")
T5_TOKENS = 512  # of a prompt, as diffusers' pipeline has them
SIDE = 128  # latent pixels: no file says what it was trained at


class ModelConfig(NamedTuple):
    """What the json files of a pipeline folder say."""

    transformer: FluxConfig
    vae: VAEConfig
    clip: CLIPTextConfig
    t5: t5.T5Config
    scheduler: Mapping[str, Any]


class TextEmbedding(NamedTuple):
    """What conditions the transformer: the embedding of a prompt (or of a batch of prompts: B first)."""

    tokens: Float[Array, "*B L J"]  # a vector for each of T5's tokens
    pooled: Float[Array, "*B P"]  # of the whole prompt, by CLIP


def read_jsons(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """model_index.json of a folder and the configs of its parts, for `model_config`.

    Raises:
      InputError: a file or subfolder is missing or broken.
    """
    return files.read_json(folder / "model_index.json"), read_configs(folder, PARTS, networks=NETWORKS)


def model_config(parts: Mapping[str, Mapping[str, Any]], where: str = "model") -> ModelConfig:
    """The config of a pipeline, of its parts' config.json; `where` is the folder, for the errors.

    Raises:
      InputError: a variant that is not implemented, or parts that do not fit together.
    """
    transformer, vae = FluxConfig.from_dict(parts["transformer"]), VAEConfig.from_dict(parts["vae"])
    clip = CLIPTextConfig.from_dict(parts[CLIP], f"{CLIP}/config.json")
    second = t5.T5Config.from_dict(parts[T5], f"{T5}/config.json")
    if vae.latents_mean:
        raise InputError("vae/config.json: latents_mean is not supported: diffusers ignores it in such a pipeline")
    if vae.latent_channels * PATCH**2 != transformer.in_channels:
        wanted = f"{PATCH**2} times the VAE's latent_channels, {vae.latent_channels}"
        raise InputError(f"{where}: the transformer's in_channels={transformer.in_channels}; wants {wanted}")
    if second.d_model != transformer.joint_attention_dim:
        wanted = f"{transformer.joint_attention_dim} (joint_attention_dim)"
        raise InputError(f"{where}: {T5} gives vectors of width {second.d_model}; the transformer wants {wanted}")
    if clip.hidden_size != transformer.pooled_projection_dim:
        wanted = f"{transformer.pooled_projection_dim} (pooled_projection_dim)"
        raise InputError(f"{where}: {CLIP} gives a vector of width {clip.hidden_size}; the transformer wants {wanted}")
    return ModelConfig(transformer, vae, clip, second, parts["scheduler"])


def load(folder: Path, *, dtype: DTypeLike = jnp.float32, variant: str | None = None, **options) -> Pipeline:
    """The pipeline in a folder; see `pipelines.load_pipeline`. `options` are those of `build`."""
    _, parts = read_jsons(folder)
    config = model_config(parts, str(folder))
    pipeline = build(config, dtype=dtype, **options)
    tensors = {part: files.open_weights(folder / part, variant=variant) for part in pipeline.params}
    tensors |= {CLIP: canonical_text_names(tensors[CLIP]), T5: t5.canonical_names(tensors[T5])}
    params = loaded(pipeline.params, tensors, folder)
    of_clip = load_tokenizer(folder / TOKENIZERS[0])
    check_tokenizer(of_clip, config.clip, f"{folder}: {TOKENIZERS[0]}")
    of_t5 = load_t5_tokenizer(folder / TOKENIZERS[1], size=config.t5.vocab_size, length=pipeline.lengths[1])
    lengths = (of_clip.model_max_length, pipeline.lengths[1])
    return pipeline._replace(params=params, tokenizers=(of_clip, of_t5), lengths=lengths)


def shapes(index: Mapping[str, Any], parts: Mapping[str, Any], where: str, **options) -> Pipeline:
    """The pipeline that such json files describe: shapes for weights, and no tokenizers; `options` as of `build`."""
    return build(model_config(parts, where), **options)


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

    Arguments are those of `stable_diffusion_3.build`. A shift in `scheduler` takes the place of that by the image's
    size.
    """
    side, cfg = latent_side(config, image_size), config.transformer
    t5_dtype = type_of_t5(dtype)
    transformer, vae = Flux(cfg, dtype, remat_blocks), AutoencoderKL(config.vae, dtype, remat_blocks)
    clip, second = TextTransformer(config.clip, dtype), t5.T5Encoder(config.t5, t5_dtype)

    def encode(params, ids):
        pooled = clip.apply({"params": params[CLIP]}, ids[0]).pooled
        tokens = second.apply({"params": params[T5]}, ids[1])
        return TextEmbedding(tokens.astype(t5_dtype), pooled.astype(jnp.float32))

    def denoise(params, lora, x_t, step, text):
        return transformer.apply(
            variables(params["transformer"], lora), x_t, step.t, text.tokens, text.pooled, step.w_t
        )

    own = {"use_dynamic_shifting": False} if "shift" in scheduler else {}
    return Pipeline(
        params={
            part: convert.typed(tree, t5_dtype if part == T5 else dtype)
            for part, tree in abstract_params(config).items()
        },
        trainable="transformer",
        text_parts=(CLIP, T5),
        tokenizers=(),
        lengths=(config.clip.max_position_embeddings, t5_tokens or config.t5.prompt_length(T5_TOKENS)),
        weighted=(1,),  # of CLIP the transformer reads the whole prompt's vector alone
        encode=in_precision(encode, dtype, matmul_precision),
        reweight=reweight,
        unconditional=lambda empty: (),  # guidance is an input of the network, and leads away from nothing
        denoise=in_precision(denoise, dtype, matmul_precision),
        decode=in_precision(decoder(vae, vae_slice), dtype, matmul_precision),
        process=load_process(config.scheduler | own, scheduler, tokens=(side // PATCH) ** 2, to_1_over_n=True),
        latent_shape=(side, side, config.vae.latent_channels),
        lora_targets=LORA_TARGETS,
        lora_prefix=TRANSFORMER,
        blocks=(TRANSFORMER_BLOCKS, SINGLE_BLOCKS),
        guidance=EMBEDDED,
    )


def latent_side(config: ModelConfig, image_size: int | None) -> int:
    """Latent pixels of a side of images of so many pixels a side; None: SIDE.

    Raises:
      InputError: it is no whole number of the transformer's tokens.
    """
    scale = config.vae.downsampling
    if image_size is None:
        return SIDE
    if image_size < scale * PATCH or image_size % (scale * PATCH):
        raise InputError(f"image_size {image_size}: wants a multiple of {scale * PATCH} pixels")
    return image_size // scale


def reweight(cond: TextEmbedding, null: TextEmbedding, weights: Float[Array, "L"]) -> TextEmbedding:
    """DiffExp's prompt weighting of T5's tokens; what is of the whole prompt stays as it is."""
    return cond._replace(tokens=reweight_prompt(cond.tokens, null.tokens, weights))


def abstract_params(config: ModelConfig) -> dict[str, Any]:
    """The shapes of every parameter, without computing anything."""

    def numbers(*shape):
        return jax.ShapeDtypeStruct(shape, np.float32)

    ids, cfg, vae = np.zeros((1, 4), np.int32), config.transformer, config.vae
    text = numbers(1, 4, cfg.joint_attention_dim), numbers(1, cfg.pooled_projection_dim)
    latents, zero = numbers(1, PATCH, PATCH, vae.latent_channels), np.zeros((), np.float32)
    image = numbers(1, vae.downsampling, vae.downsampling, vae.in_channels)
    return {
        "transformer": convert.abstract_params(Flux(cfg), latents, zero, *text, zero),
        "vae": convert.abstract_params(AutoencoderKL(vae), image),
        CLIP: convert.abstract_params(TextTransformer(config.clip), ids),
        T5: convert.abstract_params(t5.T5Encoder(config.t5), ids),
    }
