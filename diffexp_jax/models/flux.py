"""The transformer of FLUX.1 (Black Forest Labs 2024), in diffusers' layout and names.

First image and prompt are two streams of tokens, as in SD3's transformer; then they are one. Rotary embeddings tell
where a token is: its queries and keys are turned. Guidance is an input of the network where it was distilled so (dev).
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from diffexp_jax.errors import InputError
from diffexp_jax.formats.config_keys import Keys, Many, checked, shown
from diffexp_jax.limits import whole
from diffexp_jax.models import mmdit, rotary
from diffexp_jax.models.attention import attention
from diffexp_jax.models.blocks import TRANSFORMER_BLOCKS, in_turn
from diffexp_jax.models.layers import Dense, gelu_tanh
from diffexp_jax.models.mmdit import Embedder, JointBlock, embedded_time, head, modulated, modulation
from diffexp_jax.models.rotary import Rotation
from diffexp_jax.parallel import waiting

KEYS = Keys(
    read={
        "in_channels": whole(4, 4096, multiple=4),
        "num_layers": whole(1, 256),
        "num_single_layers": whole(1, 256),
        "attention_head_dim": whole(1, 2**12),
        "num_attention_heads": whole(1, 2**12),
        "joint_attention_dim": whole(1, 2**15),
        "pooled_projection_dim": whole(1, 2**15),
        "guidance_embeds": bool,
        "axes_dims_rope": Many(whole(2, 2**12, multiple=2)),
    },
    only={"patch_size": (1,), "out_channels": (None,), "quantization_config": (None,)},
    class_names=("FluxTransformer2DModel",),
)

SINGLE_BLOCKS = "single_transformer_blocks"
PATCH = 2  # latent pixels of a token's side, which diffusers' pipeline puts together
# What lora.targets may name -> the last parts of the names of layers; those of joined streams too
LORA_TARGETS = {
    "attention": mmdit.LORA_TARGETS["attention"],
    "feed_forward": (*mmdit.LORA_TARGETS["feed_forward"], "proj_mlp", "proj_out"),
    "modulation": (*mmdit.LORA_TARGETS["modulation"], "norm.linear"),
}


@struct.dataclass
class FluxConfig:
    """Sizes of the transformer; fields and defaults are those of diffusers' config.json."""

    in_channels: int = 64  # of a token: a latent's times PATCH^2
    num_layers: int = 19  # blocks of two streams
    num_single_layers: int = 38  # blocks of one
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096  # width of the prompt's tokens
    pooled_projection_dim: int = 768  # width of the prompt's pooled embedding
    guidance_embeds: bool = False  # whether guidance is an input
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)  # of a head's numbers: not turned, by the row, by the column

    @classmethod
    def from_dict(cls, config: Any, where: str = "transformer/config.json") -> "FluxConfig":
        """Reads diffusers' config.json; `where` is the file, for the errors.

        Raises:
          InputError: a value that is not accepted, or values that do not fit each other.
        """
        sizes = cls(**checked(config, KEYS, where))
        axes = sizes.axes_dims_rope
        if len(axes) != 3 or sum(axes) != sizes.attention_head_dim:
            wanted = f"three numbers whose sum is attention_head_dim, {sizes.attention_head_dim}"
            raise InputError(f"{where}: axes_dims_rope={shown(axes)}; wants {wanted}")
        return sizes

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class SingleBlock(nn.Module):
    """Attention and feed-forward of all tokens side by side; diffusers' FluxSingleTransformerBlock."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], temb: Float[Array, "B D"], turn: Rotation) -> Float[Array, "B L D"]:
        width, dtype = x.shape[-1], self.dtype
        shift, scale, gate = modulation(waiting(temb, after=x), 3, dtype, "norm")
        h = modulated(x, shift, scale, dtype)
        q, k, v = mmdit.queries_keys_values(h, self.heads, dtype, "attn", norm=True)
        out = attention(turn.turned(q, self.heads), turn.turned(k, self.heads), v, self.heads)
        wide = gelu_tanh(Dense(4 * width, dtype=dtype, name="proj_mlp")(h))
        x = x + gate * Dense(width, dtype=dtype, name="proj_out")(jnp.concatenate([out, wide], axis=-1))
        return mmdit.within_float16(x)


class Flux(nn.Module):
    """Predicts the velocity of latents x_t at timesteps t, given the prompt's tokens and its pooled embedding.

    `remat`: the backward pass computes each block's activations again, as MMDiT's does.
    """

    config: FluxConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "B h w c"],
        t: Num[Array, "*B"],
        text: Float[Array, "B L J"],
        pooled: Float[Array, "B P"],
        guidance: Num[Array, "*B"] | None = None,
    ) -> Float[Array, "B h w c"]:
        """Args: `t` (0..1000) and `guidance` are scalars or one for each sample; see `FluxConfig.guidance_embeds`."""
        cfg, dtype, n, width = self.config, self.dtype, len(x_t), self.config.width
        height, across = (size // PATCH for size in x_t.shape[1:3])
        x = Dense(width, dtype=dtype, name="x_embedder")(as_tokens(x_t))
        temb = embedded_time(t, n, width, dtype)
        if cfg.guidance_embeds:
            temb = temb + embedded_time(1000.0 * guidance, n, width, dtype, of="guidance")
        temb = temb + Embedder(width, dtype, name="time_text_embed.text_embedder")(pooled)
        text = Dense(width, dtype=dtype, name="context_embedder")(text)
        turn = rotary.of_image(height, across, text.shape[1], cfg.axes_dims_rope)
        blocks, heads = partial(in_turn, self, remat=self.remat), cfg.num_attention_heads
        kinds = [(heads, True, False, False, dtype)] * cfg.num_layers
        x, text = blocks(JointBlock, kinds, (x, text), temb, turn, name=TRANSFORMER_BLOCKS)
        n_image, x = x.shape[1], jnp.concatenate([x, text], axis=1)
        kinds = [(heads, dtype)] * cfg.num_single_layers
        (x,) = blocks(SingleBlock, kinds, (x,), temb, turn, name=SINGLE_BLOCKS)
        x = head(x[:, :n_image], temb, cfg.in_channels, dtype)
        return as_latents(x, height).astype(jnp.float32)


def as_tokens(x: Float[Array, "B h w c"]) -> Float[Array, "B S n"]:
    """Squares of PATCH x PATCH latent pixels as tokens, row by row; a token's numbers are channel by channel."""
    n, h, w, c = x.shape
    squares = x.reshape(n, h // PATCH, PATCH, w // PATCH, PATCH, c).transpose(0, 1, 3, 5, 2, 4)
    return squares.reshape(n, (h // PATCH) * (w // PATCH), -1)


def as_latents(x: Float[Array, "B S n"], rows: int) -> Float[Array, "B h w c"]:
    """Tokens as squares of latent pixels, the inverse of `as_tokens`; `rows` of tokens are below each other."""
    squares = x.reshape(len(x), rows, -1, x.shape[-1] // PATCH**2, PATCH, PATCH)  # [B, h, w, c, p, q]
    pixels = squares.transpose(0, 1, 4, 2, 5, 3)
    return pixels.reshape(len(x), rows * PATCH, -1, pixels.shape[-1])
