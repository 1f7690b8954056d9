"""Attention against torch's, and each way of it against the plain one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax.models import attention
from tests.support.arrays import normal, torched


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_attention_is_torchs(heads):
    torch = pytest.importorskip("torch")
    q, k, v = normal(0, 2, 5, 16), normal(1, 2, 7, 16), normal(2, 2, 7, 16)
    split = [torched(x).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    ours = jax.jit(attention.attention, static_argnums=3)(q, k, v, heads)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)


def qkv(lq, lk, width=12):
    return normal(0, 2, lq, width), normal(1, 2, lk, width), normal(2, 2, lk, width)


@pytest.mark.parametrize("lq, lk", [(36, 36), (37, 37), (101, 3)])
def test_attention_in_blocks_is_exact(monkeypatch, lq, lk):
    """Forward and gradient, lengths that the blocks do not divide."""

    def value_and_grads(*args):
        def loss(*args):
            out = attention.attention(*args, 3)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*args)

    monkeypatch.setattr(attention.backend, "platform", lambda: "tpu")
    plain = value_and_grads(*qkv(lq, lk))
    monkeypatch.setattr(attention, "MAX_LOGITS", 39)  # blocks of a query or a few
    text = str(jax.make_jaxpr(lambda *args: attention.attention(*args, 3))(*qkv(lq, lk)))
    assert "scan" in text and f"[2,3,{lq},{lk}]" not in text
    blocks = value_and_grads(*qkv(lq, lk))
    for a, b in zip(jax.tree.leaves(blocks), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize("heads", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("lq, lk", [(36, 36), (37, 37), (101, 3), (1, 5)])
@pytest.mark.parametrize("rows", [None, 8])
def test_attention_on_a_cpu_is_exact(monkeypatch, heads, lq, lk, rows):
    """All at once, and in blocks that do not divide the queries; with logits whose exponentials overflow too."""
    if rows:
        monkeypatch.setattr(attention, "CPU_LOGITS", 1)
        monkeypatch.setattr(attention, "CPU_ROWS", rows)
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in qkv(lq, lk))

    def value_and_grads(attend):
        def loss(*args):
            out = attend(*args)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

    if rows and lq > rows:
        assert "scan" in str(jax.make_jaxpr(attention.attention_on_cpu)(q, k, v))
    ours, plain = map(value_and_grads, (attention.attention_on_cpu, jax.nn.dot_product_attention))
    for a, b in zip(*map(jax.tree.leaves, (ours(q, k, v), plain(q, k, v))), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-2))
    large = 50 * q, 50 * k, v  # logits whose exponentials overflow
    (_, found), gradient = ours(*large)
    np.testing.assert_allclose(found, plain(*large)[0][1], rtol=0, atol=1e-3)
    assert all(np.isfinite(x).all() for x in gradient)


def test_causal_and_masked_attention_are_never_in_blocks(monkeypatch):
    monkeypatch.setattr(attention, "MAX_LOGITS", 1)
    monkeypatch.setattr(attention, "CPU_LOGITS", 1)
    monkeypatch.setattr(attention, "CPU_ROWS", 2)
    for kwargs in ({"is_causal": True}, {"mask": jnp.ones((1, 1, 1, 9), bool)}):
        assert "scan" not in str(
            jax.make_jaxpr(lambda *args, kw=kwargs: attention.attention(*args, 3, **kw))(*qkv(9, 9))
        )


@pytest.mark.parametrize("backward", [False, True])
def test_attention_of_4096_tokens_never_holds_its_matrix(backward):
    """A head's 4096 x 4096 logits in float32 take 64 MiB; the compiled program works in less than half."""

    def f(*args):
        return jnp.sum(jnp.square(attention.attention(*args, 1)))

    x = jax.ShapeDtypeStruct((1, 4096, 8), jnp.float32)
    program = jax.jit(jax.grad(f, argnums=(0, 1, 2)) if backward else f).lower(x, x, x).compile()
    assert program.memory_analysis().temp_size_in_bytes < 32 * 2**20
    plain = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v).sum())
    x = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)
    assert plain.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes >= 64 * 2**20  # what is avoided


def test_which_attention_is_fused(monkeypatch):
    """The shapes and types that cuDNN takes; which of them it is asked for (the kernel itself needs a GPU)."""
    assert not attention.has_fused_attention(jnp.bfloat16, 64)  # the tests run on CPU
    monkeypatch.setattr(attention.backend, "cuda_capability", lambda: (9, 0))
    for width in (8, 40, 64, 80, 128):
        assert attention.has_fused_attention(jnp.bfloat16, width) and attention.has_fused_attention(jnp.float16, width)
    assert not attention.has_fused_attention(jnp.float32, 64)
    assert not any(attention.has_fused_attention(jnp.bfloat16, width) for width in (4, 36, 160, 512))
    asked = []

    def record(q, k, v, implementation="xla", **kwargs):
        asked.append((implementation, q.shape[1], k.shape[1], sorted(kwargs)))
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    for lq, lk, dtype, kwargs in [
        (4096, 4096, jnp.bfloat16, {}),
        (1024, 1024, jnp.float16, {}),
        (4096, 77, jnp.bfloat16, {}),
        (1024, 77, jnp.bfloat16, {}),
        (257, 257, jnp.bfloat16, {}),  # too few logits to be worth it
        (1024, 1024, jnp.bfloat16, {"is_causal": True}),
        (1024, 1024, jnp.float32, {}),
    ]:
        q, k = (jax.ShapeDtypeStruct((1, n, 32), dtype) for n in (lq, lk))
        monkeypatch.setattr(attention.backend, "platform", lambda: "gpu")
        attend = partial(attention.attention, heads=2, **kwargs)
        assert jax.eval_shape(attend, q, k, k).shape == (1, lq, 32)
    assert asked == [
        ("cudnn", 4096, 4096, []),
        ("cudnn", 1024, 1024, []),
        (
            "cudnn",
            4096,
            78,
            ["key_value_seq_lengths", "query_seq_lengths"],
        ),  # a prompt's odd length has no gradient there
        ("cudnn", 1024, 78, ["key_value_seq_lengths", "query_seq_lengths"]),
        ("xla", 1024, 1024, ["is_causal"]),
        ("xla", 1024, 1024, []),
    ]
    monkeypatch.setattr(attention.backend, "cuda_capability", lambda: (7, 5))
    assert not attention.has_fused_attention(jnp.bfloat16, 64)


@pytest.mark.parametrize("most", [2**20, 40])
def test_the_gradient_of_unfused_attention_survives_bfloat16(monkeypatch, most):
    """Values that have much in common: their weights' gradients differ by less than bfloat16 keeps of each."""
    monkeypatch.setattr(attention.backend, "platform", lambda: "tpu")
    monkeypatch.setattr(attention, "MAX_LOGITS", most)
    q, k, noise = (x.astype(jnp.bfloat16) for x in qkv(16, 12))
    v = (20.0 + 0.2 * noise).astype(jnp.bfloat16)
    slopes = normal(3, 2, 16, 12).astype(jnp.bfloat16)

    def error(attend):
        @jax.jit
        def grads(*args):
            return jax.vjp(attend, *args)[1](slopes.astype(args[0].dtype))[:2]  # of queries and keys

        ours, exact = grads(q, k, v), grads(*(x.astype(jnp.float32) for x in (q, k, v)))
        off = [(np.asarray(a, np.float32) - b, b) for a, b in zip(ours, exact, strict=True)]
        return max(np.linalg.norm(a) / np.linalg.norm(b) for a, b in off)

    def jaxs(*args):
        split = (x.reshape(*x.shape[:2], 3, 4) for x in args)
        return jax.nn.dot_product_attention(*split).reshape(2, 16, 12)

    assert error(lambda *args: attention.attention(*args, 3)) < 0.01 < 0.05 < error(jaxs)


def test_unfused_attention_in_bfloat16(monkeypatch):
    """Values and all gradients, of all samples and of each, against float32; float32 is as it was."""
    monkeypatch.setattr(attention.backend, "platform", lambda: "gpu")
    args = [x.astype(jnp.bfloat16) for x in (*qkv(16, 12), normal(3, 2, 16, 12))]

    def found(q, k, v, g):
        out, pull_back = jax.vjp(lambda *args: attention.attention(*args, 3), q, k, v)
        each = jax.vmap(lambda *args: jax.vjp(lambda *x: attention.attention(*x, 3), *args[:3])[1](args[3]))
        return out, *pull_back(g), *(x[:, 0] for x in each(*(x[:, None] for x in (q, k, v, g))))

    ours, exact = jax.jit(found)(*args), jax.jit(found)(*(x.astype(jnp.float32) for x in args))
    for own, want in zip(ours, exact, strict=True):
        assert own.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(own, np.float32) - want) < 4e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("lq, lk", [(6, 5), (5, 6), (7, 7), (6, 6)])
def test_attention_of_even_length_is_exact(lq, lk):
    """The very padding that cuDNN is given, on another kernel: outputs and all gradients."""

    def grads_and_output(attend):
        def loss(*args):
            out = attend(*args)
            return jnp.sum(jnp.sin(out)), out

        q, k, v = (x.reshape(*x.shape[:2], 3, -1) for x in qkv(lq, lk))
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    ours, plain = grads_and_output(attention.attention_of_even_length), grads_and_output(jax.nn.dot_product_attention)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())


def test_attention_in_float16_on_a_cpu():
    """No CPU multiplies float16 into float32: there it is computed in float32 and rounded at the end."""
    q, k, v = (x.astype(jnp.float16) for x in qkv(6, 5))
    attend = jax.jit(attention.attention, static_argnums=3)
    out = attend(q, k, v, 3)
    assert out.dtype == jnp.float16
    exact = attend(*(x.astype(jnp.float32) for x in (q, k, v)), 3)
    np.testing.assert_allclose(out, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None), (None, 0, 0)])
@pytest.mark.parametrize(
    "lq, lk", [pytest.param(4, 6, marks=pytest.mark.slow), (4, 7), pytest.param(5, 6, marks=pytest.mark.slow), (5, 7)]
)
def test_even_lengths_under_vmap_are_exact(lq, lk, axes):
    """Values and gradients of each sample, whatever of its arguments the samples share."""

    def slopes(attend):
        def loss(*args):
            out = attend(*args)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), in_axes=axes))

    args = [
        normal(i, *[3] * (axis == 0), 2, n, 2, 8) for i, (axis, n) in enumerate(zip(axes, (lq, lk, lk), strict=True))
    ]
    ours, plain = (slopes(f)(*args) for f in (attention.attention_of_even_length, jax.nn.dot_product_attention))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
