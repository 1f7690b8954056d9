"""In what precision networks compute, and how a gradient survives float16."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffexp_jax import backend

DTYPES = ("float32", "bfloat16", "float16")  # of weights and activations
# Of the products of float32 matrices on an accelerator, in jax's names: on NVIDIA GPUs "default" is TF32, on TPUs one
# pass of bfloat16; "float32" is the full product anywhere. A CPU always makes the full one.
MATMUL_PRECISIONS = ("auto", "default", "bfloat16", "tensorfloat32", "float32")


def matmul_precision(setting: str, dtype: DTypeLike) -> str:
    """What a setting of MATMUL_PRECISIONS means: "auto" gives networks in float32 full float32 products."""
    if setting != "auto":
        return setting
    return "float32" if jnp.dtype(dtype) == jnp.float32 and backend.platform() != "cpu" else "default"


def is_full_float32(setting: str, dtype: DTypeLike) -> bool:
    """Whether networks of this type, with this setting, compute in float32 throughout."""
    if jnp.dtype(dtype) != jnp.float32:
        return False
    return backend.platform() == "cpu" or matmul_precision(setting, dtype) == "float32"


def in_precision(function: Callable, dtype: DTypeLike, matmuls: str = "auto") -> Callable:
    """`function(params, *args)`, a network of this dtype: its matrix products, and its gradient in float16."""
    precision = matmul_precision(matmuls, dtype)

    def at_precision(*args):
        with jax.default_matmul_precision(precision):
            return function(*args)

    network = function if precision == "default" else at_precision
    return with_scaled_gradient(network) if jnp.dtype(dtype) == jnp.float16 else network


def with_scaled_gradient(function: Callable) -> Callable:
    """`function(params, *args)` with a backward pass that does not leave float16's range. `params` get no gradient.

    The gradient that comes in is multiplied by the power of two that brings its largest entry to between 1 and 2, and
    what goes out is divided by it again, in float32: loss scaling (Micikevicius et al. 2018) anew at every call, so
    there is no scale to carry along. Gradients are linear, so this changes their rounding and nothing else.
    """

    @jax.custom_vjp
    def call(params, *args):
        return function(params, *args)

    def forward(params, *args):
        return jax.vjp(lambda *args: function(params, *args), *args)

    def backward(pull_back, gradient):
        largest = jnp.stack([jnp.abs(leaf).max() for leaf in map(jnp.float32, _floats(gradient))]).max()
        exponent = jnp.where(largest > 0, jnp.frexp(largest)[1] - 1, 0)
        scaled = jax.tree.map(lambda x: x if _is_integer(x) else jnp.ldexp(x, -exponent), gradient)
        out = jax.tree.map(lambda x: x if _is_integer(x) else jnp.ldexp(x, exponent), pull_back(scaled))
        return (None, *out)

    call.defvjp(forward, backward)
    return call


def _is_integer(x: Any) -> bool:
    """Whether x is the gradient of an integer input."""
    return x.dtype == jax.dtypes.float0


def _floats(tree: Any) -> list:
    return [leaf for leaf in jax.tree.leaves(tree) if not _is_integer(leaf)]
