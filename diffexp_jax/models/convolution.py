"""Convolutions, and gradients of those of 3x3 that are fast inside loops on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def conv(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "height width C D"],
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    precision: jax.lax.Precision | None = None,
) -> Float[Array, "B h w D"]:
    """A convolution, channels last; `padding` as ((top, bottom), (left, right))."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout, precision=precision)


@jax.custom_vjp
def conv3x3_same(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B H W D"]:
    """3x3 convolution, stride 1, zero padding 1, whose gradient is fast inside loops on CPU.

    XLA:CPU reaches its fast convolution inside scan/while only for channels-last *forward* convolutions (jax issue
    12868); the transposed ones that autodiff makes are up to 100 x slower there. So the backward pass is written as
    forward convolutions too: of the gradient with the flipped, transposed kernel, and of the input with the gradient.
    """
    return conv(x, kernel, (1, 1), ((1, 1), (1, 1)))


def _conv3x3_fwd(x, kernel):
    return conv3x3_same(x, kernel), (x, kernel)


def _conv3x3_bwd(saved, g):
    x, kernel = saved
    same = ((1, 1), (1, 1))
    dx = conv(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), (1, 1), same)
    # channels play the batch, the batch plays the channels, the gradient is the kernel
    dkernel = conv(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), (1, 1), same)  # [C, 3, 3, D]
    return dx, dkernel.transpose(1, 2, 0, 3)


conv3x3_same.defvjp(_conv3x3_fwd, _conv3x3_bwd)


@jax.custom_vjp
def conv3x3_half(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B h w D"]:
    """3x3 convolution, stride 2, zero padding 1 (h = ceil(H / 2)), whose gradient is fast inside loops on CPU too."""
    return conv(x, kernel, (2, 2), ((1, 1), (1, 1)))


# Row m + a of the gradient (a = 0, 1) meets row 2 m + r of the input (r = 0, 1) by this row of the kernel; 3: by none.
_TAPS = np.array([[1, 2], [3, 0]])  # [a, r]


def _conv3x3_half_fwd(x, kernel):
    return conv3x3_half(x, kernel), (x, kernel)


def _conv3x3_half_bwd(saved, g):
    x, kernel = saved
    (batch, height, width, channels), (h, w) = x.shape, g.shape[1:3]
    taps = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))[_TAPS][:, :, _TAPS]  # [a, r, b, s, C, D]
    taps = taps.transpose(0, 2, 5, 1, 3, 4).reshape(2, 2, g.shape[-1], 4 * channels)
    dx = conv(g, taps, (1, 1), ((0, 1), (0, 1))).reshape(batch, h, w, 2, 2, channels)
    dx = dx.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * h, 2 * w, channels)[:, :height, :width]
    (dkernel,) = jax.vjp(lambda kernel: conv(x, kernel, (2, 2), ((1, 1), (1, 1))), kernel)[1](g)
    return dx, dkernel


conv3x3_half.defvjp(_conv3x3_half_fwd, _conv3x3_half_bwd)
