"""Methods by whole chains on a real, tiny model: the images of the same noise become brighter."""

import pytest

from diffexp_jax import train
from diffexp_jax.run.metrics import read_metrics
from tests.support.runs import PLAIN

CHANGES = {
    "prdp": {"batch.group": 4, "prdp.beta": 1e-3, "prdp.clip": 1.0, "prdp.inner_epochs": 4, "optim.lr": 3e-2},
    "entropy": {"entropy.alpha": 1e-3, "optim.lr": 3e-2, "optim.weight_decay": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", CHANGES)
def test_learns_brightness(make_config, tmp_path, method):
    settings = PLAIN | {"reward": "jax:sample_rewards:brightness", "iterations": 8, "sampling.eta": 1.0}
    settings |= {"batch.samples": 32, "batch.samples_per_forward": 16, "exploration.enabled": False}
    settings |= {"optim.schedule": "constant", "eval.every": 8, "eval.prompts": ("animals",), "eval.rewards": ()}
    train.run(make_config(method, settings | CHANGES[method]), tmp_path / "run")
    first, last = (
        next(value for name, value in row.items() if name.startswith("eval/"))
        for row in (read_metrics(tmp_path / "run")[i] for i in (0, -1))
    )
    assert last > first + 2e-3
