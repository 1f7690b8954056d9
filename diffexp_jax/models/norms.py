"""Group and layer normalisation, statistics in float32, with a gradient of their own on accelerators.

Normalisation is memory traffic alone there. So statistics take one reading of the input and the backward pass two, and
what is kept for it is the input in its own type. A CPU is faster by the plain formula.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from diffexp_jax import backend


class Norm(NamedTuple):
    """What is normalised together: all pixels of each of so many groups of channels; None: a token's channels."""

    groups: int | None
    epsilon: float
    dtype: DTypeLike  # of the result
    silu: bool = False  # y sigmoid(y) of the result y
    centred: bool = True  # False: the mean stays, and the variance is that about 0 (RMSNorm); of tokens alone


def normalise(
    x: Float[Array, "B *S C"],
    scale: Float[Array, "*W C"],
    bias: Float[Array, "*W C"],
    norm: Norm,
    shift: Float[Array, "B C"] | None = None,
) -> Float[Array, "B *S C"]:
    """(x - mean) / sqrt(var + epsilon) scale + bias, by the way that is fast on the machine; of x + shift.

    Scale and bias are a channel's [C], or of each sample [B, 1, C].
    """
    if shift is not None:
        shift = jnp.expand_dims(shift, _space(x))
    return (plain if backend.platform() == "cpu" else of_few_readings)(x, shift, scale, bias, norm)


@partial(jax.jit, static_argnames="norm", inline=True)  # norms alike are traced once
def plain(x: Array, shift: Array | None, scale: Array, bias: Array, norm: Norm) -> Array:
    """The formula as it stands; jax makes its gradient."""
    x = (x if shift is None else x + shift).astype(jnp.float32)
    centred = x - _mean(x, norm) if norm.centred else x
    var = _mean(jnp.square(centred), norm)
    y = (centred * (jax.lax.rsqrt(var + norm.epsilon) * scale) + bias).astype(norm.dtype)
    return jax.nn.silu(y) if norm.silu else y


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def of_few_readings(x: Array, shift: Array | None, scale: Array, bias: Array, norm: Norm) -> Array:
    """As `plain`, but the sum with the shift and the argument of SiLU are not rounded to the types of x and result."""
    return _fwd(x, shift, scale, bias, norm)[0]


def _fwd(x, shift, scale, bias, norm):
    mean, var = statistics(x, shift, norm)
    rstd = jax.lax.rsqrt(var + norm.epsilon)
    y = (x.astype(jnp.float32) - mean) * (rstd * scale) + bias
    return (jax.nn.silu(y) if norm.silu else y).astype(norm.dtype), (x, shift, mean, rstd, scale, bias)


def _bwd(norm, saved, g):
    """With y = scale xhat + bias: dx = rstd (scale dy - mean(scale dy) - xhat mean(scale dy xhat))."""
    x, shift, mean, rstd, scale, bias = saved
    mean, rstd = jax.lax.optimization_barrier((mean, rstd))  # or XLA looks each channel's group up in a small array

    def dy_and_xhat(x, g):
        xhat, dy = (x.astype(jnp.float32) - mean) * rstd, g.astype(jnp.float32)
        if norm.silu:
            y = scale * xhat + bias
            s = jax.nn.sigmoid(y)
            dy = dy * s * (1.0 + y * (1.0 - s))
        return dy, xhat

    dy, xhat = dy_and_xhat(x, g)
    # what nobody reads XLA leaves out: here mostly both
    dscale, dbias = (_summed(of_each, scale.shape) for of_each in (dy * xhat, dy))
    if norm.groups is None:
        mean_dy, mean_dy_xhat = ((scale * of_each).mean(-1, keepdims=True) for of_each in (dy, dy * xhat))
        mean_dy = mean_dy if norm.centred else 0.0
    else:
        of_channels = _means_of_channels(dy, dy * xhat, by_rows=True)
        mean_dy, mean_dy_xhat = (_of_groups(scale * of_each, norm.groups) for of_each in of_channels)
        # the second reading: else XLA would write dy and xhat at the first, in float32, and read them
        dy, xhat = dy_and_xhat(*jax.lax.optimization_barrier((x, g)))
    dx = rstd * (scale * dy - mean_dy - xhat * mean_dy_xhat)
    dshift = None if shift is None else dx.sum(_space(x), keepdims=True).astype(shift.dtype)
    return dx.astype(x.dtype), dshift, dscale.astype(scale.dtype), dbias.astype(bias.dtype)


of_few_readings.defvjp(_fwd, _bwd)


def statistics(x: Array, shift: Array | None, norm: Norm) -> tuple[Array, Array]:
    """(mean - shift, variance) of x + shift, of what is normalised together.

    A token is read once in any case. Of groups, all sums are made at once: of x - s and (x - s)^2, with s a value of
    each channel, so that the digits of small differences between large values stay (Chan et al. 1983). It is the pixel
    in the middle, as those at the border saw a convolution's padding.
    """
    if not norm.centred:
        return jnp.zeros_like(x[..., :1], jnp.float32), _mean(jnp.square(x.astype(jnp.float32)), norm)
    if norm.groups is None:
        mean = _mean(x.astype(jnp.float32), norm)
        return mean, _mean(jnp.square(x.astype(jnp.float32) - mean), norm)
    s = x[:, *(slice(n // 2, n // 2 + 1) for n in x.shape[1:-1])].astype(jnp.float32)
    from_s = x.astype(jnp.float32) - s
    first, second = _means_of_channels(from_s, jnp.square(from_s))
    of_channel, var = s + first + (0.0 if shift is None else shift), second - jnp.square(first)
    mean = _of_groups(of_channel, norm.groups)
    var = _of_groups(var + jnp.square(of_channel - mean), norm.groups)
    return mean - (0.0 if shift is None else shift), jnp.maximum(var, 0.0)


def _means_of_channels(*arrays: Float[Array, "B *S C"], by_rows: bool = False) -> list[Float[Array, "B *ones C"]]:
    """Each array's means over space, by one reduction of them all, so that what they are made of is read once.

    `by_rows`: over the last axis of space first, and then the others. XLA for GPUs takes what the arrays are made of
    into such a reduction where it would write the arrays and read them otherwise, if they take some arithmetic.
    """

    def add(xs, ys):
        return tuple(x + y for x, y in zip(xs, ys, strict=True))

    space, pixels = _space(arrays[0]), arrays[0].shape[1:-1]
    sums = jax.lax.reduce(arrays, (np.float32(0.0),) * len(arrays), add, space[-1:] if by_rows else space)
    if by_rows:
        sums = [row.sum(space[:-1]) for row in jax.lax.optimization_barrier(sums)]
    return [jnp.expand_dims(total / math.prod(pixels), space) for total in sums]


def _mean(x: Float[Array, "B *S C"], norm: Norm) -> Array:
    """Of what is normalised together, with x's axes. Over space first: channels stay the minor axis of large arrays."""
    if norm.groups is None:
        return jnp.expand_dims(x.mean(-1), -1)
    return jnp.expand_dims(_of_groups(x.mean(_space(x)), norm.groups), _space(x))


def _of_groups(per_channel: Float[Array, "*B C"], groups: int) -> Float[Array, "*B C"]:
    """The mean of each group's channels, for all of them."""
    *lead, channels = per_channel.shape
    return per_channel.reshape(*lead, groups, -1).mean(-1).repeat(channels // groups, axis=-1)


def _summed(x: Array, shape: tuple[int, ...]) -> Array:
    """x summed over the axes along which an array of this shape is repeated beside it."""
    lead = x.ndim - len(shape)
    return x.sum([*range(lead), *(lead + i for i, n in enumerate(shape) if n == 1)]).reshape(shape)


def _space(x: Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim - 1))
