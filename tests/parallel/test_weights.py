"""Frozen weights that devices share out: who holds what, and the same numbers as with copies."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from diffexp_jax import backend, parallel
from diffexp_jax.parallel import devices, weights
from diffexp_jax.settings.running import Parallel
from tests.support import ROOT
from tests.support.runs import LORA, PLAIN, program, rows_of

SCRIPT = str(ROOT / "tests" / "support" / "shared_weights.py")


def test_what_is_shared_out(monkeypatch):
    """Large matrices that divide, by their first axis that does; neither small ones nor tables nor convolutions."""
    monkeypatch.setattr(weights, "LARGE", 48)
    tree = {
        "a": {"kernel": np.arange(64.0).reshape(8, 8), "bias": np.zeros(64)},
        "b": {"kernel": np.zeros((7, 12))},
        "c": {"kernel": np.zeros((7, 9))},
        "d": {"kernel": np.zeros((4, 4))},
        "e": {"embedding": np.zeros((64, 64))},
        "f": {"kernel": np.zeros((3, 3, 8, 8))},
    }
    found = parallel.shared_out(tree, 4)
    assert found["a"]["kernel"].axis == -2 and found["b"]["kernel"].axis == -1
    assert {name for name in tree if isinstance(found[name].get("kernel"), parallel.Part)} == {"a", "b"}
    jax.tree.map(np.testing.assert_array_equal, parallel.shared_out(tree, 1), tree)


def test_each_device_holds_its_part(monkeypatch):
    """Also on a host whose devices have other places on the axis; together they are the whole."""
    part, kernel = devices.Part(np.arange(24.0).reshape(4, 6), -1), np.arange(24.0).reshape(4, 6)
    monkeypatch.setattr(backend, "device_count", lambda: 3)
    np.testing.assert_array_equal(np.concatenate([part.of(place) for place in range(3)], axis=-1), kernel)
    shape = parallel.shapes_on_devices({"kernel": part})["kernel"].kernel
    assert shape.shape == (jax.local_device_count(), 4, 2)


@pytest.mark.parametrize(
    "memory, size, words, expected",
    [(16, 5, "auto", False), (16, 6, "auto", True), (None, 99, "auto", False), (None, 1, "true", True)]
    + [(16, 15, "false", False)],
)
def test_when_weights_are_shared_out(monkeypatch, memory, size, words, expected):
    monkeypatch.setattr(backend, "device_memory", lambda: memory)
    assert Parallel(shard_weights=words).shards(size) == expected


def on_devices(n, *arguments, code=0):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "users")])}
    environment["XLA_FLAGS"] = environment.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={n}"
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True
    )
    assert done.returncode == code, done.stderr.decode()


def test_a_deep_network_by_parts(tmp_path):
    """Value and LoRA's gradient as with copies; a device holds a quarter of the weights, and never all of them.

    A CPU merges LoRA into a copy before it multiplies, which rounds otherwise.
    """
    on_devices(4, "layers", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == {"parts", "loop", "loop, again"}
    for name, of_parts in found.items():
        assert of_parts["difference"] < 5e-6, name
        assert of_parts["arguments"] < 0.3, name
        assert of_parts["more temporaries"] < 0.5, name


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_transformers_by_parts(tmp_path, n):
    """FLUX's and SD 3.5's outputs and gradients as with copies, to rounding: LoRA is merged into a copy alone."""
    on_devices(n, "networks", tmp_path / "found.json")
    for name, found in json.loads((tmp_path / "found.json").read_text()).items():
        assert found.pop("shared") > 40, name
        assert max(found.values()) < 5e-6, (name, found)


@pytest.mark.slow
def test_prompts_are_encoded_by_parts(tmp_path):
    """By two CLIPs and a T5, whose large kernels four devices share out."""
    on_devices(4, "encode", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["difference"] < 5e-6 and found["parts"] > 30


@pytest.mark.slow
def test_a_program_of_real_size_by_parts(tmp_path):
    """FLUX.1-dev's update on eight devices, lowered for GPUs and TPUs: each holds an eighth of the kernels."""
    on_devices(8, "lower", tmp_path / "found.json")
    for device, found in json.loads((tmp_path / "found.json").read_text()).items():
        assert 1 / 8 <= found["held"] < 0.14, device
        assert found["gathers"] > 20, device


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm, changes",
    [
        ("alignprop", {}),
        ("alignprop", {"model.remat": "block"}),
        ("ddpo", {"ddpo.updates": 1, "ddpo.gradient": "onepass"}),
        # without the last steps, whose log-probs have slopes of 1 / std^2 that make rounding large
        ("ddpo", {"ddpo.updates": 2, "ddpo.timestep_fraction": 0.5}),
        ("draft", {}),
        ("nft", {"batch.group": 2}),
    ],
    ids=str,
)
def test_a_run_by_parts_is_one_by_copies(algorithm, changes, tiny_settings, tmp_path):
    """As close as runs on other numbers of devices: XLA fuses a gathered product otherwise, which a chain makes larger.

    Adam with so large an epsilon follows the gradient itself, which no division makes larger.
    """
    linear = {"optim.eps": 1.0, "optim.lr": 1.0, "optim.schedule": "constant"}
    settings = tiny_settings | PLAIN | linear | {"iterations": 2, "batch.samples": 8, "batch.samples_per_forward": 1}
    settings |= {"exploration.enabled": True, "cpu_devices": 4} | changes
    for shared in ("false", "true"):
        line = program(algorithm, tmp_path / shared, settings | {"parallel.shard_weights": shared})
        on_devices(4, "train", *line[3:])
    ours, theirs = (load_file(tmp_path / name / LORA) for name in ("true", "false"))
    for name, x in theirs.items():
        np.testing.assert_allclose(ours[name], x, rtol=0, atol=1e-5 * np.abs(x).max(), err_msg=name)
    rows = [rows_of(tmp_path / name) for name in ("true", "false")]
    assert [row["reward/mean"] for row in rows[0][1:]] == pytest.approx([row["reward/mean"] for row in rows[1][1:]])
