"""CLIP (Radford et al. 2021) in transformers' layout and names: SD's text encoders, and rewards."""

import math

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from diffexp_jax.models.attention import attention
from diffexp_jax.models.blocks import CLIP_LAYERS, in_turn
from diffexp_jax.models.clip_config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from diffexp_jax.models.layers import ACTIVATIONS, Conv, Dense, LayerNorm

_INIT_LOGIT_SCALE = math.log(1 / 0.07)
LEGACY_EOS = 2  # an `eos_token_id` that says nothing about the vocabulary: see `eot_positions`

# --------------------------------------------------------------------------------------------------------------- towers


class EncoderLayer(nn.Module):
    """Pre-norm transformer block, causal in text and not in images."""

    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], before: Float[Array, "B L D"]
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
        """(what the layer makes of x, x). The last layer's x is what SDXL takes; `before`, its own, is not read."""
        cfg, width = self.config, x.shape[-1]
        h = LayerNorm(cfg.layer_norm_eps, self.dtype, name="layer_norm1")(x)
        q, k, v = (Dense(width, dtype=self.dtype, name=f"self_attn.{c}_proj")(h) for c in "qkv")
        h = attention(q, k, v, cfg.num_attention_heads, is_causal=self.causal)
        after = x + Dense(width, dtype=self.dtype, name="self_attn.out_proj")(h)
        h = LayerNorm(cfg.layer_norm_eps, self.dtype, name="layer_norm2")(after)
        h = Dense(cfg.intermediate_size, dtype=self.dtype, name="mlp.fc1")(h)
        return after + Dense(width, dtype=self.dtype, name="mlp.fc2")(ACTIVATIONS[cfg.hidden_act](h)), x


@struct.dataclass
class TextOutput:
    """What is wanted of a text encoder: SD takes the first, SDXL the second and third, rewards the third."""

    last_hidden_state: Float[Array, "B L D"]  # after the final LayerNorm
    penultimate: Float[Array, "B L D"]  # transformers' hidden_states[-2]: before the last layer, without LayerNorm
    pooled: Float[Array, "B P"]  # last_hidden_state at the end-of-text token


def eot_positions(ids: Int[Array, "B L"], eos_token_id: int) -> Int[Array, " B"]:
    """The position of each prompt's end-of-text token: the first that holds `eos_token_id`.

    Configs from before transformers 4.31 carry a meaningless 2 there; they mean the highest id of the prompt.
    """
    return jnp.argmax(ids if eos_token_id == LEGACY_EOS else ids == eos_token_id, axis=-1)


class TextTransformer(nn.Module):
    """transformers' CLIPTextModel. Attention is causal only: like SD and CLIP, it looks at padding."""

    config: CLIPTextConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "B L"]) -> TextOutput:
        cfg = self.config

        def embed(name, size):
            init = nn.initializers.normal(0.02)
            return nn.Embed(size, cfg.hidden_size, dtype=self.dtype, embedding_init=init, name=f"embeddings.{name}")

        tokens = embed("token_embedding", cfg.vocab_size)(ids)
        positions = embed("position_embedding", cfg.max_position_embeddings)(jnp.arange(ids.shape[1]))
        x = tokens + positions
        layers = [(cfg, True, self.dtype)] * cfg.num_hidden_layers
        x, penultimate = in_turn(self, EncoderLayer, layers, (x, x), name=CLIP_LAYERS)
        x = LayerNorm(cfg.layer_norm_eps, self.dtype, name="final_layer_norm")(x)
        eot = eot_positions(ids, cfg.eos_token_id)
        pooled = jnp.take_along_axis(x, eot[:, None, None], axis=1)[:, 0]  # [B, D]
        return TextOutput(last_hidden_state=x, penultimate=penultimate, pooled=pooled)


class VisionTransformer(nn.Module):
    """transformers' CLIPVisionModel: normalised pixels -> the class token after the last LayerNorm."""

    config: CLIPVisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        cfg, width, patch = self.config, self.config.hidden_size, self.config.patch_size
        none = ((0, 0), (0, 0))
        x = Conv(width, patch, patch, none, False, self.dtype, name="embeddings.patch_embedding")(pixels)
        x = x.reshape(len(x), -1, width)  # [B, N, D]
        init = nn.initializers.normal(width**-0.5)
        first = self.param("embeddings.class_embedding", init, (width,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, width)), x], axis=1)  # [B, 1 + N, D]

        positions, init = (cfg.image_size // patch) ** 2 + 1, nn.initializers.normal(0.02)
        name = "embeddings.position_embedding"
        x = x + nn.Embed(positions, width, dtype=self.dtype, embedding_init=init, name=name)(jnp.arange(positions))
        x = LayerNorm(cfg.layer_norm_eps, self.dtype, name="pre_layrnorm")(x)  # sic, the checkpoints' spelling
        layers = [(cfg, False, self.dtype)] * cfg.num_hidden_layers
        x, _ = in_turn(self, EncoderLayer, layers, (x, x), name=CLIP_LAYERS)
        return LayerNorm(cfg.layer_norm_eps, self.dtype, name="post_layernorm")(x[:, 0])


# --------------------------------------------------------------------------------------------------------- whole models


class TextTransformerWithProjection(nn.Module):
    """transformers' CLIPTextModelWithProjection, SDXL's second text encoder: `pooled` is projected."""

    config: CLIPTextConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "B L"]) -> TextOutput:
        out = TextTransformer(self.config, self.dtype, name="text_model")(ids)
        project = Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection")
        return out.replace(pooled=project(out.pooled))


class CLIP(nn.Module):
    """transformers' CLIPModel: both towers, projected into one space."""

    config: CLIPConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        cfg = self.config
        self.text_model = TextTransformer(cfg.text, self.dtype)
        self.vision_model = VisionTransformer(cfg.vision, self.dtype)
        self.text_projection = Dense(cfg.projection_dim, use_bias=False, dtype=self.dtype)
        self.visual_projection = Dense(cfg.projection_dim, use_bias=False, dtype=self.dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(_INIT_LOGIT_SCALE), ())

    def embed_text(self, ids: Int[Array, "B L"]) -> Float[Array, "B P"]:
        """Text features, float32, not of unit length."""
        return self.text_projection(self.text_model(ids).pooled).astype(jnp.float32)

    def embed_image(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B P"]:
        """Image features, float32, not of unit length, of pixels already normalised by CLIP's statistics."""
        return self.visual_projection(self.vision_model(pixels)).astype(jnp.float32)

    def __call__(
        self, ids: Int[Array, "T L"], pixels: Float[Array, "B H W 3"]
    ) -> tuple[Float[Array, "T P"], Float[Array, "B P"], Float[Array, ""]]:
        """Text features, image features, and the factor of their cosine; touches every parameter."""
        return self.embed_text(ids), self.embed_image(pixels), jnp.exp(self.logit_scale)


def unit(features: Float[Array, "B P"]) -> Float[Array, "B P"]:
    """Features divided by their Euclidean length."""
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
