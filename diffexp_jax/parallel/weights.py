"""Frozen weights that the devices share out: each holds a part of every large kernel and gathers it where it is used.

All of it happens inside the mapped program: a layer asks for its whole kernel, an all-gather over the axis "data", and
drops it after its product. The backward pass gathers again. So methods, LoRA and checkpoints know nothing of it, and a
device needs about 1 / n of the weights and one layer.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from diffexp_jax.parallel.devices import AXIS, Part

LARGE = 2**18  # numbers that a kernel has at least if it is shared out
_GATHERED = "gathered"


def shared_out(tree: Any, n: int) -> Any:
    """The tree with a `Part` in place of each large kernel that n devices can share evenly; arrays, or their shapes."""

    def one(path: tuple[Any, ...], x: Any) -> Any:
        axes = [axis for axis in range(-x.ndim, 0) if x.shape[axis] % n == 0]
        is_large = path[-1] == jax.tree_util.DictKey("kernel") and x.size >= LARGE
        return Part(x, axes[0]) if n > 1 and is_large and axes else x

    return jax.tree_util.tree_map_with_path(one, tree)


def whole(kernel: Array | Part) -> Array:
    """A layer's kernel, gathered from all devices where each has a part of it."""
    if not isinstance(kernel, Part):
        return kernel
    return checkpoint_name(jax.lax.all_gather(kernel.kernel, AXIS, axis=kernel.axis, tiled=True), _GATHERED)


def gathered_again(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose gradient keeps no gathered kernel but gathers it again; it keeps all else as it would."""
    policy = jax.checkpoint_policies.save_anything_except_these_names(_GATHERED)
    return jax.checkpoint(function, policy=policy)


def has_parts(tree: Any) -> bool:
    """Whether any array of the tree is shared out."""
    return any(isinstance(x, Part) for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Part)))
