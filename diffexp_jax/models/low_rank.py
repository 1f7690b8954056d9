"""Products with LoRA's low-rank matrices: (x A) B with float32's digits, whatever type and machine x is on."""

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


def low_rank(
    x: Float[Array, "*B in"], a: Float[Array, "in rank"], b: Float[Array, "rank out"]
) -> Float[Array, "*B out"]:
    """(x A) B in float32, whatever type x has: full products, not an accelerator's faster ones (TF32, bfloat16)."""
    if x.dtype == jnp.bfloat16 and a.shape[1] <= MOST_OUTER:
        return _low_rank_of_bfloat16(x, a, b)
    highest = jax.lax.Precision.HIGHEST
    return jnp.matmul(jnp.matmul(x.astype(jnp.float32), a, precision=highest), b, precision=highest)


MOST_OUTER = 16  # a rank up to which (x A) B is a sum of outer products


@jax.custom_vjp
def _low_rank_of_bfloat16(x, a, b):
    """(x A) B for x in bfloat16: float32's digits from the units that multiply bfloat16.

    x is exact in bfloat16, and so is the gradient that comes back; what they are multiplied with is split into three
    bfloat16 numbers, whose products are added in float32. The product with B has as few terms as the rank: as a sum of
    outer products it becomes part of what reads it. Full float32 products run beside a GPU's matrix units; on an H100
    layers with them take 1.1 to 2.8 times as long (docs/evidence/accelerators.md).
    """
    return _low_rank_fwd(x, a, b)[0]


def _low_rank_fwd(x, a, b):
    h = _exact_product(x, a)
    return _outer(h, b), (x, h, a, b)


def _low_rank_bwd(saved, g):
    x, h, a, b = saved
    g = g.astype(x.dtype)  # exact: the sum that it is the gradient of was rounded to that type
    rows, slopes = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    dh = _exact_product(g, b.T)
    da = _exact_product(rows.T, dh.reshape(len(rows), -1))
    db = _exact_product(slopes.T, h.reshape(len(rows), -1)).T
    return _outer(dh, a.T).astype(x.dtype), da, db


_low_rank_of_bfloat16.defvjp(_low_rank_fwd, _low_rank_bwd)


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
