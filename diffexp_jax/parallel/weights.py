"""Frozen weights that the devices share out: each holds a part of every large kernel and gathers it where it is used.

All of it happens inside the mapped program: a layer's product gathers its kernel from the axis "data" and drops it. The
backward pass gathers it again. So methods, LoRA and checkpoints know nothing of it, and a device needs about 1 / n of
the weights and one layer.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffexp_jax.parallel.devices import AXIS, Part, first, pmap, share

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


def by_all_devices(function: Callable, params: Any) -> Callable:
    """args -> function(params, args) as host arrays, by the devices of all hosts; `params` may have `Part`s.

    All of them compute the same, so every host has to call it, with the same args.
    """
    compiled = pmap(function, in_axes=(0, None))
    params = share(params)
    return lambda args: first(compiled(params, args))


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
    """The whole kernel in the type of `after`, gathered once `after` is there: XLA would gather many in advance."""
    return jax.lax.all_gather(waiting(kernel, after=after), AXIS, axis=axis, tiled=True).astype(after.dtype)


def waiting(x: Array, *, after: Array) -> Array:
    """x, computed once `after` is there.

    A zero that has to be computed from `after` is added to it. An optimisation barrier does not help: XLA:GPU drops it
    before it orders its kernels. So a layer of what is known early, as of the timestep, is gathered at its place.
    """
    return x + jnp.minimum(jnp.abs(jax.lax.stop_gradient(after).ravel()[0]), 0.0).astype(x.dtype)
