"""The check of a machine: this one passes it, and each kind of check can fail."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax import backend
from diffexp_jax.errors import InputError
from diffexp_jax.models import attention
from tests.support import ROOT


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import check_machine

    return check_machine


@pytest.fixture
def machine(script):
    return script.machine_checks


@pytest.fixture
def models(script):
    return script.models


def run_script(folder, *flags):
    """(what it printed, its report) of the script as a user runs it; it must find nothing wrong."""
    command = [sys.executable, str(ROOT / "scripts" / "check_machine.py"), "--out", "found.json", *flags]
    # with XLA's own optimisations: the tests' way compiles faster, and then runs for minutes
    env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_the_quick_rows(tmp_path):
    """Parity with the stored results, and nothing that learns."""
    said, report = run_script(tmp_path, "--only", "devices|versions|float32 products|SD 1.5, float32")
    names = ["devices", "versions", "float32 products, as the package asks", "float32 products, by default"]
    names += ["tiny SD 1.5, float32"]
    assert [row["check"] for row in report["checks"]] == names and report["ready"]
    assert all(row["status"] == "ok" for row in report["checks"]) and "ready: none of 5 checks failed" in said


@pytest.mark.slow  # a minute; by default test_alignprop.py compares such a gradient with torch's
def test_a_gradient_stored_elsewhere(tmp_path):
    """AlignProp's gradient through sampling, decoder and reward, against the values of another machine."""
    _, report = run_script(tmp_path, "--only", "AlignProp's gradient, float32")
    (row,) = report["checks"]
    assert row["status"] == "ok" and row["numbers"]["error"] < 1e-4 and row["numbers"]["cosine"] > 0.9999


def test_the_stored_results_are_of_these_settings(script, models):
    """A config that changes would make every machine look wrong: store the results anew, or pin the setting."""
    with np.load(script.REFERENCE) as stored:
        then = json.loads(str(stored["emoji/settings"]))
    now = json.loads(json.dumps(models.decisive_settings()))
    assert then["alignprop.truncation_k"] == models.LIVE_STEPS and len(then) > 20
    assert {key: now.get(key) for key in then} == then


def test_a_name_that_no_check_has(script, tmp_path):
    for only, said in (("xyzzy", "no check has such a name"), ("(", "wants a regular expression")):
        with pytest.raises(InputError, match=said):
            script.main(SimpleNamespace(out=tmp_path / "x.json", full=False, only=only, write_reference=False))


@pytest.mark.slow  # two to three minutes
def test_this_machine(tmp_path):
    """The short form as a user runs it: nothing fails, and the file says everything."""
    said, report = run_script(tmp_path, "--full")
    assert report["ready"] and "--full" in report["command"] and report["seconds"] > 0
    here = report["machine"]
    assert here["platform"] == "cpu" and here["devices"] == here["processes"] == 1
    assert here["versions"].keys() >= {"jax", "jaxlib", "flax", "optax"} and here["XLA_FLAGS"] == ""
    status = {row["check"]: row["status"] for row in report["checks"]}
    skipped = {name for name in status if name.startswith("attention") or "real size" in name}
    assert status == {name: "skipped" if name in skipped else "ok" for name in status}
    assert len(status) == 30 and len(skipped) == 14
    # products of 16 bits, and TF32's with as many digits, would fail float32's row on a GPU
    (row,) = (row for row in report["checks"] if row["check"] == "AlignProp's gradient, bfloat16")
    assert row["numbers"]["error"] > 5e-3
    assert all(f"\n{name} " in said for name in status)


def run(script, monkeypatch, tmp_path, **checks):
    """(exit code, rows) of the command with other checks."""
    listed = [script.Check(name, function) for name, function in checks.items()]
    monkeypatch.setattr(script, "all_checks", lambda reference, full: listed)
    code = 0
    try:
        script.main(SimpleNamespace(out=tmp_path / "found.json", full=False, only="", write_reference=False))
    except SystemExit as stop:
        code = stop.code
    return code, {row["check"]: row for row in json.loads((tmp_path / "found.json").read_text())["checks"]}


def test_a_check_that_raises_is_a_row(script, monkeypatch, tmp_path, capsys):
    def raises(text):
        def check():
            raise RuntimeError(text)

        return check

    memory = raises("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 GiB.\nand a long story")
    code, rows = run(
        script, monkeypatch, tmp_path, memory=memory, odd=raises(""), fine=lambda: script.Outcome("all of it", "some")
    )
    assert code == 1 and [row["status"] for row in rows.values()] == ["FAILED", "FAILED", "ok"]
    said = capsys.readouterr().out
    assert "RESOURCE_EXHAUSTED" in said and "long story" not in said and "Traceback" not in said
    assert "what to do: out of memory: lower batch.samples_per_forward or set model.remat=block" in said
    assert "what to do: not a known problem" in said and "2 of 3 checks failed" in said
    assert "long story" in rows["memory"]["error"] and "Traceback" in rows["memory"]["error"]


def test_all_ok_is_exit_code_0(script, monkeypatch, tmp_path, capsys):
    fine, skipped = script.Outcome("a", "a"), script.Outcome("nothing", ok=None)
    code, _ = run(script, monkeypatch, tmp_path, fine=lambda: fine, skipped=lambda: skipped)
    assert code == 0 and "what to do" not in capsys.readouterr().out


STORED = {"x/images": np.linspace(0.0, 1.0, 50), "emoji/gradient": np.linspace(-1.0, 2.0, 50)}


@pytest.mark.parametrize(
    "platform, dtype, error, ok",
    [
        ("cpu", "float32", 5e-5, True),
        ("cpu", "float32", 5e-4, False),
        ("gpu", "float32", 5e-4, True),
        ("gpu", "float32", 5e-3, False),
        ("gpu", "bfloat16", 5e-2, True),
        ("gpu", "bfloat16", 0.5, False),
        ("gpu", "float16", 5e-2, False),
        ("cpu", "float32", np.nan, False),
    ],
)
def test_perturbed_results(models, monkeypatch, platform, dtype, error, ok):
    monkeypatch.setattr(backend, "platform", lambda: platform)
    stored, x = STORED["x/images"], STORED["x/images"].copy()
    x[3] += error * np.linalg.norm(stored - stored.mean())
    found = models.check_parity(lambda: {"x/images": x}, STORED, dtype)
    assert found.ok is ok
    # TF32 is a GPU's; a CPU has no such setting
    assert ("matmul_precision" in found.advice) == (dtype == "float32" and platform != "cpu")


@pytest.mark.parametrize(
    "dtype, change, ok",
    [
        ("float32", lambda g: g, True),
        ("float32", lambda g: 1.01 * g, False),
        ("bfloat16", lambda g: 1.01 * g, True),
        ("bfloat16", lambda g: -g, False),
        ("float32", lambda g: 0 * g, False),
    ],
)
def test_wrong_gradients(models, monkeypatch, dtype, change, ok):
    monkeypatch.setattr(models, "emoji_results", lambda dtype: ({}, change(STORED["emoji/gradient"])))
    assert models.check_gradient(STORED, dtype).ok is ok


def test_wrong_attention(machine):
    """A filled-up key that nobody masks is far beyond bfloat16's rounding."""

    def attend(q, k, v, filled=0):
        q, k, v = (x.reshape(*x.shape[:2], 2, 40) for x in (q, k, v))
        k, v = (jnp.pad(x, ((0, 0), (0, filled), (0, 0), (0, 0))) for x in (k, v))
        return jax.nn.dot_product_attention(q, k, v).reshape(1, 64, 80)

    right, text = machine.attention_error(attend, 64, 77, 2, 40)
    wrong, _ = machine.attention_error(lambda *qkv: attend(*qkv, filled=1), 64, 77, 2, 40)
    assert right < machine.ATTENTION_ERROR / 3 < 3 * machine.ATTENTION_ERROR < wrong and "dot" in text


def test_cudnn_that_is_not_taken(machine, monkeypatch):
    monkeypatch.setattr(attention, "has_fused_attention", lambda dtype, width: True)
    monkeypatch.setattr(attention, "MIN_FUSED_LOGITS", 16)
    monkeypatch.setattr(attention, "attention", lambda q, k, v, heads: q)
    found = machine.check_attention(8, 8, 2, 8)
    assert found.ok is False and found.found.startswith("no cuDNN in the program") and "reinstall" in found.advice


def test_an_accelerator_that_jax_does_not_use(machine, monkeypatch):
    monkeypatch.setattr(machine.Path, "exists", lambda self: str(self) == "/dev/nvidia0")
    assert machine.check_devices().ok  # JAX_PLATFORMS asks for the CPU
    monkeypatch.delenv("JAX_PLATFORMS")
    found = machine.check_devices()
    assert found.ok is False and f'pip install "jax[cuda13]=={jax.__version__}"' in found.advice


def test_versions_that_do_not_fit(machine, monkeypatch):
    versions = {"jax": "0.10.2", "jaxlib": "0.10.1", "flax": "1", "optax": "1"}
    monkeypatch.setattr(machine, "machine", lambda: {"versions": versions})
    found = machine.check_versions()
    assert found.ok is False and found.advice == "install jaxlib==0.10.2"


@pytest.mark.parametrize("rise, ok", [(0.01, True), (0.0, False), (-0.01, False), (np.nan, False)])
def test_training_that_does_not_learn(models, monkeypatch, rise, ok):
    """Before and after from the same noise, so that what counts is the spread of the differences."""
    noise = np.random.default_rng(0).standard_normal((2, 16)) * [[1.0], [0.003]]

    class Stub:
        def start(self):
            return 0

        def batch(self, it):
            return it

        def iterate(self, state, batch):
            return state + 1, {}

        def brightness(self, state, n_batches):
            return noise[0] + (rise + noise[1] if state == 3 else 0.0)

    monkeypatch.setattr(models, "emoji_run", lambda *args: Stub())
    assert models.check_learning("ddpo", 3, 1).ok is ok


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ddpo", "alignprop"])
def test_full_size_on_a_tiny_model(models, make_config, method):
    """Each program is compiled once, and called twice."""
    config = make_config(method, {"eval.every": 0, "log.images_every": 0})
    compiled, listed = [], models.compiled_once

    def spy(function, plans):
        compiled.append(plans)
        return listed(function, plans)

    models.compiled_once = spy
    try:
        found = models.full_size(config)
    finally:
        models.compiled_once = listed
    assert found.ok and "GiB planned, compiled in" in found.found
    assert len(compiled) == len(compiled[0]) == {"ddpo": 2, "alignprop": 1}[method]
    assert found.numbers["planned_bytes"] == max(plan.bytes for plan in compiled[0]) > 1e5
    assert found.numbers["peak_bytes"] is None and found.numbers["grad_norm"] > 0


def test_a_reference_is_a_cpus(script, monkeypatch):
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    with pytest.raises(InputError, match="wants a CPU"):
        script.write_reference()
