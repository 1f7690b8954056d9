"""What every method must do, by the program that a user runs, on a tiny model: numbers, continuing, errors."""

import os
import shutil
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file

from diffexp_jax import train
from diffexp_jax.algorithms import METHODS
from diffexp_jax.models.lora import file_beside
from diffexp_jax.run.metrics import read_metrics
from tests.support import ROOT
from tests.support.runs import LORA, PLAIN, assert_same_run, program

# Adam with so large an epsilon follows the gradient itself: else the sign of a gradient that is almost zero decides
LINEAR = {"optim.eps": 1.0, "optim.lr": 1.0, "optim.schedule": "constant"}
FEW = PLAIN | {"iterations": 2, "batch.samples": 8, "batch.samples_per_forward": 2, "exploration.enabled": True}
# The slope of a log-prob is (x_{t-1} - mean) / std^2, a difference of nearly equal numbers where there is little noise:
# with the step from t = 251 to 1 the LoRAs differ by 2e-5, by the first two steps alone by 1e-6
EARLY = 0.5
CHANGES = {
    "ddpo": {"ddpo.updates": 1, "ddpo.gradient": "twopass", "ddpo.timestep_fraction": EARLY},
    "dpok": {"dpok.updates": 1, "dpok.timestep_fraction": EARLY},
    "rwr": {"rwr.updates": 1, "rwr.inner_epochs": 2},
    "nft": {"nft.advantage_clip": 1.0},  # else what draws and what pushes nearly cancel, and rounding is a part of it
    # Advantages that sum to 0 cancel what the loss of an untrained network has in common for all images, and rounding
    # of that is a part of the rest: clipped ones do not
    "awm": {"batch.samples": 16, "batch.group": 4, "awm.advantage_clip": 0.5},
    # Rounding would decide which steps are clipped, and be a part of rewards that are nearly equal
    "prdp": {
        "prdp.clip": 10.0,
        "prdp.beta": 1.0,
        "prdp.timestep_fraction": EARLY,
        "reward": "jax:sample_rewards:corner",
    },
    "entropy": {"entropy.alpha": 0.01},  # see seiko
    "seiko": {
        "seiko.updates": 1,
        "seiko.truncation_k": 2,
        "seiko.inner_epochs": 2,
        "seiko.fit_epochs": 3,
        "seiko.buffer": 12,
        "seiko.loss_coefficient": 100.0,  # else most of the gradient is the rounding of a path KL of 0
    },
}
# Settings that change a method's state or what its programs read
VARIANTS = {
    "entropy.start": {"entropy.start": True, "sampling.eta": 0.5},
    "seiko.reads_text": {"seiko.reads_text": True, "seiko.features": "CLIP"},
    "seiko.optimism": {"seiko.optimism": "bootstrap"},
    "rwr.prior_weight": {"rwr.prior_weight": 0.5},
    "ddpo.proportionate": {"ddpo.proportionate": True, "ddpo.clip": 10.0},
}
SAME = ("reward/mean", "reward/std", "grad_norm", "lora_norm")
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("case", [*METHODS, *VARIANTS])]


@pytest.fixture
def method(case):
    return case.partition(".")[0]


@pytest.fixture
def settings(case, method, tiny_settings, tiny_clip):
    group = {"batch.group": 2} if METHODS[method]().compares_groups else {}
    found = tiny_settings | FEW | LINEAR | group | CHANGES.get(method, {}) | VARIANTS.get(case, {})
    return {key: f"pickscore:{tiny_clip}" if value == "CLIP" else value for key, value in found.items()}


def run(method, workdir, settings, *, code=0):
    """The last line of errors of a run that ends with this exit code."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "users")])}
    line = program(method, workdir, settings)
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stderr.strip().splitlines()[-1]


def learnt(workdir):
    """All arrays of a run's LoRA, and the mean of x_T where that was learnt."""
    start = file_beside(workdir / LORA, "x_T")
    return load_file(workdir / LORA) | ({"x_T": np.load(start)} if start.exists() else {})


def test_the_same_numbers_on_any_number_of_devices(method, settings, tmp_path):
    for n in (1, 2, 4):
        run(method, tmp_path / str(n), settings | {"cpu_devices": n})
    expected, rows = learnt(tmp_path / "1"), read_metrics(tmp_path / "1")
    for n in (2, 4):
        found = learnt(tmp_path / str(n))
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            np.testing.assert_allclose(found[name], x, rtol=0, atol=1e-5 * np.abs(x).max(), err_msg=f"{n} {name}")
        for ours, theirs in zip(read_metrics(tmp_path / str(n)), rows, strict=True):
            for name in set(SAME) & theirs.keys():
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (n, name)


def test_a_run_goes_on_bit_for_bit(method, settings, tmp_path):
    settings = settings | {"iterations": 4, "checkpoint.every": 2}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(method, whole, settings)
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "4")
    (broken / LORA).unlink()
    run(method, broken, settings)
    assert_same_run(broken, whole)


def test_exploration_off_is_plain(method, settings, make_config, tmp_path):
    """Off equals a schedule without a step and weights of 1; the run with exploration is another one."""
    once = settings | PLAIN | {"iterations": 1}
    neutral = {"exploration.w_low": once["sampling.guidance"], "exploration.weight_range": (1.0, 1.0)}
    for name, more in (("off", {"exploration.enabled": False}), ("neutral", neutral), ("on", {})):
        train.run(make_config(method, once | more), tmp_path / name)
    assert_same_run(tmp_path / "off", tmp_path / "neutral")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "on", tmp_path / "off")


def test_a_reward_that_is_not_finite_ends_in_one_line(method, settings, tiny_clip, tmp_path):
    settings = settings | {"reward": "jax:sample_rewards:undefined", "seiko.features": f"pickscore:{tiny_clip}"}
    assert run(method, tmp_path / "run", settings, code=1).startswith("error: iteration 1: ")
