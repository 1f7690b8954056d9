"""The building blocks against torch's own, and the hand-written gradient of the 3x3 convolution."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax import backend
from diffexp_jax.models import convolution, layers, low_rank
from tests.support.arrays import normal, torched


def applied(layer, variables, x, *args):
    """What the layer makes of x, as one program: without jit each operation would be compiled for itself."""
    return jax.jit(lambda variables, x: layer.apply(variables, x, *args))(variables, x)


def chw(x):
    """Channels-last array as torch's channels-first tensor."""
    return torched(np.moveaxis(np.asarray(x), -1, 1))


def hwc(x):
    return np.moveaxis(x.numpy(), 1, -1)


def native(x, kernel, stride=1):
    padding, dimensions = ((1, 1), (1, 1)), ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=dimensions)


# ---- convolution


SHAPES = [
    ((2, 8, 8, 4), 4),
    ((2, 8, 6, 4), 3),
    ((3, 5, 7, 2), 6),
    ((1, 1, 3, 3), 1),
    ((1, 1, 4, 3), 1),
    ((2, 2, 1, 1), 5),
]


@pytest.mark.parametrize("name, stride", [("conv3x3_same", 1), ("conv3x3_half", 2)])
@pytest.mark.parametrize("shape, features", SHAPES)
def test_convolutions_of_3x3_and_their_gradients(name, stride, shape, features):
    x, kernel = normal(0, *shape), normal(1, 3, 3, shape[-1], features)

    @partial(jax.jit, static_argnums=0)
    def all_of(convolve, g, *args):
        out, pull_back = jax.vjp(convolve, *args)
        return out, *pull_back(g)

    args = normal(2, *jax.eval_shape(partial(native, stride=stride), x, kernel).shape), x, kernel
    (ours, *slopes), (theirs, *wanted) = (
        all_of(convolve, *args) for convolve in (getattr(convolution, name), partial(native, stride=stride))
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    for of, a, b in zip(("input", "kernel"), slopes, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5, err_msg=of)


def test_conv3x3_same_in_a_scan():
    x, kernels = normal(0, 2, 6, 5, 3), normal(1, 4, 3, 3, 3, 3) / 5

    def loss(conv, x, kernels):
        def body(x, kernel):
            return jnp.tanh(conv(x, kernel)), None

        return jnp.sum(jnp.sin(3 * jax.lax.scan(body, x, kernels)[0]))

    grad = jax.jit(jax.value_and_grad(loss, argnums=(1, 2)), static_argnums=0)
    ours, theirs = grad(convolution.conv3x3_same, x, kernels), grad(native, x, kernels)
    assert np.abs(theirs[1][1]).max() > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), ours, theirs)


@pytest.mark.parametrize("stride", [1, 2])
def test_what_the_layer_uses_on_cpu(stride):
    x = normal(0, 1, 4, 4, 2)
    conv = layers.Conv(3, stride=stride)
    params = conv.init(jax.random.key(0), x)
    jaxpr = str(jax.make_jaxpr(conv.apply)(params, x))
    assert ("custom_vjp_call" in jaxpr) == (jax.default_backend() == "cpu")


@pytest.mark.parametrize(
    "size, stride, padding",
    [
        (3, 1, ((1, 1), (1, 1))),
        (3, 2, ((1, 1), (1, 1))),  # the UNet's downsampling
        (3, 2, ((0, 1), (0, 1))),  # the VAE encoder's
        (1, 1, ((0, 0), (0, 0))),
    ],
)
def test_conv_is_torchs(size, stride, padding):
    torch = pytest.importorskip("torch")
    x, kernel, bias = normal(0, 2, 7, 10, 3), normal(1, size, size, 3, 5), normal(2, 5)
    ours = applied(layers.Conv(5, size, stride, padding), {"params": {"kernel": kernel, "bias": bias}}, x)
    (top, bottom), (left, right) = padding
    padded = torch.nn.functional.pad(chw(x), (left, right, top, bottom))
    weight = torched(kernel.transpose(3, 2, 0, 1))
    theirs = torch.nn.functional.conv2d(padded, weight, torched(bias), stride)
    np.testing.assert_allclose(ours, hwc(theirs), rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [(8, 10), (7, 9), (8, 9), (7, 10)])
def test_upsample_is_torchs_nearest(size):
    torch = pytest.importorskip("torch")
    x, kernel, bias = normal(0, 2, 4, 5, 3), normal(1, 3, 3, 3, 3), normal(2, 3)
    ours = applied(layers.Upsample(), {"params": {"conv": {"kernel": kernel, "bias": bias}}}, x, size)
    weight = torched(kernel.transpose(3, 2, 0, 1))
    large = torch.nn.functional.interpolate(chw(x), size=size, mode="nearest")
    theirs = torch.nn.functional.conv2d(large, weight, torched(bias), padding=1)
    np.testing.assert_allclose(ours, hwc(theirs), rtol=0, atol=2e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 9, 33, 97])
def test_upsample_indices_for_every_odd_skip(n):
    """Enlarging n to 2n - 1 picks the pixels that torch's float arithmetic picks."""
    torch = pytest.importorskip("torch")
    x = np.arange(1.0, n + 1, dtype=np.float32)[None, :, None, None]  # no pixel is like another
    copy = {"kernel": np.zeros((3, 3, 1, 1), np.float32), "bias": np.zeros(1, np.float32)}
    copy["kernel"][1, 1] = 1.0
    ours = applied(layers.Upsample(), {"params": {"conv": copy}}, x, (2 * n - 1, 1))
    theirs = torch.nn.functional.interpolate(chw(x), size=(2 * n - 1, 1), mode="nearest")
    np.testing.assert_array_equal(ours, hwc(theirs))


# ---- normalisation


@pytest.mark.parametrize("shape", [(2, 4, 6, 12), (2, 5, 12)])
@pytest.mark.parametrize("groups, epsilon", [(1, 1e-5), (4, 1e-6), (12, 0.1)])
def test_group_norm_is_torchs(shape, groups, epsilon):
    torch = pytest.importorskip("torch")
    x, scale, bias = 3 * normal(0, *shape) + 1, normal(1, 12), normal(2, 12)
    ours = applied(layers.GroupNorm(groups, epsilon), {"params": {"scale": scale, "bias": bias}}, x)
    weight, shift = torched(scale), torched(bias)
    theirs = torch.nn.functional.group_norm(chw(x), groups, weight, shift, epsilon)
    np.testing.assert_allclose(ours, hwc(theirs), rtol=0, atol=1e-5)


def test_group_norm_of_values_far_from_zero():
    """The variance is taken around the mean: E[x^2] - E[x]^2 would lose it here."""
    x = normal(0, 1, 8, 8, 4)
    norm = layers.GroupNorm(2, 1e-6)
    params = norm.init(jax.random.key(0), x)
    np.testing.assert_allclose(applied(norm, params, x + 1000), applied(norm, params, x), rtol=0, atol=2e-3)


def test_group_norm_in_bfloat16_keeps_float32_statistics():
    x = (normal(0, 1, 8, 8, 4) + 30).astype(jnp.bfloat16)
    params = {"params": {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}}
    low = applied(layers.GroupNorm(2, 1e-6, jnp.bfloat16), params, x)
    high = applied(layers.GroupNorm(2, 1e-6), params, x.astype(np.float32))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, np.asarray(high).astype(jnp.bfloat16))


@pytest.mark.parametrize("epsilon", [1e-5, 1e-12, 0.1])
def test_layer_norm_is_torchs(epsilon):
    torch = pytest.importorskip("torch")
    x, scale, bias = normal(0, 2, 3, 8), normal(1, 8), normal(2, 8)
    ours = applied(layers.LayerNorm(epsilon), {"params": {"scale": scale, "bias": bias}}, x)
    theirs = torch.nn.functional.layer_norm(torched(x), (8,), torched(scale), torched(bias), epsilon)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)


# ---- functions


@pytest.mark.parametrize("width", [2, 8, 9, 15, 320])
def test_timestep_embedding_is_diffusers(width):
    pytest.importorskip("torch")
    from diffusers.models.embeddings import get_timestep_embedding

    t = np.array([0, 1, 21, 501, 999])
    ours = jax.jit(layers.timestep_embedding, static_argnums=1)(t, width)
    theirs = get_timestep_embedding(torched(t), width, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert ours.shape == (5, width)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=2e-4)  # float32 angles of up to 999 radians


def test_timestep_embedding_literal():
    """Frequencies 1 and 1/100 of t = 3: cosines, sines, and a zero for the odd width."""
    want = [np.cos(3.0), np.cos(0.03), np.sin(3.0), np.sin(0.03), 0.0]
    found = jax.jit(layers.timestep_embedding, static_argnums=1)(np.array([3]), 5)
    np.testing.assert_allclose(found, [want], atol=1e-6)


@pytest.mark.parametrize(
    "name, at_one, at_minus_two",
    [
        ("gelu", 0.8413447460685429, -0.04550026389635842),
        ("quick_gelu", 0.8457957659328212, -0.06434138521014847),
        ("silu", 0.7310585786300049, -0.2384058440442351),
    ],
)
def test_activation_literals(name, at_one, at_minus_two):
    found = jax.jit(layers.ACTIVATIONS[name])(np.array([1.0, -2.0], np.float32))
    np.testing.assert_allclose(found, [at_one, at_minus_two], atol=1e-6)


def test_gelu_is_torchs_and_not_the_tanh_one():
    torch = pytest.importorskip("torch")
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    ours = np.asarray(jax.jit(layers.gelu)(x))
    np.testing.assert_allclose(ours, torch.nn.functional.gelu(torched(x)).numpy(), atol=2e-6)
    assert np.abs(ours - jax.nn.gelu(x, approximate=True)).max() > 1e-4


@pytest.mark.parametrize("dtype, digits", [("float32", 2e-6), ("bfloat16", 2**-7)])
def test_geglu_is_torchs_with_its_gradient(dtype, digits):
    torch = pytest.importorskip("torch")
    x, g = (3 * normal(0, 5, 12)).astype(dtype), normal(1, 5, 6).astype(dtype)

    @jax.jit
    def found(x, g):
        out, pull_back = jax.vjp(layers.geglu, x)
        return out, *pull_back(g)

    ours, ours_grad = found(x, g)
    theirs_x = torched(x.astype(np.float32)).requires_grad_()
    h, gate = theirs_x.chunk(2, dim=-1)
    theirs = h * torch.nn.functional.gelu(gate)
    theirs.backward(torched(g.astype(np.float32)))
    assert ours.dtype == ours_grad.dtype == x.dtype
    for own, want in ((ours, theirs.detach()), (ours_grad, theirs_x.grad)):
        np.testing.assert_allclose(np.asarray(own, np.float32), want.numpy(), rtol=digits, atol=digits)


# ---- Dense and its LoRA


def dense(use_bias=True, **lora):
    params = {"kernel": normal(0, 6, 4)} | ({"bias": normal(1, 4)} if use_bias else {})
    return {"params": params} | ({"lora": lora} if lora else {})


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("leading", [(3,), (2, 5)])
def test_dense_adds_the_low_rank_update(use_bias, leading):
    layer, x = layers.Dense(4, use_bias=use_bias), normal(2, *leading, 6)
    a, b = normal(3, 6, 2), normal(4, 2, 4)
    plain = x @ normal(0, 6, 4) + (normal(1, 4) if use_bias else 0)
    np.testing.assert_allclose(applied(layer, dense(use_bias), x), plain, atol=1e-5)
    np.testing.assert_allclose(applied(layer, dense(use_bias, A=a, B=b), x), plain + x @ a @ b, atol=1e-5)


@pytest.mark.parametrize("layer, lead", [(layers.Dense, ()), (layers.pointwise_conv, (1, 1))])
def test_the_low_rank_update_is_float32_in_a_bfloat16_layer(layer, lead):
    """Its products keep what bfloat16 would round away, its gradients too: only the sum is rounded."""
    x, kernel = normal(2, 3, 2, 2, 6).astype(jnp.bfloat16), np.zeros((*lead, 6, 4), np.float32)
    a, b = normal(3, 6, 2), normal(4, 2, 4)
    module = layer(4, use_bias=False, dtype=jnp.bfloat16)

    def apply(a, b):
        lora = {"A": a.reshape(*lead, 6, 2), "B": b.reshape(*lead, 2, 4)}
        return module.apply({"params": {"kernel": kernel}, "lora": lora}, x).astype(jnp.float32)

    exact = x.astype(np.float32) @ a @ b
    np.testing.assert_array_equal(jax.jit(apply)(a, b), exact.astype(jnp.bfloat16).astype(np.float32))
    ours = jax.jit(jax.grad(lambda a, b: apply(a, b).sum(), argnums=(0, 1)))(a, b)
    want = jax.jit(jax.grad(lambda a, b: (x.astype(jnp.float32) @ a @ b).sum(), argnums=(0, 1)))(a, b)
    for own, exact in zip(ours, want, strict=True):
        assert own.dtype == jnp.float32
        np.testing.assert_allclose(own, exact, rtol=1e-5, atol=1e-6)


def test_the_low_rank_update_by_products_of_bfloat16_has_float32s_digits():
    """What an accelerator multiplies is bfloat16; the result and all gradients are those of full float32 products."""
    x, g = (normal(i, 2, 40, n).astype(jnp.bfloat16).astype(np.float32) for i, n in ((0, 48), (1, 56)))
    a, b = normal(2, 48, 4), normal(3, 4, 56)
    text = str(jax.make_jaxpr(one_pair)(x.astype(jnp.bfloat16), a, b))
    assert "bf16[48,12]" in text and "HIGHEST" not in text

    @jax.jit
    def all_of(x, a, b):
        out, pull_back = jax.vjp(one_pair, x, a, b)
        return out, *pull_back(g)

    exact = all_of(x, a, b)
    for own, want, digits in zip(all_of(x.astype(jnp.bfloat16), a, b), exact, (1e-6, 2**-8, 1e-6, 1e-6), strict=True):
        assert np.linalg.norm(np.asarray(own, np.float32) - want) <= digits * np.linalg.norm(want)
    sixteen = [normal(i, *shape) for i, shape in enumerate([(5, 48), (48, 32), (32, 56)])]
    assert "HIGHEST" in str(jax.make_jaxpr(one_pair)(sixteen[0].astype(jnp.bfloat16), *sixteen[1:]))  # rank 32


def one_pair(x, a, b):
    return low_rank.low_rank(x, [low_rank.Pair(a, b)])[0]


@pytest.mark.parametrize("ranks", [(2, 2, 2), (2, 3)])
def test_layers_of_the_same_input_as_one_product(monkeypatch, ranks):
    """Of an accelerator, in bfloat16: as each for itself, and with the gradients of each, of all samples and of one.

    The two of them have biases.
    """
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    x, dtype = normal(0, 2, 5, 8).astype(jnp.bfloat16), jnp.bfloat16
    params = {str(i): {"kernel": normal(1 + i, 8, 6 + i).astype(dtype)} for i, _ in enumerate(ranks)}
    if biases := len(ranks) == 2:
        params = {i: layer | {"bias": normal(7, 6 + int(i)).astype(dtype)} for i, layer in params.items()}
    lora = {str(i): {"A": normal(5 + i, 8, r), "B": normal(9 + i, r, 6 + i)} for i, r in enumerate(ranks)}

    class Several(nn.Module):
        together: bool

        @nn.compact
        def __call__(self, x):
            dense = [layers.Dense(6 + i, biases, dtype, name=str(i)) for i, _ in enumerate(ranks)]
            return layers.of_the_same(x, dense) if self.together else [layer(x) for layer in dense]

    @partial(jax.jit, static_argnums=0)
    def found(together, params, lora, x):
        def loss(lora, x):
            ys = Several(together).apply({"params": params, "lora": lora}, x)
            return sum(jnp.sin(y.astype(jnp.float32)).sum() for y in ys), ys

        each = jax.vmap(jax.grad(loss, has_aux=True), in_axes=(None, 0))(lora, x)[0]
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(lora, x), each

    ours, theirs = found(True, params, lora, x), found(False, params, lora, x)
    for own, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        digits = {jnp.float32: 1e-5, jnp.bfloat16: 2**-7}[own.dtype.type]
        own, want = (np.asarray(x, np.float32) for x in (own, want))
        assert np.linalg.norm(own - want) <= digits * np.linalg.norm(want)
    dots = str(jax.make_jaxpr(partial(Several(True).apply, {"params": params, "lora": lora}))(x)).count("dot_general")
    assert dots == 2  # W and A
    assert set(Several(True).init(jax.random.key(0), x)) == {"params"}


def test_the_merged_product_and_its_gradients():
    """One product of the sum of the weights, and the gradients of three: of a shared update, and of each sample's."""
    x, kernel, a, b = normal(0, 3, 5, 6), normal(1, 6, 4), normal(2, 6, 2), normal(3, 2, 4)

    def plain(x, kernel, a, b):
        return x @ kernel + (x @ a) @ b

    def each(function, x, kernel, a, b):  # of every sample
        def one(x, a, b):
            return jnp.sin(function(x, kernel, a, b)).sum()

        return jax.vmap(jax.grad(one, argnums=(1, 2)), in_axes=(0, None, None))(x, a, b)

    @partial(jax.jit, static_argnums=0)
    def all_of(function, g, *args):
        out, pull_back = jax.vjp(function, *args)
        return out, *pull_back(g), *each(function, *args)

    args = normal(4, 3, 5, 4), x, kernel, a, b
    for own, want in zip(all_of(low_rank.merged_product, *args), all_of(plain, *args), strict=True):
        np.testing.assert_allclose(own, want, rtol=0, atol=2e-5)


def test_dense_with_zero_b_is_the_plain_layer_bit_for_bit():
    layer, x, a = layers.Dense(4), normal(2, 3, 6), normal(3, 6, 2)
    with_lora = applied(layer, dense(A=a, B=np.zeros((2, 4), np.float32)), x)
    np.testing.assert_array_equal(with_lora, applied(layer, dense(), x))


def test_dense_gradient_of_the_update():
    """With B = 0 only B learns at first: d sum(y) / dB = (sum_n x A)^T 1."""
    layer, x, a, b = layers.Dense(4), normal(2, 3, 6), normal(3, 6, 2), np.zeros((2, 4), np.float32)
    grads = jax.jit(jax.grad(lambda lora: layer.apply(dense(**lora), x).sum()))({"A": a, "B": b})
    np.testing.assert_array_equal(grads["A"], 0.0)
    np.testing.assert_allclose(grads["B"], np.tile((x @ a).sum(0)[:, None], 4), atol=1e-5)


def test_dense_in_bfloat16_with_float32_update():
    layer, x, a, b = layers.Dense(4, dtype=jnp.bfloat16), normal(2, 3, 6), normal(3, 6, 2), normal(4, 2, 4)
    total = jax.jit(jax.value_and_grad(lambda lora: layer.apply(dense(**lora), x).astype(jnp.float32).sum()))
    y, grads = total({"A": a, "B": b})
    assert jax.eval_shape(layer.apply, dense(A=a, B=b), x).dtype == jnp.bfloat16
    assert grads["A"].dtype == grads["B"].dtype == jnp.float32
    np.testing.assert_allclose(y, np.sum(applied(layers.Dense(4), dense(A=a, B=b), x)), rtol=0.05)


def test_initialising_makes_no_lora_collection():
    assert set(layers.Dense(4).init(jax.random.key(0), normal(0, 1, 6))) == {"params"}
