"""Normalisation on accelerators, with a gradient of its own, against the plain formula and torch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax import backend
from diffexp_jax.models import layers
from diffexp_jax.models.norms import Norm, of_few_readings, plain

GROUPS = Norm(4, 1e-5, jnp.float32)
RMS = Norm(None, 1e-6, jnp.float32, centred=False)
NORMS = [Norm(None, 1e-5, jnp.float32), Norm(1, 0.1, jnp.float32), GROUPS, GROUPS._replace(silu=True), RMS]
SHAPE = (2, 6, 5, 12)


def normal(seed, *shape, mean=0.0):
    return (np.random.default_rng(seed).standard_normal(shape) + mean).astype(np.float32)


def arguments(dtype=jnp.float32, *, shifted=True):
    shift = normal(4, 2, 1, 1, 12).astype(dtype) if shifted else None
    return (3 * normal(0, *SHAPE, mean=0.5)).astype(dtype), shift, normal(1, 12), normal(2, 12)


def results(normalise, norm, args, g):
    """The values and the gradients of x, its shift if it has one, scale and bias, in float32."""

    @jax.jit
    def both(args, g):
        out, pull_back = jax.vjp(lambda *args: normalise(*args, norm), *args)
        return [x.astype(jnp.float32) for x in (out, *pull_back(g.astype(out.dtype))) if x is not None]

    return both(args, g)


def channels_first(x):
    return np.moveaxis(x, -1, 1) if x.ndim == 4 else x


def errors(found, wanted):
    pairs = zip(map(np.asarray, found), map(np.asarray, wanted), strict=True)
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]


@pytest.mark.parametrize("norm", NORMS)
def test_the_plain_formula_and_its_gradients(norm):
    args, g = arguments(shifted=norm.groups is not None), normal(3, *SHAPE)
    assert max(errors(results(of_few_readings, norm, args, g), results(plain, norm, args, g))) < 1e-6


@pytest.mark.parametrize("norm", [NORMS[0], RMS])
def test_a_scale_for_each_sample(norm):
    """As adaptive norms have it: [B, 1, C], with gradients of that shape."""
    x, scale, bias, g = normal(0, 2, 30, 12, mean=0.5), normal(1, 2, 1, 12), normal(2, 2, 1, 12), normal(3, 2, 30, 12)
    found = results(of_few_readings, norm, (x, None, scale, bias), g)
    assert max(errors(found, results(plain, norm, (x, None, scale, bias), g))) < 1e-6
    assert found[2].shape == found[3].shape == (2, 1, 12)
    each = [results(plain, norm, (x[i : i + 1], None, scale[i, 0], bias[i, 0]), g[i : i + 1]) for i in range(2)]
    assert max(errors(found, [jnp.stack(pair).reshape(a.shape) for a, *pair in zip(found, *each, strict=True)])) < 1e-6


def test_torchs_with_its_gradients():
    torch = pytest.importorskip("torch")
    args, g = arguments(), normal(3, *SHAPE)
    leaves = [torch.from_numpy(np.array(channels_first(x))).requires_grad_() for x in args]
    x, shift, scale, bias = leaves
    out = torch.nn.functional.silu(torch.nn.functional.group_norm(x + shift, 4, scale, bias, 1e-5))
    out.backward(torch.from_numpy(np.array(channels_first(g))))
    found = [channels_first(x) for x in results(of_few_readings, NORMS[3], args, g)]
    assert max(errors(found, [out.detach().numpy(), *(x.grad.numpy() for x in leaves)])) < 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_bfloat16_is_as_near_to_float32_as_the_plain_formula(norm):
    args, g = arguments(jnp.bfloat16, shifted=norm.groups is not None), normal(3, *SHAPE).astype(jnp.bfloat16)
    exact, g32 = jax.tree.map(lambda x: x.astype(jnp.float32), (args, g))
    wanted = results(plain, norm, exact, g32)
    norm = norm._replace(dtype=jnp.bfloat16)
    ours, theirs = (errors(results(way, norm, args, g), wanted) for way in (of_few_readings, plain))
    for error, of_plain in zip(ours, theirs, strict=True):
        assert error <= 1.01 * of_plain + 1e-6
    assert ours[0] < 2e-3


def test_the_root_mean_square_is_torchs():
    torch = pytest.importorskip("torch")
    x, _, scale, _ = arguments(shifted=False)
    wanted = torch.nn.functional.rms_norm(torch.tensor(np.array(x)), (12,), torch.tensor(np.array(scale)), 1e-6)
    for way in (plain, of_few_readings):
        found = jax.jit(way, static_argnums=(1, 4))(x, None, scale, np.zeros(12, np.float32), RMS)
        np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("norm", [NORMS[0], GROUPS])
def test_values_far_from_zero(norm):
    """Their spread stays: E[x^2] - E[x]^2 would be 3 % off here."""
    x, rest = normal(0, *SHAPE), (None, np.ones(12, np.float32), np.zeros(12, np.float32), norm)
    away = x + 1000  # float32 rounds to 3e-5 there
    ours, formula = (jax.jit(way, static_argnums=(1, 4)) for way in (of_few_readings, plain))
    np.testing.assert_allclose(ours(away, *rest), formula(x, *rest), rtol=0, atol=3e-4)


@pytest.mark.parametrize("norm", [NORMS[0], NORMS[3]])
def test_what_is_kept_for_the_gradient(norm):
    """The input in its own type; all else is small."""
    args = arguments(jnp.bfloat16, shifted=False)
    _, pull_back = jax.vjp(lambda *args: of_few_readings(*args, norm._replace(dtype=jnp.bfloat16)), *args)
    large = [x.dtype for x in jax.tree.leaves(pull_back) if x.size == args[0].size]
    assert large == [jnp.bfloat16]


@pytest.mark.parametrize("norm", [NORMS[0], NORMS[3]])
def test_each_samples_gradient_in_a_scan_with_checkpoints(norm):
    """As DDPO in one pass and AlignProp have it."""
    x, _, scale, bias = arguments()

    def loss(normalise, x, scale, bias):
        @jax.checkpoint
        def step(x, _):
            return jnp.tanh(normalise(x, None, scale, bias, norm)), None

        return jnp.sum(jnp.sin(jax.lax.scan(step, x[None], length=2)[0]))

    def each(normalise):
        gradient = jax.grad(partial(loss, normalise), argnums=(0, 1, 2))
        return jax.jit(jax.vmap(gradient, in_axes=(0, None, None)))(x, scale, bias)

    assert max(errors(each(of_few_readings), each(plain))) < 1e-5


@pytest.mark.parametrize("platform, own", [("cpu", False), ("gpu", True), ("tpu", True)])
@pytest.mark.parametrize("layer", [layers.GroupNorm(4, 1e-5, silu=True), layers.LayerNorm()])
def test_which_way_a_machine_takes(monkeypatch, layer, platform, own):
    monkeypatch.setattr(backend, "platform", lambda: platform)
    x = normal(0, *SHAPE)
    params = layer.init(jax.random.key(0), x)
    assert ("custom_vjp_call" in str(jax.make_jaxpr(layer.apply)(params, x))) == own
