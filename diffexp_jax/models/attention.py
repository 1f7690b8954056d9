"""Multi-head attention: exact everywhere, by the way that is fast on the machine."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from diffexp_jax import backend

MAX_LOGITS = 2**20  # per image and head that `attention` may hold at once without a fused kernel: 4 MB in float32
MIN_FUSED_LOGITS = 70_000  # fewer of them are not worth a fused kernel: CLIP's 257 to 257; 1024 pixels to 77 are


def attention(
    q: Float[Array, "B Lq width"],
    k: Float[Array, "B Lk width"],
    v: Float[Array, "B Lk width"],
    heads: int,
    *,
    is_causal: bool = False,
    **kwargs,
) -> Float[Array, "B Lq width"]:
    """Multi-head scaled dot-product attention (softmax in float32); `kwargs` go to `jax.nn.dot_product_attention`.

    Exact in five ways: `attention_on_cpu`; on GPUs cuDNN's fused kernel and on TPUs, in bfloat16, `attention_on_tpu`,
    which never hold the logits; blocks of queries one after another where there are more than MAX_LOGITS logits; all at
    once. The last two are float32 within, see `_in_float32`, but for bfloat16 factors of products where all is at once.
    Causal or masked attention (prompts: some 77 tokens) is all at once in the type of q.
    """

    def split(x):
        return x.reshape(*x.shape[:-1], heads, -1)  # [B, L, heads, width/heads]

    dtype, q, k, v = q.dtype, split(q), split(k), split(v)
    logits = q.shape[1] * k.shape[1]
    if q.dtype == jnp.float16 and backend.platform() != "gpu":  # CPUs and TPUs have no such product
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    if is_causal or kwargs:
        out = jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, **kwargs)
    elif backend.platform() == "cpu":
        out = attention_on_cpu(q, k, v)
    elif logits >= MIN_FUSED_LOGITS and has_fused_attention(q.dtype, q.shape[-1]):
        out = attention_of_even_length(q, k, v, implementation="cudnn")
    elif logits >= MIN_FUSED_LOGITS and q.dtype == jnp.bfloat16 and backend.platform() == "tpu":
        from diffexp_jax.models.attention_on_tpu import attention_on_tpu  # Pallas: a second to import

        out = attention_on_tpu(q, k, v)
    elif logits > MAX_LOGITS:
        out = _attention_in_blocks(q, k, v)
    else:
        out = (_products_of_bfloat16 if q.dtype == jnp.bfloat16 else _in_float32)(q, k, v)
    return out.reshape(*out.shape[:2], -1).astype(dtype)


def has_fused_attention(dtype: DTypeLike, width: int) -> bool:
    """Whether cuDNN's attention serves this machine's devices (Ampere or newer), with this type and width of a head.

    Its limits, which jax checks too: 16 bits, a multiple of 8 up to 128 (wider on newer devices, not used). So SDXL's
    heads (64) and SD 1.5's of 40 and 80 are fused. SD 1.5's heads of 160 have too few tokens to need it.
    """
    if dtype not in (jnp.bfloat16, jnp.float16) or width % 8 or width > 128:
        return False
    return (backend.cuda_capability() or (0, 0)) >= (8, 0)


def attention_of_even_length(
    q: Float[Array, "B Lq heads d"], k: Float[Array, "B Lk heads d"], v: Float[Array, "B Lk heads d"], **kwargs
) -> Float[Array, "B Lq heads d"]:
    """`jax.nn.dot_product_attention` of any number of queries and keys, also for cuDNN under `vmap` and its gradient.

    cuDNN has no gradient for odd lengths, and a prompt has 77 tokens: an odd number of queries or keys is filled up to
    an even one. The further key is masked by its length, the further query is cut off again, so the result is the same.
    """
    n_queries, n_keys = q.shape[1], k.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    all_of_them = sum(x[:, 0, 0, 0].astype(jnp.int32) for x in (q, k, v))
    q, k, v = (_depending_on(all_of_them, x) for x in (q, k, v))
    if n_keys % 2:
        zeros = all_of_them * 0
        kwargs |= {"query_seq_lengths": q.shape[1] + zeros, "key_value_seq_lengths": n_keys + zeros}
    # the output too: so that its gradient has the batch axis
    return _depending_on(all_of_them, jax.nn.dot_product_attention(q, k, v, **kwargs))[:, :n_queries]


@jax.custom_vjp
def _depending_on(numbers: Int[Array, "B"], x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """x, and in the backward pass its gradient, as what depends on `numbers`, for `vmap`; XLA removes all of it.

    jax 0.10's rule for cuDNN's attention under `vmap` takes queries, keys, values and lengths to be batched, or none
    of them, and fails where some are (0.11 repeats what is not). What is kept for the gradient are the numbers: of a
    condition that was made before, XLA would not know that it always holds, and would read and write x once more.
    """
    return jnp.where(numbers.reshape(-1, *[1] * (x.ndim - 1)) * 0 == 0, x, 0)


_depending_on.defvjp(
    lambda numbers, x: (_depending_on(numbers, x), numbers), lambda numbers, g: (None, _depending_on(numbers, g))
)


def _in_float32(
    q: Float[Array, "B Lq heads d"], k: Float[Array, "B Lk heads d"], v: Float[Array, "B Lk heads d"]
) -> Float[Array, "B Lq heads d"]:
    """`jax.nn.dot_product_attention` with all that is between its products in float32, the gradient's too.

    In bfloat16 jax rounds the gradient of the weights, of which softmax makes a small difference of large numbers;
    fused kernels keep it in float32.
    """
    return jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)))


@jax.custom_vjp
def _products_of_bfloat16(
    q: Float[Array, "B Lq heads d"], k: Float[Array, "B Lk heads d"], v: Float[Array, "B Lk heads d"]
) -> Float[Array, "B Lq heads d"]:
    """As `_in_float32`, with factors of products rounded to bfloat16, as fused kernels do; sums stay float32.

    The gradient makes the weights again from queries and keys, in float32: what it keeps is half as large as one of
    them, and their slopes are differences of large numbers.
    """
    return _bfloat16_fwd(q, k, v)[0]


def _product(equation: str, *factors: Array) -> Array:
    return jnp.einsum(equation, *factors, preferred_element_type=jnp.float32)


def _weights(q: Array, k: Array) -> Float[Array, "B heads Lq Lk"]:
    return jax.nn.softmax(_product("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5)


def _bfloat16_fwd(q, k, v):
    out = _product("bhqk,bkhd->bqhd", _weights(q, k).astype(q.dtype), v)
    return out.astype(q.dtype), (q, k, v)


def _bfloat16_bwd(saved, g):
    q, k, v = saved
    weights, slopes = _weights(q, k), _product("bqhd,bkhd->bhqk", g, v)
    dlogits = weights * (slopes - (weights * slopes).sum(-1, keepdims=True)) * q.shape[-1] ** -0.5
    dlogits, weights = dlogits.astype(q.dtype), weights.astype(q.dtype)
    dq, dk = _product("bhqk,bkhd->bqhd", dlogits, k), _product("bhqk,bqhd->bkhd", dlogits, q)
    dv = _product("bhqk,bqhd->bkhd", weights, g)
    return tuple(x.astype(q.dtype) for x in (dq, dk, dv))


_products_of_bfloat16.defvjp(_bfloat16_fwd, _bfloat16_bwd)


def _attention_in_blocks(
    q: Float[Array, "B Lq heads d"], k: Float[Array, "B Lk heads d"], v: Float[Array, "B Lk heads d"]
) -> Float[Array, "B Lq heads d"]:
    """Exact attention that holds at most MAX_LOGITS logits per image and head, in the backward pass too."""
    n_blocks = min(-(-q.shape[1] * k.shape[1] // MAX_LOGITS), q.shape[1])
    size = -(-q.shape[1] // n_blocks)
    padded = jnp.pad(q, ((0, 0), (0, n_blocks * size - q.shape[1]), (0, 0), (0, 0)))
    blocks = padded.reshape(len(q), n_blocks, size, *q.shape[2:]).swapaxes(0, 1)  # [blocks, B, size, heads, d]
    # the gradients of keys and values are sums over the blocks: taken in float32, whatever the type is
    k32, v32 = k.astype(jnp.float32), v.astype(jnp.float32)

    @jax.checkpoint  # or the scan would keep every block's weights for the backward pass: the whole matrix again
    def one(block):
        return _in_float32(block, k32, v32).astype(block.dtype)

    out = jax.lax.map(one, blocks).swapaxes(0, 1)
    return out.reshape(padded.shape)[:, : q.shape[1]]


# ----------------------------------------------------------------------------------------------------------- on a CPU

CPU_LOGITS = 2**23  # of a batch, all heads, that are made at once: 32 MB; more are made a block at a time
CPU_ROWS = 512  # queries of a block, of one image and head: with 1024 keys 2 MB, about what a core's cache holds


def attention_on_cpu(
    q: Float[Array, "B Lq heads d"], k: Float[Array, "B Lk heads d"], v: Float[Array, "B Lk heads d"]
) -> Float[Array, "B Lq heads d"]:
    """Softmax(q k^T / sqrt d) v in float32, three to six times as fast on a CPU as `jax.nn.dot_product_attention`.

    The logits stay in the cache, the sum of a row divides the output and not its weights, and the gradient makes the
    weights again from the row's logsumexp (FlashAttention, Dao et al. 2022). The products are written so that XLA:CPU
    never transposes a matrix of weights, which takes it several times as long as the product.
    """
    batch, n_queries, heads, d = q.shape
    n_blocks = -(-n_queries // CPU_ROWS) if batch * heads * n_queries * k.shape[1] > CPU_LOGITS else 1
    size = -(-n_queries // n_blocks)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    q = jnp.pad(q * d**-0.5, ((0, 0), (0, n_blocks * size - n_queries), (0, 0), (0, 0)))
    rows = q.swapaxes(1, 2).reshape(batch * heads, n_blocks, size, d)
    columns = [x.transpose(0, 2, 3, 1).reshape(batch * heads, d, -1) for x in (k, v)]
    out = _softmax_product(rows, *columns).reshape(batch, heads, -1, d)
    return out.swapaxes(1, 2)[:, :n_queries]


@jax.custom_vjp
def _softmax_product(
    q: Float[Array, "N blocks rows d"], k: Float[Array, "N d Lk"], v: Float[Array, "N d Lk"]
) -> Float[Array, "N blocks rows d"]:
    """softmax(q k) v^T, of each n and block of rows."""
    return _softmax_product_fwd(q, k, v)[0]


def _softmax_product_fwd(q, k, v):
    def block(q, k, v):  # [N, rows, d], [N, d, Lk] twice
        logits = q @ k
        most = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - most)
        total = weights.sum(-1, keepdims=True)
        return (weights @ v.swapaxes(1, 2)) / total, most + jnp.log(total)

    out, lse = _each_block(block, (q,), (k, v))
    return out, (q, k, v, out, lse)


def _softmax_product_bwd(saved, g):
    q, k, v, out, lse = saved

    def block(q, out, lse, g, k, v):
        weights = jnp.exp(q @ k - lse)
        dlogits = weights * (g @ v - (g * out).sum(-1, keepdims=True))
        return dlogits @ k.swapaxes(1, 2), q.swapaxes(1, 2) @ dlogits, g.swapaxes(1, 2) @ weights

    # without the barrier XLA:CPU puts the forward pass's last product into a fusion with these, which is slower
    out, lse, g = jax.lax.optimization_barrier((out, lse, g))
    dq, dk, dv = _each_block(block, (q, out, lse, g), (k, v), n_sums=2)
    return dq, dk, dv


_softmax_product.defvjp(_softmax_product_fwd, _softmax_product_bwd)


def _each_block(block: Callable, rows: tuple[Array, ...], columns: tuple[Array, ...], *, n_sums: int = 0) -> Any:
    """`block` of each n and block of rows, one after another; of all n at once where there is one block of rows.

    Args:
      block: a function (*rows, *columns) -> results, each with a leading axis n.
      rows: [N, blocks, ...].
      columns: [N, ...], of all blocks.
      n_sums: so many last results are summed over the blocks, shaped as the columns.
    """
    if rows[0].shape[1] == 1:
        out = block(*(x[:, 0] for x in rows), *columns)
        n_stacked = len(out) - n_sums
        return (*(x[:, None] for x in out[:n_stacked]), *out[n_stacked:])

    def of_one(rows, columns):
        columns = [x[None] for x in columns]

        def add(sums, rows):
            out = block(*(x[None] for x in rows), *columns)
            n_stacked = len(out) - n_sums
            return tuple(a + b for a, b in zip(sums, out[n_stacked:], strict=True)), out[:n_stacked]

        zeros = tuple(jnp.zeros_like(x) for x in columns[:n_sums])
        sums, stacked = jax.lax.scan(add, zeros, rows)
        return (*(x[:, 0] for x in stacked), *(x[0] for x in sums))

    return jax.lax.map(lambda args: of_one(*args), (rows, columns))
