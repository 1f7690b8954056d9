"""The check of a machine: it passes on this one, and its checks can fail."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_machine", ROOT / "scripts" / "check_machine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_this_machine(tmp_path):
    """The short form as a user runs it: every row ok or not for a CPU, and all of it in the file."""
    line = [sys.executable, ROOT / "scripts" / "check_machine.py", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(
        line, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready: 14 checks, none failed" in done.stdout and "FAILED" not in done.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["machine"]["platform"] == "cpu" and written["machine"]["versions"].keys() >= {"jax", "jaxlib"}
    rows = {row["name"]: row["ok"] for row in written["checks"]}
    assert len(rows) == 14
    assert {name for name, ok in rows.items() if ok is None} == {name for name in rows if name.startswith("attention")}


def test_checks_can_fail(script, capsys):
    """A distance that is too large, a NaN, an exception: failed rows with what to do, and the rest still runs."""
    stored = np.ones(4)

    def raises():
        yield script.near("before", stored, stored, 1e-6)
        raise MemoryError("out of memory\nand a long story")

    listed = [
        script.Check("far", lambda: [script.near("far", 1.1 * stored, stored, 1e-3)], "do this"),
        script.Check("nan", lambda: [script.near("nan", np.nan * stored, stored, 1e-3)], "do that"),
        script.Check("raises", raises, "take less"),
        script.Check("fine", lambda: [script.near("fine", stored, stored, 0.0)], "nothing"),
    ]
    rows = script.run_all(listed)
    assert [(row["name"], row["ok"]) for row in rows] == [
        ("far", False),
        ("nan", False),
        ("before", True),
        ("raises", False),
        ("fine", True),
    ]
    said = capsys.readouterr().out
    assert "1.0e-01 from the stored" in said and "MemoryError: out of memory" in said and "long story" not in said
    for advice in ("do this", "do that", "take less"):
        assert f"-> {advice}" in said
    assert "nothing" not in said


def test_a_failure_is_exit_code_1(script, monkeypatch, capsys, tmp_path):
    failing = script.Check("x", lambda: [script.Found("x", "0", "1", False)], "advice")
    monkeypatch.setattr(script, "checks", lambda reference, full: [failing])
    args = script.argparse.Namespace(write_reference=False, out=tmp_path / "out.json", full=False)
    with pytest.raises(SystemExit) as stopped:
        script.main(args)
    assert stopped.value.code == 1 and "1 of 1 checks failed" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["checks"][0]["ok"] is False


def test_a_wrong_gradient_is_found(script, monkeypatch):
    """Another gradient than the stored one, and one whose direction is lost."""
    stored = {"alignprop gradient": np.linspace(-1.0, 1.0, 50).astype(np.float32)}
    monkeypatch.setattr(script, "half_types", lambda: ("bfloat16",))
    for found, verdicts in (
        (stored["alignprop gradient"], [True, True]),
        (1.01 * stored["alignprop gradient"], [False, True]),
        (np.ones(50, np.float32), [False, False]),
    ):
        monkeypatch.setattr(script, "alignprop_gradient", lambda dtype, found=found: found)
        assert [row.ok for row in script.gradients(stored)] == verdicts


@pytest.mark.parametrize("algorithm", ["ddpo", "alignprop"])
def test_full_size_programs_on_a_tiny_model(script, make_config, algorithm):
    config = make_config(algorithm, {"eval.every": 0, "log.images_every": 0})
    rows = list(script.timed_programs("tiny", config))
    assert [row.name for row in rows] == [f"tiny: {name}" for name in (["sample"] if algorithm == "ddpo" else [])] + [
        "tiny: update"
    ]
    assert all(row.ok for row in rows), rows
    assert all(" s (compiled in " in row.found and "GiB by XLA" in row.found for row in rows)


def test_full_size_needs_an_accelerator(script):
    (row,) = script.full_size()
    assert row.ok is None and row.wanted == "a GPU or a TPU"
