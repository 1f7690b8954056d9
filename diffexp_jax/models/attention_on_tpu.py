"""Attention on TPUs by the Pallas kernel that jax ships, forward and gradient: the logits never leave the chip's VMEM.

Of jax's two kernels it is `splash_attention`: for the gradient it keeps one number a query, where `flash_attention`
keeps 256 and reads 384; it makes all three gradients from one exponential of the logits; and it takes heads of any
width. It has no factor for the logits, so the queries bring it.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float

LANES = 128  # a TPU's vectors: lengths are multiples of it, and an array's last axis takes as many in memory
MOST_QUERIES = 512  # of a block
MOST_KEYS = 2**19  # numbers in a block's keys, as wide as they lie in memory
MOST_LOGITS = 1024  # of a query at once
FILLED = -1e30  # logit of a key that fills a block up


def attention_on_tpu(
    q: Float[Array, "B Lq heads d"], k: Float[Array, "B Lk heads d"], v: Float[Array, "B Lk heads d"]
) -> Float[Array, "B Lq heads d"]:
    """Softmax(q k^T / sqrt d) v for bfloat16: float32 exponentials and sums, products of bfloat16.

    Keys that fill up the last block are told by one more number of each head: 1 in a query, 0 in a key, FILLED in such
    a key, whose logit that becomes. (A mask would have to be read for each block.)
    """
    n_queries, n_keys, heads, d = q.shape[1], k.shape[1], *q.shape[2:]
    sizes, queries, keys = blocks_of(n_queries, n_keys, d)
    q = (q.astype(jnp.float32) * d**-0.5).astype(q.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, heads, L, d]
    q, k, v = (_filled(x, n) for x, n in ((q, queries), (k, keys), (v, keys)))
    if keys > n_keys:
        logits = jnp.where(jnp.arange(keys) < n_keys, 0, FILLED).astype(k.dtype)
        q = jnp.concatenate([q, jnp.ones_like(q[..., :1])], axis=-1)
        k = jnp.concatenate([k, jnp.broadcast_to(logits[:, None], (*k.shape[:-1], 1))], axis=-1)
    mask = splash.MultiHeadMask([splash.FullMask((queries, keys))] * heads)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    return _attend(kernel, q, k, v).swapaxes(1, 2)[:, :n_queries]


def blocks_of(n_queries: int, n_keys: int, d: int) -> tuple[splash.BlockSizes, int, int]:
    """The kernel's blocks, and how many queries and keys there are when they are filled up to whole blocks.

    VMEM (16 MiB for a kernel on a v5e) decides: keys and values of a block lie there twice, their gradients in float32,
    and some matrices of logits. As many keys as fit are one block: they are read once, not again for each block of
    queries. Queries, keys and values lie with their length along the vectors (SEQ_MINOR): as the projections' products
    leave them, and a head of 40 takes 48 rows of memory and not 128.
    """
    most = MOST_KEYS // (-(-d // LANES) * LANES)
    n_blocks = 1 if 2 * n_keys <= most else 2 * -(-n_keys // most)  # of keys, for the gradient
    block_q, queries = _divided(n_queries, -(-n_queries // MOST_QUERIES))
    block_kv_dkv, keys = _divided(n_keys, n_blocks)
    block_kv = block_kv_dkv if n_blocks == 1 else 2 * block_kv_dkv
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=math.gcd(block_kv, MOST_LOGITS),
        block_q_dkv=block_q,
        block_kv_dkv=block_kv_dkv,
        block_kv_dkv_compute=math.gcd(block_kv_dkv, MOST_LOGITS),
        use_fused_bwd_kernel=True,
        **dict.fromkeys(("q_layout", "k_layout", "v_layout"), splash.QKVLayout.SEQ_MINOR),
    )
    return sizes, queries, keys


def _divided(n: int, n_blocks: int) -> tuple[int, int]:
    """(length of a block, n filled up to so many of them)."""
    step = LANES if n <= n_blocks * 1024 else 2 * LANES  # the matrices of logits divide it
    size = -(-n // (n_blocks * step)) * step
    return size, n_blocks * size


def _filled(x: Float[Array, "B heads L d"], n: int) -> Float[Array, "B heads n d"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, n - x.shape[2]), (0, 0)))


# The kernel refuses some of jax's default precisions of products, of whoever asks for attention or for its gradient
_AS_WRITTEN = functools.partial(jax.default_matmul_precision, "default")


@jax.custom_vjp
def _attend(
    kernel: Callable,
    q: Float[Array, "B heads Lq d_qk"],
    k: Float[Array, "B heads Lk d_qk"],
    v: Float[Array, "B heads Lk d"],
) -> Float[Array, "B heads Lq d"]:
    with _AS_WRITTEN():
        return jax.vmap(kernel)(q, k, v)


def _attend_fwd(kernel, q, k, v):
    with _AS_WRITTEN():
        return jax.vjp(jax.vmap(kernel), q, k, v)


def _attend_bwd(pull_back, g):
    with _AS_WRITTEN():
        return None, *pull_back(g)


_attend.defvjp(_attend_fwd, _attend_bwd)
