"""Products with LoRA's low-rank matrices: (x A) B with float32's digits, whatever type and machine x is on."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def merged_product(
    x: Float[Array, "*B in"], kernel: Float[Array, "in out"], a: Float[Array, "in rank"], b: Float[Array, "rank out"]
) -> Float[Array, "*B out"]:
    """x (W + A B), in one product instead of three: thin products cost a CPU more than their arithmetic.

    The gradients of A and B are of their own size, that of a frozen W is left out by the compiler.
    """
    return x @ (kernel + a @ b)


def _merged_fwd(x, kernel, a, b):
    return merged_product(x, kernel, a, b), (x, kernel, a, b)


def _merged_bwd(saved, g):
    x, kernel, a, b = saved
    dx = g @ (kernel + a @ b).T
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return dx, x.T @ g, x.T @ (g @ b.T), (x @ a).T @ g


merged_product.defvjp(_merged_fwd, _merged_bwd)


@jax.custom_vjp
def joint_product(x: Float[Array, "*B in"], kernels: Sequence[Float[Array, "in _"]]) -> list[Float[Array, "*B _"]]:
    """x W of each W, as one product. Its gradient is one product for each: to join them would be a copy of them all."""
    return _split(x @ jnp.concatenate(kernels, axis=1), kernels)


def _joint_bwd(saved, gs):
    x, kernels = saved
    dx = sum(g @ kernel.T for g, kernel in zip(gs, kernels, strict=True))
    return dx, [_rows(x).T @ _rows(g) for g in gs]  # of frozen kernels, which the compiler leaves out


joint_product.defvjp(lambda x, kernels: (joint_product(x, kernels), (x, kernels)), _joint_bwd)


class Pair(NamedTuple):
    """A layer's low-rank update, float32: it adds (x A) B."""

    a: Float[Array, "in rank"]
    b: Float[Array, "rank out"]


def low_rank(x: Float[Array, "*B in"], pairs: Sequence[Pair]) -> list[Float[Array, "*B _"]]:
    """(x A) B of each pair, in float32 whatever type x has: full products, not an accelerator's faster ones (TF32)."""
    if x.dtype == jnp.bfloat16 and max(pair.a.shape[1] for pair in pairs) <= MOST_OUTER:
        return _low_rank_of_bfloat16(x, pairs)
    x, highest = x.astype(jnp.float32), jax.lax.Precision.HIGHEST
    return [jnp.matmul(jnp.matmul(x, a, precision=highest), b, precision=highest) for a, b in pairs]


MOST_OUTER = 16  # a rank up to which (x A) B is a sum of outer products


@jax.custom_vjp
def _low_rank_of_bfloat16(x, pairs):
    """(x A) B for x in bfloat16: float32's digits from the units that multiply bfloat16.

    x is exact in bfloat16, and so are the gradients that come back; what they are multiplied with is split into three
    bfloat16 numbers, whose products are added in float32. The product with B has as few terms as the rank: as a sum of
    outer products it becomes part of what reads it. Full float32 products run beside a GPU's matrix units; on an H100
    layers with them take 1.1 to 2.8 times as long (docs/evidence/accelerators.md). What several layers do to the same x
    is one product, and so is the gradient of x.
    """
    return _low_rank_fwd(x, pairs)[0]


def _low_rank_fwd(x, pairs):
    matrices = [pair.a for pair in pairs]
    hs = _split(_exact_product(x, jnp.concatenate(matrices, axis=1)), matrices)
    return [_outer(h, pair.b) for h, pair in zip(hs, pairs, strict=True)], (x, hs, pairs)


def _low_rank_bwd(saved, gs):
    x, hs, pairs = saved
    gs = [g.astype(x.dtype) for g in gs]  # exact: the sums that they are gradients of were rounded to that type
    dh = jnp.concatenate([_exact_product(g, pair.b.T) for g, pair in zip(gs, pairs, strict=True)], axis=-1)
    matrices = [pair.a for pair in pairs]
    da = _split(_exact_product(_rows(x).T, _rows(dh)), matrices)
    db = [_exact_product(_rows(g).T, _rows(h)).T for g, h in zip(gs, hs, strict=True)]
    dx = _outer(dh, jnp.concatenate(matrices, axis=1).T).astype(x.dtype)
    return dx, [Pair(*both) for both in zip(da, db, strict=True)]


_low_rank_of_bfloat16.defvjp(_low_rank_fwd, _low_rank_bwd)


def _rows(x: Float[Array, "*B n"]) -> Float[Array, "rows n"]:
    return x.reshape(-1, x.shape[-1])


def _split(x: Float[Array, "*B all"], matrices: Sequence[Float[Array, "_ _"]]) -> list[Float[Array, "*B _"]]:
    """The columns of each matrix, of a product with all of them side by side."""
    ends = list(itertools.accumulate(matrix.shape[1] for matrix in matrices))
    return jnp.split(x, ends[:-1], axis=-1)


def _exact_product(x: Float[Array, "*B in"], y: Float[Array, "in n"]) -> Float[Array, "*B n"]:
    """x y for x in bfloat16 and y in float32, with float32's digits."""
    thirds = []
    for _ in range(3):  # 8 bits each
        thirds.append(jax.lax.reduce_precision(y, exponent_bits=8, mantissa_bits=7))
        y = y - thirds[-1]
    split = jnp.concatenate(thirds, axis=1).astype(x.dtype)
    products = jnp.matmul(x, split, preferred_element_type=jnp.float32)
    return products.reshape(*x.shape[:-1], 3, -1).sum(-2)


def _outer(h: Float[Array, "*B rank"], b: Float[Array, "rank out"]) -> Float[Array, "*B out"]:
    return sum(h[..., k : k + 1] * b[k] for k in range(len(b)))
