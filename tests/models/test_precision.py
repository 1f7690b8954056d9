"""Types of networks: a gradient that survives float16, full products where they are asked for, SDXL's VAE."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax import backend
from diffexp_jax.chosen_rewards import load_rewards
from diffexp_jax.models.lora import init_lora
from diffexp_jax.models.precision import in_precision, is_full_float32, matmul_precision, with_scaled_gradient
from diffexp_jax.pipelines import families, load_pipeline, sizes
from diffexp_jax.pipelines.stable_diffusion import TextEmbedding
from diffexp_jax.rewards.scoring import make_scorer
from diffexp_jax.settings import checked, parsed
from tests.support import ROOT
from tests.support.networks import of_flux, of_sd35, random_params
from tests.support.tiny import nonzero_lora

RNG = np.random.default_rng(0)
W, X = RNG.standard_normal((8, 8)).astype(np.float32), RNG.standard_normal((3, 8)).astype(np.float32)


def half(w, x, n):
    """A network in float16; n is an integer input."""
    return jnp.tanh(x.astype(jnp.float16) @ w.astype(jnp.float16)).astype(jnp.float32) * n


def whole(w, x, n):
    return jnp.tanh(x @ w) * n


def slope(function, size):
    """The gradient of size * function, divided by size."""
    return jax.jit(jax.grad(lambda x: size * function(W, x, 1).sum()))(X) / size


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_gradients_of_any_size_survive_float16(size):
    want = slope(whole, 1.0)
    np.testing.assert_allclose(slope(with_scaled_gradient(half), size), want, atol=5e-3 * np.abs(want).max())
    if size != 1.0:  # what it is for: without it they vanish, or overflow
        plain = slope(half, size)
        assert not np.isfinite(plain).all() or np.abs(plain).max() < 1e-3 * np.abs(want).max()


def cast(params, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


@pytest.mark.parametrize("dtype, most", [(jnp.bfloat16, 3e-2), (jnp.float16, 4e-3)])
@pytest.mark.parametrize("make", [of_flux, of_sd35])
def test_transformers_in_half_precision(make, dtype, most):
    """Their outputs are float32's to a few of the type's digits."""
    network, args, _ = make()
    params = random_params(network, args, np.random.default_rng(0))
    whole = jax.jit(network.apply)({"params": params}, *args)
    low = jax.jit(network.clone(dtype=dtype).apply)({"params": cast(params, dtype)}, *args)
    assert low.dtype == jnp.float32
    assert 1e-5 < np.linalg.norm(low - whole) / np.linalg.norm(whole) < most


def test_tokens_of_flux_stay_within_float16():
    """As diffusers' are: the prompt's in blocks of two streams, all in those of one."""
    network, args, _ = of_flux()
    params = random_params(network, args, np.random.default_rng(0))
    for name in ("transformer_blocks.1", "single_transformer_blocks.0"):
        out = params[name]["ff_context.net.2" if name.startswith("transformer") else "proj_out"]
        out["kernel"] = 3e4 * out["kernel"]
    low = jax.jit(network.clone(dtype=jnp.float16).apply)({"params": cast(params, jnp.float16)}, *args)
    assert np.isfinite(low).all()


def test_a_gradient_of_zero_stays_zero():
    np.testing.assert_array_equal(slope(lambda w, x, n: 0.0 * with_scaled_gradient(half)(w, x, n), 1.0), 0.0)


def test_a_scaled_gradient_under_vmap_scan_and_checkpoint():
    function = with_scaled_gradient(half)

    def chain(x, function):
        body = jax.checkpoint(lambda x, _: (x + 0.1 * function(W, x, 1), None))
        return 1e-8 * jax.lax.scan(body, x, None, length=3)[0].sum()

    ours = jax.vmap(jax.grad(lambda x: chain(x, function)))(X[:, None])
    want = jax.vmap(jax.grad(lambda x: chain(x, whole)))(X[:, None])
    np.testing.assert_allclose(ours, want, atol=1e-2 * np.abs(want).max())


@pytest.mark.parametrize(
    "platform, setting, dtype, precision, full",
    [
        ("cpu", "auto", "float32", "default", True),
        ("gpu", "auto", "float32", "float32", True),
        ("tpu", "auto", "float32", "float32", True),
        ("gpu", "auto", "bfloat16", "default", False),
        ("gpu", "tensorfloat32", "float32", "tensorfloat32", False),
        ("gpu", "default", "float32", "default", False),
        ("tpu", "float32", "bfloat16", "float32", False),
    ],
)
def test_what_the_settings_come_to(monkeypatch, platform, setting, dtype, precision, full):
    monkeypatch.setattr(backend, "platform", lambda: platform)
    assert matmul_precision(setting, dtype) == precision
    assert is_full_float32(setting, dtype) == full


@pytest.mark.parametrize(
    "platform, changes, wanted",
    [
        ("cpu", {}, "sampled"),
        ("gpu", {}, "recomputed"),  # bfloat16
        ("tpu", {"model.dtype": "float16"}, "recomputed"),
        ("gpu", {"model.dtype": "float32"}, "recomputed"),
        ("cpu", {"model.dtype": "bfloat16"}, "recomputed"),
        ("gpu", {"ddpo.old_log_prob": "sampled"}, "sampled"),
    ],
)
def test_what_ddpos_ratio_is_relative_to(monkeypatch, make_config, platform, changes, wanted):
    monkeypatch.setattr(backend, "platform", lambda: platform)
    settings = parsed(make_config("ddpo", changes))
    assert settings.method.resolved_old_log_prob(settings.full_float32) == wanted


def test_default_precision_is_the_function_itself():
    """So nothing changes on a CPU, bit for bit."""
    assert in_precision(whole, "float32") is whole and in_precision(whole, "bfloat16") is whole


def test_precision_reaches_forward_and_backward():
    text = str(jax.make_jaxpr(jax.grad(lambda x: in_precision(whole, "float32", "float32")(W, x, 1).sum()))(X))
    assert text.count("dot_general") == 2 and text.count("Precision.HIGHEST") >= 2


UNETS = [path for path, (index, _) in sizes.PIPELINES.items() if index["_class_name"] in families.FAMILIES]


@pytest.mark.parametrize("path", UNETS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_only_sdxls_vae_is_never_float16(path, dtype):
    config = families.model_config(*sizes.PIPELINES[path])
    is_sdxl = config.family.added
    assert jnp.dtype(config.dtype("vae", dtype)) == ("float32" if is_sdxl and dtype == "float16" else dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, error", [("bfloat16", 0.1), ("float16", 0.02)])
def test_gradients_of_a_model_in_half_precision(tiny_model, dtype, error):
    """In LoRA and latent, against float32's; so small that float16 would lose it if it were not scaled."""
    exact = load_pipeline(tiny_model)
    lora = nonzero_lora(init_lora(jax.random.key(0), exact.params["unet"], rank=2))
    ids = (np.ones((2, 32), np.int32),)
    context = exact.encode(exact.params, ids).embedding
    x_t = jnp.asarray(RNG.standard_normal((2, 8, 8, 4)), jnp.float32)

    def gradients(model):
        step = model.process.training_row(500)

        def loss(lora, x_t):
            out = model.denoise(model.params, lora, x_t, step, TextEmbedding(context))
            images = model.decode(model.params, out)
            return 1e-7 * (jnp.sin(out).sum() + images.mean())

        return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(lora, x_t))

    want = np.concatenate([np.ravel(x) for x in gradients(exact)])
    got = np.concatenate([np.ravel(x) for x in gradients(load_pipeline(tiny_model, dtype=dtype))])
    assert np.linalg.norm(got - want) < error * np.linalg.norm(want)


# -------------------------------------------------------------------------------------------------------------- script


def script():
    spec = importlib.util.spec_from_file_location(
        "measure_precision", ROOT / "tools" / "studies" / "measure_precision.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rounded_products():
    """Factors are rounded to ten bits, through jit and gradients, but not where full products are asked for."""
    measure = script()
    a, b = jnp.array([[1 + 2**-11]], jnp.float32), jnp.array([[3.0]], jnp.float32)

    def f(a, b):
        return jax.jit(jnp.matmul)(a, b)

    assert float(measure.with_rounded_products(f, "tf32")(a, b)[0, 0]) == 3.0  # to even
    assert float(f(a, b)[0, 0]) == 3 + 3 * 2**-11
    gradient = jax.grad(lambda a, b: f(a, b).sum(), argnums=1)
    assert float(measure.with_rounded_products(gradient, "tf32")(a, b)[0, 0]) == 1.0
    full = measure.with_rounded_products(lambda a, b: jnp.matmul(a, b, precision="highest"), "tf32")
    assert float(full(a, b)[0, 0]) == 3 + 3 * 2**-11
    assert float(measure.rounded(jnp.float32(1 + 2**-8), "bf16")) == 1.0
    with pytest.raises(NotImplementedError, match="inside scan"):
        measure.with_rounded_products(lambda a: jax.lax.scan(lambda c, _: (c @ c, None), a, None, 2)[0], "tf32")(a)


def test_summary_and_table():
    """Two steps a third, two samples: the errors and cosines are those of the arrays."""
    measure = script()
    true, noisy = np.full((6, 2), 1e-4), np.full((6, 2), 1e-4)
    noisy[4:] -= 3e-4
    results = {
        "float32": {"log_ratio": true, "with": np.array([1.0, 0.0]), "without": np.array([1.0, 0.0])},
        "bfloat16": {"log_ratio": noisy, "with": np.array([0.0, 1.0]), "without": np.array([3.0, 4.0])},
    }
    args = measure.argparse.Namespace(samples=4, steps=6, guidance=5.0, lr=1e-3, clip=1.5e-4, seed=0)
    found = measure.summary(results, np.arange(6), args)["rows"]["bfloat16"]
    assert found["error_early"] == 0.0 and found["error_late"] == pytest.approx(3e-4)
    assert found["bias_last_two_steps"] == pytest.approx(-3e-4) and found["true_change_late"] == pytest.approx(1e-4)
    assert found["clipped"] == pytest.approx(1 / 3) and found["cosine_with_ratio"] == 0.0
    assert found["cosine_without_ratio"] == pytest.approx(0.6)
    assert "| bfloat16 | 1.0e-04 / 1.0e-04 / 1.0e-04 | 0.0e+00 | 0.0e+00 | 3.0e-04 |" in measure.table(
        {"bfloat16": found}
    )


def test_the_documents_table_is_of_its_file():
    """docs/understand/precision.md shows docs/evidence/data/precision.json, as the script prints it."""
    document = (ROOT / "docs" / "understand" / "precision.md").read_text()
    shown = document.partition("<!-- table -->\n")[2].partition("\n<!-- /table -->")[0]
    rows = json.loads((ROOT / "docs" / "evidence" / "data" / "precision.json").read_text())["rows"]
    assert shown == script().table(rows)


def test_learning_curves_of_the_documents():
    """docs/understand/precision.md shows docs/evidence/data/precision_learning.json."""
    arms = json.loads((ROOT / "docs" / "evidence" / "data" / "precision_learning.json").read_text())["arms"]
    document = (ROOT / "docs" / "understand" / "precision.md").read_text()
    shown = document.partition("<!-- learning -->\n")[2].partition("\n<!-- /learning -->")[0].splitlines()[2:]
    rows = []
    for flags, found in arms.items():
        rewards = found["reward/mean"]
        means = [f"{np.mean(rewards[i : i + 8]):.2f}" if i < len(rewards) else "" for i in range(0, 32, 8)]
        rows.append(f"| `{flags}` | {' | '.join(means)} | {max(found['grad_norm']):.2g} |")
    assert shown == rows


def test_evaluation_scores_in_float32_whatever_trains(make_config):
    """The trained reward in bfloat16 is loaded a second time for the report; in float32 it is loaded once."""

    _, trained, rewards = load_rewards(checked(make_config("ddpo", {"reward_dtype": "bfloat16"})))
    types = [{str(x.dtype) for x in jax.tree.leaves(r.params) if x.ndim} for r in (trained, rewards["pickscore"])]
    assert types == [{"bfloat16"}, {"float32"}]
    _, trained, rewards = load_rewards(checked(make_config("ddpo")))
    assert rewards["pickscore"] is trained
    assert make_scorer(trained, batch=2) is not None
