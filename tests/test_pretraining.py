"""scripts/pretrain_emoji.py: learns, logs, and continues where it stopped."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax.emoji.pretraining import Stage

_SCRIPT = Path(__file__).parents[1] / "scripts/pretrain_emoji.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pretrain_emoji", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quadratic(fail_at: int | None = None) -> Stage:
    """Fits the mean of noisy data; after `fail_at` steps the loss is no longer a number."""
    seen = {"steps": 0}

    def count(_):
        seen["steps"] += 1
        return np.float32(np.nan if seen["steps"] == fail_at else 0.0)

    def loss(params, data, key):
        target = data + 0.1 * jax.random.normal(key, data.shape)
        bad = jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32), key) if fail_at else 0.0
        value = jnp.square(params["mean"] - target).mean() + jax.lax.stop_gradient(bad)
        return value, {"distance": jnp.abs(params["mean"] - data).max()}

    def init(key):
        return {"mean": jax.random.normal(key, (3,))}

    return Stage("quadratic", 0, 0.05, init, loss, lambda params, out: None, jnp.arange(3.0))


def test_learns_and_logs(script, tmp_path):
    ema = script.train(quadratic(), tmp_path, seed=0, steps=300, save_every=100)
    np.testing.assert_allclose(ema["mean"], [0.0, 1.0, 2.0], atol=0.3)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [50, 100, 150, 200, 250, 300]
    assert rows[-1]["distance"] < 0.2 < rows[0]["distance"] and {"stage", "loss", "seconds"} <= rows[0].keys()


def test_continues_bit_for_bit(script, tmp_path):
    whole = script.train(quadratic(), tmp_path / "whole", seed=3, steps=60, save_every=10)
    with pytest.raises(SystemExit, match="not finite at step 50"):
        script.train(quadratic(fail_at=50), tmp_path / "cut", seed=3, steps=60, save_every=10)
    assert sorted(path.name for path in (tmp_path / "cut/quadratic").iterdir()) == ["40"]
    continued = script.train(quadratic(), tmp_path / "cut", seed=3, steps=60, save_every=10)
    np.testing.assert_array_equal(whole["mean"], continued["mean"])


def test_another_seed_is_another_run(script, tmp_path):
    runs = [script.train(quadratic(), tmp_path / str(n), seed=n, steps=5, save_every=5)["mean"] for n in (0, 1)]
    assert not np.array_equal(*runs)
