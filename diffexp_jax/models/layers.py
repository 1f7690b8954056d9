"""Building blocks that the UNet, the VAE and the CLIP towers share.

Every submodule carries the name that the PyTorch checkpoints use, dots included ("to_out.0"), so that the path of a
parameter joined by dots *is* its checkpoint name (see `convert.py`).
"""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from diffexp_jax import backend
from diffexp_jax.models.convolution import conv, conv3x3_half, conv3x3_same
from diffexp_jax.models.low_rank import Pair, joint_product, low_rank, merged_product
from diffexp_jax.models.norms import Norm, normalise
from diffexp_jax.parallel import Part, by_parts

# ----------------------------------------------------------------------------------------------------------- functions


def quick_gelu(x: Array) -> Array:
    """OpenAI's approximation x * sigmoid(1.702 x), used by CLIP L/14."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """The exact GELU, x times the normal distribution's cdf."""
    return (x * _normal_cdf(x)).astype(x.dtype)


def _normal_cdf(x: Array) -> Array:
    """In float32, by erf, as torch computes it: by erfc, as in jax's gelu, it takes a CPU twice as long."""
    return 0.5 * (1.0 + jax.lax.erf(x.astype(jnp.float32) * math.sqrt(0.5)))


@jax.custom_vjp
def geglu(x: Float[Array, "*B twice"]) -> Float[Array, "*B half"]:
    """The first half times the second's GELU (Shazeer 2020), in float32. Keeps its input alone for the gradient."""
    h, gate = _halves(x)
    return (h * gelu(gate)).astype(x.dtype)


def _halves(x: Float[Array, "*B twice"]) -> tuple[Float[Array, "*B half"], ...]:
    """In float32. Cast before they are split, a TPU's product would write all of x in float32."""
    return tuple(half.astype(jnp.float32) for half in jnp.split(x, 2, axis=-1))


def _geglu_bwd(x, g):
    h, gate = _halves(x)
    cdf = _normal_cdf(gate)
    slope = cdf + gate * jnp.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
    return (jnp.concatenate([g * gate * cdf, g * h * slope], axis=-1).astype(x.dtype),)


geglu.defvjp(lambda x: (geglu(x), x), _geglu_bwd)


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


@jax.custom_vjp
def gelu_tanh(x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """GELU by tanh (Hendrycks & Gimpel 2016), in float32. Keeps its input alone for the gradient."""
    return _gelu_tanh(x)


gelu_tanh.defvjp(lambda x: (_gelu_tanh(x), x), lambda x, g: jax.vjp(_gelu_tanh, x)[1](g))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": gelu, "silu": jax.nn.silu}


def timestep_embedding(
    t: Num[Array, "B"], width: int, freqs: Float[Array, " half"] | None = None
) -> Float[Array, "B width"]:
    """Sinusoids of the timestep, cosine half first (diffusers: flip_sin_to_cos=True, freq_shift=0).

    `t` is in training-timestep units (0..1000); odd widths get a zero column, as in diffusers. `freqs` are the angles
    of t = 1; None: 10000^(-i / half), as the device rounds them.
    """
    half = width // 2
    if freqs is None:
        freqs = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * freqs[None]
    emb = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(emb, ((0, 0), (0, width - 2 * half)))


# --------------------------------------------------------------------------------------------------------- convolution


class Conv(nn.Module):
    """2-D convolution, NHWC; `padding` as ((top, bottom), (left, right)). Takes LoRA as `Dense` does."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w features"]:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = param(self, "kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        x = x.astype(self.dtype)
        if self.kernel_size == self.stride == 1:
            y = product(self, x, kernel[0, 0])  # as a matrix product: four times as fast on CPU
        else:
            y = self._convolved(x, kernel)
            if self.has_variable("lora", "A"):  # [height, width, in, rank] and [1, 1, rank, out]
                a, b = (self.get_variable("lora", name) for name in ("A", "B"))
                h = self._convolved(x.astype(jnp.float32), a, jax.lax.Precision.HIGHEST)
                y = (y + jnp.matmul(h, b[0, 0], precision=jax.lax.Precision.HIGHEST)).astype(self.dtype)
        if self.use_bias:
            y = y + param(self, "bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y

    def _convolved(self, x: Array, kernel: Array, precision: jax.lax.Precision | None = None) -> Array:
        on_cpu = {1: conv3x3_same, 2: conv3x3_half} if backend.platform() == "cpu" else {}
        if self.kernel_size == 3 and self.padding == ((1, 1), (1, 1)) and self.stride in on_cpu:
            return on_cpu[self.stride](x, kernel)
        return conv(x, kernel, (self.stride, self.stride), self.padding, precision)


def pointwise_conv(features: int, **kwargs) -> Conv:
    """1x1 convolution."""
    return Conv(features, kernel_size=1, padding=((0, 0), (0, 0)), **kwargs)


# -------------------------------------------------------------------------------------------------------------- modules


def param(layer: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> Array:
    """`layer.param` without its check of the shape, which traces `init`: up to a fifth of the time to trace a program.

    Loading has compared the shapes (`convert.from_torch`).
    """
    return layer.get_variable("params", name) if layer.has_variable("params", name) else layer.param(name, init, shape)


def product(layer: nn.Module, x: Array, kernel: Array | Part) -> Array:
    """x W [*B, out] of x [*B, in], and (x A) B where the variable collection "lora" holds A and B for the layer.

    W [in, out] may be a `Part` of one; it is cast to the type of x.
    """
    pair, shared = _pair(layer), isinstance(kernel, Part)
    if pair is not None and not shared and x.dtype == jnp.float32 and backend.platform() == "cpu":
        return merged_product(x, kernel.astype(x.dtype), *pair)
    y = by_parts(x, kernel) if shared else x @ kernel.astype(x.dtype)
    return y if pair is None else (y + low_rank(x, [pair])[0]).astype(x.dtype)


def _pair(layer: nn.Module) -> Pair | None:
    if not layer.has_variable("lora", "A"):
        return None
    a, b = (layer.get_variable("lora", name) for name in ("A", "B"))
    return Pair(a.reshape(a.shape[-2:]), b.reshape(b.shape[-2:]))  # a 1x1 convolution's are [1, 1, ...]


class Dense(nn.Module):
    """Linear layer that adds its low-rank update when the variable collection "lora" holds one for it.

    y = x W + b + (x A) B with A [in, rank], B [rank, out] (LoRA, Hu et al. 2021). The factor alpha / rank is already
    in B (`lora.scaled`). Without the collection this is the plain layer.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B in"]) -> Float[Array, "*B features"]:
        kernel = param(self, "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        return self.with_bias(product(self, x, kernel))

    def with_bias(self, y: Float[Array, "*B features"]) -> Float[Array, "*B features"]:
        """y + b where the layer has a bias."""
        if not self.use_bias:
            return y
        return y + param(self, "bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)


def of_the_same(x: Float[Array, "*B in"], layers: Sequence[Dense]) -> list[Float[Array, "*B _"]]:
    """[layer(x) for layer in layers]; on an accelerator as one product where all of them have LoRA."""
    pairs, kernels = [_pair(layer) for layer in layers], [layer.get_variable("params", "kernel") for layer in layers]
    if backend.platform() == "cpu" or None in pairs or any(isinstance(kernel, Part) for kernel in kernels):
        return [layer(x) for layer in layers]
    dtype = layers[0].dtype
    x, kernels = x.astype(dtype), [kernel.astype(dtype) for kernel in kernels]
    both = zip(joint_product(x, kernels), low_rank(x, pairs), layers, strict=True)
    return [layer.with_bias((y + own).astype(dtype)) for y, own, layer in both]


class GroupNorm(nn.Module):
    """Group normalisation of x (+ shift), statistics in float32, and SiLU after it where `silu`."""

    groups: int
    epsilon: float
    dtype: DTypeLike = jnp.float32
    silu: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B *S C"], shift: Float[Array, "B C"] | None = None) -> Float[Array, "B *S C"]:
        norm = Norm(self.groups, self.epsilon, self.dtype, self.silu)
        return normalise(x, *_scale_and_bias(self, x), norm, shift)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis with torch's default epsilon, statistics in float32."""

    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B *S C"]) -> Float[Array, "B *S C"]:
        return normalise(x, *_scale_and_bias(self, x), Norm(None, self.epsilon, self.dtype))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) scale over the last axis (Zhang & Sennrich 2019), statistics in float32."""

    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B *S C"]) -> Float[Array, "B *S C"]:
        scale = param(self, "scale", nn.initializers.ones, x.shape[-1:])
        return normalise(x, scale, jnp.zeros(x.shape[-1]), Norm(None, self.epsilon, self.dtype, centred=False))


def _scale_and_bias(layer: nn.Module, x: Float[Array, "*B C"]) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    inits = {"scale": nn.initializers.ones, "bias": nn.initializers.zeros}
    return tuple(param(layer, name, init, x.shape[-1:]) for name, init in inits.items())


class ResnetBlock(nn.Module):
    """diffusers' ResnetBlock2D: norm, silu, conv, (+ time embedding), norm, silu, conv, + shortcut."""

    features: int
    groups: int
    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], temb: Float[Array, "B E"] | None = None
    ) -> Float[Array, "B H W features"]:
        h = GroupNorm(self.groups, self.epsilon, self.dtype, silu=True, name="norm1")(x)
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        shift = None
        if temb is not None:
            shift = Dense(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(temb))
        h = GroupNorm(self.groups, self.epsilon, self.dtype, silu=True, name="norm2")(h, shift)
        h = Conv(self.features, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = pointwise_conv(self.features, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class Upsample(nn.Module):
    """Nearest-neighbour enlargement to `size` (H, W), then a 3x3 convolution."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], size: tuple[int, int]) -> Float[Array, "B H W C"]:
        if size == (2 * x.shape[1], 2 * x.shape[2]):
            x = x.repeat(2, axis=1).repeat(2, axis=2)
        else:  # a skip connection of odd size: the index rule of torch's "nearest"
            x = x[:, jnp.arange(size[0]) * x.shape[1] // size[0]][:, :, jnp.arange(size[1]) * x.shape[2] // size[1]]
        return Conv(x.shape[-1], dtype=self.dtype, name="conv")(x)
