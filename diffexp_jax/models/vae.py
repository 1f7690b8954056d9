"""AutoencoderKL (Rombach et al. 2022): the image autoencoder of Stable Diffusion, in diffusers' layout and names."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from diffexp_jax.errors import InputError
from diffexp_jax.formats.config_keys import Keys, Many, check_divides, check_lengths, checked
from diffexp_jax.limits import Number, positive, whole
from diffexp_jax.models.attention import attention
from diffexp_jax.models.layers import Conv, Dense, GroupNorm, ResnetBlock, Upsample, pointwise_conv

_SIZE = whole(1, 2**15)
KEYS = Keys(
    read={
        "in_channels": whole(1, 1024),
        "out_channels": whole(1, 1024),
        "latent_channels": whole(1, 1024),
        "block_out_channels": Many(_SIZE),
        "layers_per_block": whole(1, 16),
        "norm_num_groups": _SIZE,
        "scaling_factor": positive(),
        "shift_factor": Number(-1e6, 1e6),
        "latents_mean": Many(Number(-1e6, 1e6)),
        "latents_std": Many(positive()),
        "mid_block_add_attention": bool,
        "use_quant_conv": bool,
        "use_post_quant_conv": bool,
        "force_upcast": bool,
    },
    only={
        "act_fn": ("silu", "swish"),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "quantization_config": (None,),
    },
    ignored=frozenset(["sample_size"]),  # of tiles, and of what it was trained at
    class_names=("AutoencoderKL",),
)


@struct.dataclass
class VAEConfig:
    """Sizes of an AutoencoderKL; the fields are those of diffusers' config.json."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    force_upcast: bool = True  # it overflows in float16
    # of each channel of its latents; the diffusion model's are (z - mean) scaling_factor / std
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    @classmethod
    def from_dict(cls, config: Any, where: str = "vae/config.json") -> "VAEConfig":
        """Reads diffusers' config.json; `where` is the file, for the errors.

        Raises:
          InputError: a value that is not accepted, or values that do not fit each other.
        """
        sizes = cls(**checked(config, KEYS, where))
        n = len(sizes.block_out_channels)
        if n > 8:
            raise InputError(f"{where}: block_out_channels has {n} values; accepted: up to 8")
        lists = {key: tuple(config.get(key) or "?" * n) for key in ("down_block_types", "up_block_types")}
        check_lengths(lists, n, "block_out_channels", where)
        groups = (sizes.norm_num_groups,) * n
        check_divides(groups, sizes.block_out_channels, "norm_num_groups", "block_out_channels", where)
        if (sizes.latents_mean is None) != (sizes.latents_std is None):
            raise InputError(f"{where}: wants latents_mean and latents_std, or none of them")
        statistics = {"latents_mean": sizes.latents_mean, "latents_std": sizes.latents_std}
        check_lengths(statistics, sizes.latent_channels, "latent_channels", where)
        return sizes

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel, along one axis."""
        return 2 ** (len(self.block_out_channels) - 1)


class MidAttention(nn.Module):
    """Single-head self-attention over the pixels, with a residual connection."""

    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        width = x.shape[-1]
        h = GroupNorm(self.groups, 1e-6, self.dtype, name="group_norm")(x).reshape(x.shape[0], -1, width)
        q, k, v = (Dense(width, dtype=self.dtype, name=name)(h) for name in ("to_q", "to_k", "to_v"))
        h = Dense(width, dtype=self.dtype, name="to_out.0")(attention(q, k, v, heads=1))
        return x + h.reshape(x.shape)


class MidBlock(nn.Module):
    groups: int
    add_attention: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = ResnetBlock(x.shape[-1], self.groups, 1e-6, self.dtype, name="resnets.0")(x)
        if self.add_attention:
            x = MidAttention(self.groups, self.dtype, name="attentions.0")(x)
        return ResnetBlock(x.shape[-1], self.groups, 1e-6, self.dtype, name="resnets.1")(x)


class Encoder(nn.Module):
    config: VAEConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w moments"]:
        cfg = self.config
        x = Conv(cfg.block_out_channels[0], dtype=self.dtype, name="conv_in")(x)
        for i, features in enumerate(cfg.block_out_channels):
            for j in range(cfg.layers_per_block):
                name = f"down_blocks.{i}.resnets.{j}"
                x = ResnetBlock(features, cfg.norm_num_groups, 1e-6, self.dtype, name=name)(x)
            if i + 1 < len(cfg.block_out_channels):
                # diffusers pads the encoder's downsampling on the right and bottom only
                name = f"down_blocks.{i}.downsamplers.0.conv"
                x = Conv(features, stride=2, padding=((0, 1), (0, 1)), dtype=self.dtype, name=name)(x)
        x = MidBlock(cfg.norm_num_groups, cfg.mid_block_add_attention, self.dtype, name="mid_block")(x)
        x = GroupNorm(cfg.norm_num_groups, 1e-6, self.dtype, silu=True, name="conv_norm_out")(x)
        return Conv(2 * cfg.latent_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    config: VAEConfig
    dtype: DTypeLike
    remat: bool

    @nn.compact
    def __call__(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        cfg = self.config
        widths, block = cfg.block_out_channels[::-1], nn.remat(ResnetBlock) if self.remat else ResnetBlock
        x = Conv(widths[0], dtype=self.dtype, name="conv_in")(z)
        x = MidBlock(cfg.norm_num_groups, cfg.mid_block_add_attention, self.dtype, name="mid_block")(x)
        for i, features in enumerate(widths):
            for j in range(cfg.layers_per_block + 1):
                name = f"up_blocks.{i}.resnets.{j}"
                x = block(features, cfg.norm_num_groups, 1e-6, self.dtype, name=name)(x)
            if i + 1 < len(widths):
                size = (2 * x.shape[1], 2 * x.shape[2])
                x = Upsample(self.dtype, name=f"up_blocks.{i}.upsamplers.0")(x, size)
        x = GroupNorm(cfg.norm_num_groups, 1e-6, self.dtype, silu=True, name="conv_norm_out")(x)
        return Conv(cfg.out_channels, dtype=self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """Images [B,H,W,3] in [0,1] <-> latents [B,H/f,W/f,c] scaled to about unit variance.

    `remat`: the backward pass of decoding computes the activations of each block of `up_blocks` again, so that it holds
    the blocks' inputs and one block's work.
    """

    config: VAEConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def setup(self):
        cfg = self.config
        self.encoder = Encoder(cfg, self.dtype)
        self.decoder = Decoder(cfg, self.dtype, self.remat)
        if cfg.use_quant_conv:
            self.quant_conv = pointwise_conv(2 * cfg.latent_channels, dtype=self.dtype)
        if cfg.use_post_quant_conv:
            self.post_quant_conv = pointwise_conv(cfg.latent_channels, dtype=self.dtype)

    def moments(self, images: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
        """Mean and log-variance of q(z | image), unscaled."""
        h = self.encoder(2.0 * images - 1.0)
        if self.config.use_quant_conv:
            h = self.quant_conv(h)
        mean, logvar = jnp.split(h.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def encode(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w c"]:
        """The mean latent, scaled as the diffusion model expects it."""
        cfg, mean = self.config, self.moments(images)[0] - self.config.shift_factor
        if cfg.latents_mean is None:
            return mean * cfg.scaling_factor
        return (mean - jnp.array(cfg.latents_mean)) * (cfg.scaling_factor / jnp.array(cfg.latents_std))

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        """Images in [0,1] up to overshoot: not clipped, so that gradients pass (callers clip what they show)."""
        cfg = self.config
        if cfg.latents_mean is None:
            return self.decode_raw(latents / cfg.scaling_factor + cfg.shift_factor)
        unscaled = latents * jnp.array(cfg.latents_std) / cfg.scaling_factor + jnp.array(cfg.latents_mean)
        return self.decode_raw(unscaled + cfg.shift_factor)

    def decode_raw(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        """`decode` of an unscaled latent."""
        if self.config.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32) / 2.0 + 0.5

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """Reconstruction from the mean latent; touches every parameter (used to initialise)."""
        return self.decode(self.encode(images))


def in_slices(
    function: Callable[[Float[Array, "b ..."]], Float[Array, "b ..."]], x: Float[Array, "B ..."], size: int
) -> Float[Array, "B ..."]:
    """function(x) of a batch, in equal slices of at most `size` images, one after another.

    The backward pass computes a slice's activations again, so that it holds those of one slice at a time.
    """
    size = next(n for n in range(min(size, len(x)), 0, -1) if len(x) % n == 0)
    if size == len(x):
        return function(x)
    out = jax.lax.map(jax.checkpoint(function), x.reshape(-1, size, *x.shape[1:]))
    return out.reshape(-1, *out.shape[2:])
