"""Attention on TPUs: jax's Pallas kernel, interpreted on a CPU, against a float32 softmax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax.cost import flops, target
from diffexp_jax.models import attention, attention_on_tpu
from diffexp_jax.models.attention_on_tpu import blocks_of, splash


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel runs on a CPU; where the type is float32 its products are too."""
    monkeypatch.setattr(splash, "make_splash_mha", functools.partial(splash.make_splash_mha, interpret=True))


@pytest.fixture
def small_blocks(monkeypatch):
    """As many blocks of queries and of keys as such small sizes have."""
    for name, most in (("MOST_QUERIES", 128), ("MOST_KEYS", 2**15), ("MOST_LOGITS", 128)):
        monkeypatch.setattr(attention_on_tpu, name, most)


def qkv(lq, lk, heads, d, dtype=jnp.float32, lead=(1,)):
    rng = np.random.default_rng(lq + lk + d)
    return [jnp.asarray(rng.standard_normal((*lead, n, heads, d)), dtype) for n in (lq, lk, lk)]


def errors(attend, args, plain=jax.nn.dot_product_attention, change=lambda f: f):
    """Relative errors of the output and the gradients of q, k and v, against `plain` in float32."""

    def value_and_grads(attend, *args):
        def loss(*args):
            out = attend(*args)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        (_, out), grads = jax.jit(change(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)))(*args)
        return out, *grads

    exact = value_and_grads(plain, *(x.astype(jnp.float32) for x in args))
    ours = value_and_grads(attend, *args)
    assert [x.dtype for x in ours] == [args[0].dtype] * 4
    return [np.linalg.norm(jnp.float32(a) - b) / np.linalg.norm(b) for a, b in zip(ours, exact, strict=True)]


SLOW = [(256, 256, 1, 64), (900, 1300, 2, 80), (7, 640, 1, 160)]
SLOW += [(589, 589, 2, 64), (768, 768, 1, 128)]  # SD 3.5's image with both texts, and FLUX's with T5's, at 256 pixels
SIZES = [(200, 77, 2, 40), *(pytest.param(*size, marks=pytest.mark.slow) for size in SLOW)]


@pytest.mark.parametrize("lq, lk, heads, d", SIZES)  # queries and keys that fill no block: a prompt has 77
def test_values_and_gradients(interpreted, lq, lk, heads, d):
    assert max(errors(attention_on_tpu.attention_on_tpu, qkv(lq, lk, heads, d))) < 2e-6


@pytest.mark.parametrize("dtype, most", [("bfloat16", 5e-3), pytest.param("float32", 2e-6, marks=pytest.mark.slow)])
def test_several_blocks(interpreted, small_blocks, dtype, most):
    """In bfloat16 errors are those of its 8 bits: 2^-9 for each rounding of queries, weights and results."""
    sizes, queries, keys = blocks_of(200, 150, 40)
    assert (queries // sizes.block_q, keys // sizes.block_kv, keys // sizes.block_kv_dkv) == (2, 1, 2)
    assert max(errors(attention_on_tpu.attention_on_tpu, qkv(200, 150, 2, 40, jnp.dtype(dtype)))) < most


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_under_vmap_checkpoint_and_scan(interpreted, shared):
    """A gradient for each sample, of what is computed again in a loop; the samples share keys and values, or not."""

    def twice(attend):
        def body(x, kv):
            return jax.checkpoint(lambda x, kv: attend(x, *kv))(x, kv), None

        return lambda q, k, v: jax.lax.scan(body, q, (jnp.stack([k, k]), jnp.stack([v, v])))[0]

    q, k, v = qkv(130, 77, 1, 40, lead=(3, 1))
    args = (q, k[0], v[0]) if shared else (q, k, v)
    change = functools.partial(jax.vmap, in_axes=(0, None, None) if shared else 0)
    plain = twice(jax.nn.dot_product_attention)
    assert max(errors(twice(attention_on_tpu.attention_on_tpu), args, plain, change)) < 2e-6


@pytest.mark.slow
def test_large_logits(interpreted):
    """Exponentials that overflow, and keys that fill a block up beside them."""
    q, k, v = qkv(5, 7, 1, 8)
    out = attention_on_tpu.attention_on_tpu(-100 * q, 100 * k, v)
    np.testing.assert_allclose(out, jax.nn.dot_product_attention(-100 * q, 100 * k, v), rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------- which, and how much

HEADS = {  # queries, keys, heads, width of a head: (blocks of queries; of keys, forward and backward; keys in all)
    "SD 1.5, 4096 to 4096": ((4096, 4096, 8, 40), (8, 1, 2, 4096)),
    "SD 1.5, 4096 to 77": ((4096, 77, 8, 40), (8, 1, 1, 128)),
    "SD 2.1, 9216 to 9216": ((9216, 9216, 5, 64), (18, 3, 6, 9216)),
    "SDXL, 1024 to 1024": ((1024, 1024, 20, 64), (2, 1, 1, 1024)),
    "BLIP, 577 to 577": ((577, 577, 16, 64), (2, 1, 1, 640)),
    "VAE, 16384 to 16384": ((16384, 16384, 1, 512), (32, 16, 32, 16384)),
}


@pytest.mark.parametrize("heads", HEADS)
def test_blocks(heads):
    (n_queries, n_keys, _, d), expected = HEADS[heads]
    sizes, queries, keys = blocks_of(n_queries, n_keys, d)
    assert (queries // sizes.block_q, keys // sizes.block_kv, keys // sizes.block_kv_dkv, keys) == expected
    for block, of in ((sizes.block_q, queries), (sizes.block_kv, keys), (sizes.block_kv_dkv, keys)):
        assert of % block == 0 and block % 128 == 0
    assert sizes.block_kv % sizes.block_kv_compute == sizes.block_kv_dkv % sizes.block_kv_dkv_compute == 0


@pytest.mark.parametrize("n", [*range(1, 700, 23), 1025, 4097, 5000, 9999])
def test_any_length_has_blocks(n):
    sizes, queries, keys = blocks_of(n, n, 40)
    assert queries >= n and queries % sizes.block_q == 0 and sizes.block_q <= 512 and queries - n < 128 + n / 4
    assert keys >= n and keys % sizes.block_kv == keys % sizes.block_kv_dkv == 0 and keys - n < 128 + n / 4


@pytest.mark.slow  # a minute each, where TPUs' compiler is installed
@pytest.mark.parametrize("kind", ["v5e", "v6e"])
@pytest.mark.parametrize("heads", HEADS)
def test_the_blocks_fit_in_vmem(kind, heads):
    """Forward and gradient, compiled for TPUs that are not there."""
    pytest.importorskip("libtpu")
    (n_queries, n_keys, heads, d), _ = HEADS[heads]

    def slopes(q, k, v):
        def loss(*args):
            return attention.attention(*args, heads).astype(jnp.float32).sum()

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    with target.compiling_for(kind) as there:
        sharding = jax.sharding.SingleDeviceSharding(there.devices[0])
        q, k = (jax.ShapeDtypeStruct((2, n, heads * d), jnp.bfloat16, sharding=sharding) for n in (n_queries, n_keys))
        text = jax.jit(slopes).lower(q, k, k).compile().as_text()
    assert "splash_mha_fwd" in text and "splash_mha_dkv" in text


def traced(dtype, lq, lk, **kwargs):
    q, k = (jax.ShapeDtypeStruct((1, n, 80), dtype) for n in (lq, lk))
    return str(jax.make_jaxpr(lambda q, k: attention.attention(q, k, k, 2, **kwargs))(q, k))


def test_which_attention_takes_the_kernel(monkeypatch):
    """In bfloat16, with as many logits as are worth it; others stay float32 within."""
    monkeypatch.setattr(attention.backend, "platform", lambda: "tpu")
    assert all("pallas_call" in traced(jnp.bfloat16, 4096, lk) for lk in (4096, 77))
    assert not any("pallas_call" in traced(dtype, 4096, 4096) for dtype in (jnp.float32, jnp.float16))
    assert "pallas_call" not in traced(jnp.bfloat16, 256, 256)
    assert "pallas_call" not in traced(jnp.bfloat16, 1024, 1024, is_causal=True)


def test_its_operations_are_counted(monkeypatch):
    """Two products, and five for the gradient, of each head."""
    monkeypatch.setattr(attention.backend, "platform", lambda: "tpu")
    x = jax.ShapeDtypeStruct((3, 1024, 80), jnp.bfloat16)

    def loss(q, k, v):
        return attention.attention(q, k, v, 2).astype(jnp.float32).sum()

    product = 3 * 2 * 1024 * 1024 * 80
    assert flops.of(loss, x, x, x) == 2 * product
    assert flops.of(jax.grad(loss, argnums=(0, 1, 2)), x, x, x) == pytest.approx(7 * product, rel=1e-3)
