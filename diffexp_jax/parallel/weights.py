"""Frozen weights that the devices share out: each holds a part of every large kernel and gathers it where it is used.

All of it happens inside the mapped program: a layer's product gathers its kernel from the axis "data" and drops it. The
backward pass gathers it again. So methods, LoRA and checkpoints know nothing of it, and a device needs about 1 / n of
the weights and one layer.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffexp_jax.parallel.devices import AXIS, Part

LARGE = 2**18  # numbers that a kernel has at least if it is shared out


def shared_out(tree: Any, n: int) -> Any:
    """The tree with a `Part` in place of each large matrix of a layer that n devices can share evenly.

    Its leaves are arrays, or their shapes. Convolutions stay whole: networks that no device can hold have none.
    """

    def one(path: tuple[Any, ...], x: Any) -> Any:
        axes = [axis for axis in range(-x.ndim, 0) if x.shape[axis] % n == 0]
        is_large = path[-1] == jax.tree_util.DictKey("kernel") and x.ndim == 2 and x.size >= LARGE
        return Part(x, axes[0]) if n > 1 and is_large and axes else x

    return jax.tree_util.tree_map_with_path(one, tree)


def by_parts(x: Float[Array, "*B in"], part: Part) -> Float[Array, "*B out"]:
    """x W, where W [in, out] is gathered for the product and dropped after it.

    Only x has a gradient, for which W is gathered again: a `Part` is frozen.
    """
    axis = part.axis

    @jax.custom_vjp
    def product(x, kernel):
        return x @ _gathered(kernel, axis, after=x)

    def forward(x, kernel):
        return product(x, kernel), kernel

    def backward(kernel, g):
        return g @ _gathered(kernel, axis, after=g).T, None

    product.defvjp(forward, backward)
    return product(x, part.kernel)


def _gathered(kernel: Array, axis: int, *, after: Array) -> Array:
    """The whole kernel in the type of `after`, gathered once `after` is there.

    XLA would gather many layers' kernels in advance. So a zero is added to the part that has to be computed from
    `after`. An optimisation barrier does not help: XLA:GPU drops it before it orders its kernels.
    """
    zero = jnp.minimum(jnp.abs(after.ravel()[0]), 0.0).astype(kernel.dtype)
    return jax.lax.all_gather(kernel + zero, AXIS, axis=axis, tiled=True).astype(after.dtype)
