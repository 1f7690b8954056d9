"""UNet2DConditionModel (Rombach et al. 2022; SDXL: Podell et al. 2023) in diffusers' layout and names."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from diffexp_jax.models.attention import attention
from diffexp_jax.models.blocks import TRANSFORMER_BLOCKS, in_turn
from diffexp_jax.models.layers import (
    Conv,
    Dense,
    GroupNorm,
    LayerNorm,
    ResnetBlock,
    Upsample,
    geglu,
    of_the_same,
    pointwise_conv,
    timestep_embedding,
)
from diffexp_jax.models.unet_config import UNetConfig


class Attention(nn.Module):
    """Multi-head attention over pixels (self) or text tokens (cross); its four projections take LoRA."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B S C"], context: Float[Array, "B L D"] | None = None) -> Float[Array, "B S C"]:
        width = x.shape[-1]
        to_q, to_k, to_v = (Dense(width, False, self.dtype, name=f"to_{name}") for name in "qkv")
        if context is None:
            q, k, v = of_the_same(x, (to_q, to_k, to_v))
        else:
            q, (k, v) = to_q(x), of_the_same(context, (to_k, to_v))
        return Dense(width, dtype=self.dtype, name="to_out.0")(attention(q, k, v, self.heads))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, GEGLU feed-forward, each with a residual connection."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B S C"], context: Float[Array, "B L D"]) -> Float[Array, "B S C"]:
        norm = [LayerNorm(dtype=self.dtype, name=f"norm{i}") for i in (1, 2, 3)]
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
        kinds = [(self.heads, self.dtype)] * self.depth
        (h,) = in_turn(self, TransformerBlock, kinds, (h,), context, name=TRANSFORMER_BLOCKS, remat=self.remat)
        return x + project(width, dtype=self.dtype, name="proj_out")(h.reshape(x.shape))


class UNet(nn.Module):
    """Predicts the noise (or v) in latents x_t at timesteps t, given the prompt's embedding.

    `remat`: the backward pass computes each residual and transformer block's activations again, so that it holds the
    blocks' inputs and one block's activations at a time.
    """

    config: UNetConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def _time_embedding(self, t, added, batch: int) -> Float[Array, "B E"]:
        cfg, width = self.config, self.config.time_width

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
        block = nn.remat(ResnetBlock) if self.remat else ResnetBlock
        return block(features, self.config.norm_num_groups, self.config.norm_eps, self.dtype, name=name)

    def _transformer(self, depth: int, level: int, name: str) -> Transformer2D:
        cfg = self.config
        return Transformer2D(
            depth,
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
            for j, depth in enumerate(cfg.down_depths[i]):
                x = self._resnet(features, f"{block}.resnets.{j}")(x, temb)
                if kind == "CrossAttnDownBlock2D":
                    x = self._transformer(depth, i, f"{block}.attentions.{j}")(x, context)
                skips.append(x)
            if i < last:
                x = Conv(features, stride=2, dtype=self.dtype, name=f"{block}.downsamplers.0.conv")(x)
                skips.append(x)

        if cfg.mid_block_type is not None:
            x = self._resnet(x.shape[-1], "mid_block.resnets.0")(x, temb)
        if cfg.mid_block_type == "UNetMidBlock2DCrossAttn":
            x = self._transformer(cfg.mid_depth, last, "mid_block.attentions.0")(x, context)
            x = self._resnet(x.shape[-1], "mid_block.resnets.1")(x, temb)

        for i, (kind, features) in enumerate(zip(cfg.up_block_types, cfg.block_out_channels[::-1], strict=True)):
            block = f"up_blocks.{i}"
            for j, depth in enumerate(cfg.up_depths[i]):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = self._resnet(features, f"{block}.resnets.{j}")(x, temb)
                if kind == "CrossAttnUpBlock2D":
                    x = self._transformer(depth, last - i, f"{block}.attentions.{j}")(x, context)
            if i < last:
                x = Upsample(self.dtype, name=f"{block}.upsamplers.0")(x, skips[-1].shape[1:3])

        x = GroupNorm(cfg.norm_num_groups, cfg.norm_eps, self.dtype, silu=True, name="conv_norm_out")(x)
        return Conv(cfg.out_channels, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)
