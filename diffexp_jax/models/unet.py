"""UNet2DConditionModel (Rombach et al. 2022; SDXL: Podell et al. 2023) in diffusers' layout and names."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from diffexp_jax import InputError
from diffexp_jax.models.attention import attention
from diffexp_jax.models.layers import (
    Conv,
    Dense,
    GroupNorm,
    ResnetBlock,
    Upsample,
    geglu,
    layer_norm,
    pointwise_conv,
    timestep_embedding,
)

_DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP = ("CrossAttnUpBlock2D", "UpBlock2D")
# What diffusers' config may ask for that this network does not do: {key: the values that it does}.
_ONLY = {
    "act_fn": ("silu",),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "center_input_sample": (False,),
    "dual_cross_attention": (False,),
    "only_cross_attention": (False,),
    "class_embed_type": (None,),
    "encoder_hid_dim": (None,),
    "addition_embed_type": (None, "text_time"),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "resnet_skip_time_act": (False,),
    "cross_attention_norm": (None,),
    "num_attention_heads": (None,),  # diffusers refuses it too
    # without parameters of their own, so the accounting of tensors would not notice them
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
}


@struct.dataclass
class UNetConfig:
    """Sizes of a UNet2DConditionModel, a value per resolution, from fine to coarse."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    heads: tuple[int, ...] = (8, 8, 8, 8)
    transformer_depth: tuple[int, ...] = (1, 1, 1, 1)
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 64
    addition_time_embed_dim: int | None = None  # SDXL: width of each of the six sinusoids of sizes and crops

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """Reads diffusers' config.json.

        Raises:
          InputError: the config asks for a variant of the network that is not implemented.
        """
        for key, accepted in _ONLY.items():
            if config.get(key, accepted[0]) not in accepted:
                raise InputError(f"unet/config.json: {key}={config[key]!r} is not supported; accepted: {accepted}")
        for key, accepted in (("down_block_types", _DOWN), ("up_block_types", _UP)):
            if unknown := set(config.get(key, ())) - set(accepted):
                raise InputError(f"unet/config.json: {key} has {sorted(unknown)}; accepted: {accepted}")
        if not isinstance(config.get("layers_per_block", 2), int):
            raise InputError("unet/config.json: layers_per_block is a list; accepted: one number for all blocks")
        n = len(config.get("block_out_channels", cls.block_out_channels))

        def per_block(value):
            return tuple(value) if isinstance(value, list | tuple) else (value,) * n

        plain = ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim", "use_linear_projection")
        plain += ("norm_num_groups", "norm_eps", "sample_size", "addition_time_embed_dim")
        lists = ("block_out_channels", "down_block_types", "up_block_types")
        return cls(
            **{key: config[key] for key in plain if config.get(key) is not None},
            **{key: tuple(config[key]) for key in lists if key in config},
            heads=per_block(config.get("attention_head_dim", 8)),  # diffusers: in truth the *number* of heads
            transformer_depth=per_block(config.get("transformer_layers_per_block", 1)),
        )


class Attention(nn.Module):
    """Multi-head attention over pixels (self) or text tokens (cross); its four projections take LoRA."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B S C"], context: Float[Array, "B L D"] | None = None) -> Float[Array, "B S C"]:
        context = x if context is None else context
        width = x.shape[-1]
        q = Dense(width, use_bias=False, dtype=self.dtype, name="to_q")(x)
        k = Dense(width, use_bias=False, dtype=self.dtype, name="to_k")(context)
        v = Dense(width, use_bias=False, dtype=self.dtype, name="to_v")(context)
        return Dense(width, dtype=self.dtype, name="to_out.0")(attention(q, k, v, self.heads))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, GEGLU feed-forward, each with a residual connection."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B S C"], context: Float[Array, "B L D"]) -> Float[Array, "B S C"]:
        norm = [layer_norm(f"norm{i}", dtype=self.dtype) for i in (1, 2, 3)]
        x = x + Attention(self.heads, self.dtype, name="attn1")(norm[0](x))
        x = x + Attention(self.heads, self.dtype, name="attn2")(norm[1](x), context)
        h = Dense(8 * x.shape[-1], dtype=self.dtype, name="ff.net.0.proj")(norm[2](x))
        return x + Dense(x.shape[-1], dtype=self.dtype, name="ff.net.2")(geglu(h))


class Transformer2D(nn.Module):
    """Transformer blocks over the pixels, between two projections and with a residual connection."""

    depth: int
    heads: int
    linear: bool
    groups: int
    dtype: DTypeLike
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], context: Float[Array, "B L D"]) -> Float[Array, "B H W C"]:
        width = x.shape[-1]
        project = Dense if self.linear else pointwise_conv
        h = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x)
        h = project(width, dtype=self.dtype, name="proj_in")(h)
        h = h.reshape(x.shape[0], -1, width)
        for i in range(self.depth):
            block = _rematerialised(TransformerBlock, self.remat)
            h = block(self.heads, self.dtype, name=f"transformer_blocks.{i}")(h, context)
        return x + project(width, dtype=self.dtype, name="proj_out")(h.reshape(x.shape))


def _rematerialised(module: type[nn.Module], on: bool) -> type[nn.Module]:
    return nn.remat(module) if on else module


class UNet(nn.Module):
    """Predicts the noise (or v) in latents x_t at timesteps t, given the prompt's embedding.

    `remat`: the backward pass computes each residual and transformer block's activations again, so that it holds the
    blocks' inputs and one block's activations at a time.
    """

    config: UNetConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def _time_embedding(self, t, added, batch: int) -> Float[Array, "B E"]:
        cfg, width = self.config, 4 * self.config.block_out_channels[0]

        def mlp(name, x):
            h = nn.silu(Dense(width, dtype=self.dtype, name=f"{name}.linear_1")(x))
            return Dense(width, dtype=self.dtype, name=f"{name}.linear_2")(h)

        t = jnp.broadcast_to(t, (batch,))
        temb = mlp("time_embedding", timestep_embedding(t, cfg.block_out_channels[0]))
        if cfg.addition_time_embed_dim:
            pooled, time_ids = added
            sizes = timestep_embedding(time_ids.reshape(-1), cfg.addition_time_embed_dim).reshape(batch, -1)
            temb = temb + mlp("add_embedding", jnp.concatenate([pooled, sizes], axis=-1))
        return temb

    def _resnet(self, features: int, name: str) -> ResnetBlock:
        block = _rematerialised(ResnetBlock, self.remat)
        return block(features, self.config.norm_num_groups, self.config.norm_eps, self.dtype, name=name)

    def _transformer(self, level: int, name: str) -> Transformer2D:
        cfg = self.config
        return Transformer2D(
            cfg.transformer_depth[level],
            cfg.heads[level],
            cfg.use_linear_projection,
            cfg.norm_num_groups,
            self.dtype,
            self.remat,
            name=name,
        )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B h w c"],
        t: Num[Array, "*B"],
        context: Float[Array, "B L D"],
        added: tuple[Float[Array, "B P"], Float[Array, "B 6"]] | None = None,
    ) -> Float[Array, "B h w out"]:
        """Args: `t` a scalar or one per sample, 0..1000; `added` SDXL's (pooled text embedding, time ids)."""
        cfg, last = self.config, len(self.config.block_out_channels) - 1
        temb = self._time_embedding(t, added, x.shape[0])
        context = context.astype(self.dtype)
        x = Conv(cfg.block_out_channels[0], dtype=self.dtype, name="conv_in")(x)
        skips = [x]
        for i, (kind, features) in enumerate(zip(cfg.down_block_types, cfg.block_out_channels, strict=True)):
            block = f"down_blocks.{i}"
            for j in range(cfg.layers_per_block):
                x = self._resnet(features, f"{block}.resnets.{j}")(x, temb)
                if kind == "CrossAttnDownBlock2D":
                    x = self._transformer(i, f"{block}.attentions.{j}")(x, context)
                skips.append(x)
            if i < last:
                x = Conv(features, stride=2, dtype=self.dtype, name=f"{block}.downsamplers.0.conv")(x)
                skips.append(x)

        x = self._resnet(x.shape[-1], "mid_block.resnets.0")(x, temb)
        x = self._transformer(last, "mid_block.attentions.0")(x, context)
        x = self._resnet(x.shape[-1], "mid_block.resnets.1")(x, temb)

        for i, (kind, features) in enumerate(zip(cfg.up_block_types, cfg.block_out_channels[::-1], strict=True)):
            block = f"up_blocks.{i}"
            for j in range(cfg.layers_per_block + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = self._resnet(features, f"{block}.resnets.{j}")(x, temb)
                if kind == "CrossAttnUpBlock2D":
                    x = self._transformer(last - i, f"{block}.attentions.{j}")(x, context)
            if i < last:
                x = Upsample(self.dtype, name=f"{block}.upsamplers.0")(x, skips[-1].shape[1:3])

        x = nn.silu(GroupNorm(cfg.norm_num_groups, cfg.norm_eps, self.dtype, name="conv_norm_out")(x))
        return Conv(cfg.out_channels, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)
