"""MMDiT, the transformer of Stable Diffusion 3 and 3.5 (Esser et al. 2024), in diffusers' layout and names.

Image and prompt are two streams of tokens with weights of their own, which attend to each other in every block. The
timestep and the prompt's pooled embedding shift, scale and gate what a block does.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from diffexp_jax.models.attention import attention
from diffexp_jax.models.blocks import TRANSFORMER_BLOCKS, in_turn
from diffexp_jax.models.layers import Conv, Dense, RMSNorm, gelu_tanh, of_the_same, param, timestep_embedding
from diffexp_jax.models.lora import TARGETS
from diffexp_jax.models.mmdit_config import MMDiTConfig
from diffexp_jax.models.norms import Norm, normalise
from diffexp_jax.models.rotary import Rotation
from diffexp_jax.parallel import waiting

TIME_WIDTH = 256  # of the timestep's sinusoids
EPSILON = 1e-6  # of all norms
IMAGE, TEXT = ("to_{}", "norm_{}"), ("add_{}_proj", "norm_added_{}")  # a stream's layers in an attention

# What lora.targets may name -> the last parts of the names of layers. Most recipes train the first alone.
LORA_TARGETS = {
    "attention": tuple(f"attn.{layer}" for layer in (*TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    "second_attention": tuple(f"attn2.{layer}" for layer in TARGETS),  # of SD3.5-medium: the image's alone
    "feed_forward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    "modulation": ("norm1.linear", "norm1_context.linear", "norm_out.linear"),
}

# -------------------------------------------------------------------------------------------------- parts of the blocks


def frequencies(width: int) -> Float[np.ndarray, " half"]:
    """Frequencies of the timestep's sinusoids, 10000^(-i / half): the same numbers on every machine.

    Angles reach 1000, so that the last place of a frequency changes an output by 1e-3. Of 128 frequencies numpy's
    exponential gives 2 otherwise than torch's, jax's on a CPU 16.
    """
    half = width // 2
    exponents = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    return np.exp(exponents.astype(np.float64)).astype(np.float32)


class Embedder(nn.Module):
    """Two layers with SiLU between them, for what conditions the whole network."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B n"]) -> Float[Array, "B D"]:
        h = nn.silu(Dense(self.width, dtype=self.dtype, name="linear_1")(x))
        return Dense(self.width, dtype=self.dtype, name="linear_2")(h)


def embedded_time(
    t: Num[Array, "*B"], batch: int, width: int, dtype: DTypeLike, of: str = "timestep"
) -> Float[Array, "B D"]:
    """The embedding of the timestep, or of another number; t is a scalar or one per sample, 0..1000."""
    sinusoids = timestep_embedding(jnp.broadcast_to(t, (batch,)), TIME_WIDTH, frequencies(TIME_WIDTH))
    return Embedder(width, dtype, name=f"time_text_embed.{of}_embedder")(sinusoids)


def modulation(temb: Float[Array, "B D"], n: int, dtype: DTypeLike, name: str) -> list[Float[Array, "B 1 D"]]:
    """n vectors of each sample: shifts, scales and gates."""
    out = Dense(n * temb.shape[-1], dtype=dtype, name=f"{name}.linear")(nn.silu(temb))
    return jnp.split(out[:, None], n, axis=-1)


def modulated(
    x: Float[Array, "B L D"], shift: Float[Array, "B 1 D"], scale: Float[Array, "B 1 D"], dtype: DTypeLike
) -> Float[Array, "B L D"]:
    """LayerNorm(x) (1 + scale) + shift, in float32; the norm has no parameters of its own."""
    scale, shift = 1.0 + scale.astype(jnp.float32), shift.astype(jnp.float32)
    return normalise(x, scale, shift, Norm(None, EPSILON, dtype))


def queries_keys_values(
    x: Float[Array, "B L D"], heads: int, dtype: DTypeLike, name: str, *, norm: bool, names: Sequence[str] = IMAGE
) -> list[Float[Array, "B L D"]]:
    """What tokens bring to an attention; with `norm` each head's queries and keys have a mean square of one.

    Args:
      names: of the stream's projections and norms, IMAGE or TEXT.
    """
    project, normed = names
    qkv = of_the_same(x, [Dense(x.shape[-1], dtype=dtype, name=f"{name}.{project.format(part)}") for part in "qkv"])
    for i, part in enumerate("qk" if norm else ""):
        of_heads = qkv[i].reshape(*x.shape[:-1], heads, -1)
        of_heads = RMSNorm(EPSILON, dtype, name=f"{name}.{normed.format(part)}")(of_heads)
        qkv[i] = of_heads.reshape(x.shape)
    return qkv


def feed_forward(x: Float[Array, "B L D"], dtype: DTypeLike, name: str) -> Float[Array, "B L D"]:
    """Two layers, four times as wide between them."""
    h = gelu_tanh(Dense(4 * x.shape[-1], dtype=dtype, name=f"{name}.net.0.proj")(x))
    return Dense(x.shape[-1], dtype=dtype, name=f"{name}.net.2")(h)


def within_float16(x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """x, in float16 within what that can hold: FLUX's tokens leave it, and diffusers clips them there too."""
    most = jnp.finfo(jnp.float16).max
    return jnp.clip(x, -most, most) if x.dtype == jnp.float16 else x


def head(x: Float[Array, "B L D"], temb: Float[Array, "B D"], features: int, dtype: DTypeLike) -> Float[Array, "B L n"]:
    """The network's last layers. Its norm's scale comes before its shift."""
    scale, shift = modulation(waiting(temb, after=x), 2, dtype, "norm_out")
    return Dense(features, dtype=dtype, name="proj_out")(modulated(x, shift, scale, dtype))


# --------------------------------------------------------------------------------------------------------------- blocks


class JointBlock(nn.Module):
    """Joint attention of image and prompt, and a feed-forward for each; diffusers' JointTransformerBlock.

    `dual`: image tokens also attend to themselves alone. `last`: nobody reads the prompt's tokens any more. `turn` says
    where tokens are, the image's first; None: nothing does.
    """

    heads: int
    norm: bool  # of queries and keys
    dual: bool
    last: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        text: Float[Array, "B L D"],
        temb: Float[Array, "B D"],
        turn: Rotation | None = None,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B L D"]]:
        width, length, dtype = x.shape[-1], x.shape[1], self.dtype
        dense = partial(Dense, width, dtype=dtype)
        projected = partial(queries_keys_values, heads=self.heads, dtype=dtype, norm=self.norm)
        temb = waiting(temb, after=x)

        vectors = modulation(temb, 9 if self.dual else 6, dtype, "norm1")
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = vectors
        of_image = projected(modulated(x, shift, scale, dtype), name="attn")
        if self.last:
            text_scale, text_shift = modulation(temb, 2, dtype, "norm1_context")
        else:
            text_shift, text_scale, text_gate, *text_ff = modulation(temb, 6, dtype, "norm1_context")
        of_text = projected(modulated(text, text_shift, text_scale, dtype), name="attn", names=TEXT)
        joined = [jnp.concatenate(both, axis=1) for both in zip(of_image, of_text, strict=True)]
        if turn is not None:
            joined[:2] = [turn.turned(part, self.heads) for part in joined[:2]]
        if self.last:  # nor what they would have asked for
            joined[0] = joined[0][:, :length]
        out = attention(*joined, self.heads)  # [B, S + L, D], or [B, S, D]

        h = x + gate * dense(name="attn.to_out.0")(out[:, :length])
        if self.dual:  # of x before the first attention
            shift, scale, gate = second
            alone = projected(modulated(x, shift, scale, dtype), name="attn2")
            h = h + gate * dense(name="attn2.to_out.0")(attention(*alone, self.heads))
        x = h + gate_ff * feed_forward(modulated(h, shift_ff, scale_ff, dtype), dtype, "ff")
        if self.last:
            return x, text
        shift_ff, scale_ff, gate_ff = text_ff
        text = text + text_gate * dense(name="attn.to_add_out")(out[:, length:])
        text = text + gate_ff * feed_forward(modulated(text, shift_ff, scale_ff, dtype), dtype, "ff_context")
        return x, within_float16(text)


class PatchEmbedding(nn.Module):
    """Squares of latent pixels as tokens, row by row, and what tells their places.

    The table of places is a parameter, of the image's size: see `middle_of_table`.
    """

    width: int
    patch: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B S D"]:
        size = (self.patch, self.patch)
        x = Conv(self.width, *size, ((0, 0), (0, 0)), dtype=self.dtype, name="proj")(x)
        x = x.reshape(len(x), -1, self.width)
        return x + param(self, "pos_embed", nn.initializers.zeros, (1, *x.shape[1:])).astype(self.dtype)


def middle_of_table(table: Float[np.ndarray, "1 all D"], height: int, width: int) -> Float[np.ndarray, "1 S D"]:
    """The middle of a checkpoint's square table of places, for so many tokens up and across."""
    side = round(table.shape[1] ** 0.5)
    top, left = (side - height) // 2, (side - width) // 2
    square = table.reshape(1, side, side, -1)[:, top : top + height, left : left + width]
    return square.reshape(1, height * width, -1)


class MMDiT(nn.Module):
    """Predicts the velocity of latents x_t at timesteps t, given the prompt's tokens and its pooled embedding.

    `remat`: the backward pass computes each block's activations again, so that it holds the blocks' inputs and one
    block's activations at a time.
    """

    config: MMDiTConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "B h w c"],
        t: Num[Array, "*B"],
        text: Float[Array, "B L J"],
        pooled: Float[Array, "B P"],
    ) -> Float[Array, "B h w c"]:
        """Args: `t` (0..1000) is a scalar or one for each sample."""
        cfg, dtype, patch = self.config, self.dtype, self.config.patch_size
        width = cfg.caption_projection_dim
        x = PatchEmbedding(width, patch, dtype, name="pos_embed")(x_t)
        temb = embedded_time(t, len(x), width, dtype)
        temb = temb + Embedder(width, dtype, name="time_text_embed.text_embedder")(pooled)
        text = Dense(width, dtype=dtype, name="context_embedder")(text)
        heads, norm, last = cfg.num_attention_heads, cfg.qk_norm is not None, cfg.num_layers - 1
        kinds = [(heads, norm, i in cfg.dual_attention_layers, i == last, dtype) for i in range(cfg.num_layers)]
        x, _ = in_turn(self, JointBlock, kinds, (x, text), temb, name=TRANSFORMER_BLOCKS, remat=self.remat)
        x = head(x, temb, patch * patch * cfg.out_channels, dtype)
        return as_pixels(x, x_t.shape[1] // patch, patch).astype(jnp.float32)


def as_pixels(x: Float[Array, "B S n"], rows: int, patch: int) -> Float[Array, "B h w c"]:
    """Tokens of patch x patch pixels, their channels last, as an array of so many rows of tokens."""
    squares = x.reshape(len(x), rows, -1, patch, patch, x.shape[-1] // patch**2)  # [B, h, w, p, q, c]
    pixels = squares.swapaxes(2, 3)
    return pixels.reshape(len(x), rows * patch, -1, pixels.shape[-1])
