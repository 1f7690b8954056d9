"""Blocks of a network, one after the other: each in the program for itself, or equal ones as a loop of one.

A program that holds one block in place of 38 compiles in a fraction of the time. The loop reads parameters that are
stacked: what `stacked` makes of a parameter tree on its way to the devices is all that a network goes by (`in_turn`).
Files, LoRA collections and checkpoints know nothing of it.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array

from diffexp_jax.formats.convert import empty_aligned

TRANSFORMER_BLOCKS = "transformer_blocks"  # what most networks call them, before the number
# What encoders of text and images call theirs: CLIP's, T5's, BERT's, timm's
CLIP_LAYERS, T5_BLOCKS, BERT_LAYERS, VIT_BLOCKS = "encoder.layers", "encoder.block", "encoder.layer", "blocks"
OF_ENCODERS = (CLIP_LAYERS, T5_BLOCKS, BERT_LAYERS, VIT_BLOCKS)


class Stack:
    """Equal arrays of the host as one with a leading axis, which is made where it is read: one at a time, not a model.

    Of shapes it has the shape alone.
    """

    def __init__(self, *arrays: Any):
        self._arrays = arrays
        self.shape, self.dtype = (len(arrays), *arrays[0].shape), arrays[0].dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.stack(self._arrays, out=empty_aligned(self.shape, self.dtype))


def stacked(params: Mapping[str, Any], blocks: Sequence[str], *, at_least: int) -> dict[str, Any]:
    """The parameter tree with each run of so many equal blocks, or more, as one whose leaves are `Stack`s.

    Blocks are equal whose parameters have the same names, shapes and types. Leaves may be shapes, and `Part`s.

    Args:
      blocks: names of blocks, anywhere in the tree, which the network applies by `in_turn`.
    """

    def place(name):  # "transformer_blocks.10" comes after the second
        before, _, number = name.rpartition(".")
        return (before, int(number)) if before in blocks else (name, 0)

    def kind(name):
        before, _ = place(name)
        leaves, structure = jax.tree.flatten(params[name])
        return None if before == name else (before, structure, [(x.shape, x.dtype) for x in leaves])

    def deeper(tree):
        return stacked(tree, blocks, at_least=at_least) if isinstance(tree, Mapping) else tree

    out: dict[str, Any] = {}
    for equal, run in itertools.groupby(sorted(params, key=place), kind):
        names = list(run)
        if equal is not None and len(names) >= at_least:
            out[_name_of_run(names[0])] = jax.tree.map(Stack, *(params[name] for name in names))
        else:
            out |= {name: deeper(params[name]) for name in names}
    return out


def _name_of_run(first: str) -> str:
    return f"{first}+"


def in_turn(
    network: nn.Module,
    block: type[nn.Module],
    kinds: Sequence[tuple[Any, ...]],
    carry: tuple[Array, ...],
    *args: Any,
    name: str,
    remat: bool = False,
) -> tuple[Array, ...]:
    """What the last block gives, where the first one is given `carry` and every other what is before it gives.

    Args:
      network: the module that is being called, whose blocks these are.
      block: block(*kind)(*carry, *args) is the next carry, or the array where there is one alone.
      kinds: of each block, its module's fields.
      args: the same for every block.
      name: the blocks', without their numbers.
      remat: the backward pass computes a block's activations again.
    """
    alone, i = nn.remat(block) if remat else block, 0
    while i < len(kinds):
        run = _name_of_run(f"{name}.{i}")
        if network.has_variable("params", run):
            params = network.get_variable("params", run)
            n = len(jax.tree.leaves(params)[0])
            lora = [network.get_variable("lora", f"{name}.{i + j}", {}) for j in range(n)]
            carry = _loop(block(*kinds[i], parent=None), params, stacked_lora(lora), carry, args, remat)
            i += n
        else:
            carry = _tuple(alone(*kinds[i], name=f"{name}.{i}")(*carry, *args))
            i += 1
    return carry


def _loop(
    block: nn.Module, params: Any, lora: Any, carry: tuple[Array, ...], args: tuple[Any, ...], remat: bool
) -> tuple[Array, ...]:
    def one(carry, variables):
        return _tuple(block.apply(variables, *carry, *args)), None

    # nothing outside of a loop is computed once for both passes: no barrier has to prevent it
    one = jax.checkpoint(one, prevent_cse=False) if remat else one
    return jax.lax.scan(one, carry, {"params": params, "lora": lora})[0]


def _tuple(out: Array | tuple[Array, ...]) -> tuple[Array, ...]:
    return out if isinstance(out, tuple) else (out,)


def stacked_lora(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The LoRA collections of equal blocks as one, whose arrays have a leading axis.

    Where a block lacks a pair that another has, or has one of a smaller rank, zeros are in its place: they add nothing.
    """
    flat = [traverse_util.flatten_dict(block) for block in blocks]
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
    for path, x in itertools.chain.from_iterable(block.items() for block in flat):
        shapes[path] = tuple(map(max, x.shape, shapes.get(path, x.shape)))

    def filled(x, shape):
        return jnp.zeros(shape) if x is None else jnp.pad(x, [(0, shape[i] - n) for i, n in enumerate(x.shape)])

    return traverse_util.unflatten_dict(
        {path: jnp.stack([filled(block.get(path), shape) for block in flat]) for path, shape in shapes.items()}
    )
