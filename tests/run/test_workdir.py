"""A workdir: which runs may go on in it and what they may change, its lock, and how it knows weights again."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from configs import alignprop
from diffexp_jax import backend
from diffexp_jax.errors import InputError
from diffexp_jax.run import lease, workdir
from diffexp_jax.run.fingerprint import fingerprint
from diffexp_jax.settings import parsed
from tests.support import ROOT

IDENTITY = {"model": "1", "reward": "pickscore 2", "prompts": "3 4"}


def settings(**changes):
    config = alignprop.get_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return parsed(config)


def begin(folder, **changes):
    """What a run of these settings leaves that has saved its first checkpoint."""
    plan = workdir.plan(folder, settings(**changes))
    with workdir.claim(folder, plan.settings, IDENTITY):
        (folder / "checkpoints" / "0").mkdir(parents=True)
    return plan.settings


def stored(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_files_of_killed_programs_are_cleared(tmp_path):
    """When a run begins; not those of a program that lives, nor what is not ours."""
    (tmp_path / "images").mkdir()
    (tmp_path / "other").mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        f"{name}.{pid}.partial" for name in ("metrics.jsonl", "images/000001.png") for pid in (dead.pid, os.getpid())
    }
    kept = {f"report.html.{os.getppid()}.partial", f"other/x.{dead.pid}.partial", "a.partial", f"{dead.pid}.partial"}
    kept |= {"lease.json.12345678.partial"}  # looks at the lease now
    old = "lease.json.0123456789abcdef.partial"
    for name in (*names, *kept, old):
        (tmp_path / name).write_text("x")
    os.utime(tmp_path / old, (1e9, 1e9))
    begin(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.partial")} == kept


# ------------------------------------------------------------------------------------------------------ what is planned


def test_what_auto_came_to_goes_on(tmp_path, monkeypatch):
    """A run that began on a CPU stays in float32 where a new one would take bfloat16."""
    begin(tmp_path)
    assert stored(tmp_path)["model"]["dtype"] == "float32"
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    assert workdir.plan(tmp_path, settings()).settings.model.dtype == "float32"
    assert workdir.plan(tmp_path / "new", settings()).settings.model.dtype == "bfloat16"
    with pytest.raises(InputError, match='model.dtype \\("float32" there, "bfloat16" here\\)'):
        workdir.plan(tmp_path, settings(model__dtype="bfloat16"))


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("optim.ema", 0.9, "optim.ema (0.0 there, 0.9 here)"),
        ("optim.warmup", 3, "optim.warmup (0 there, 3 here)"),
        ("sampling.negative_prompt", "blurry", 'sampling.negative_prompt ("" there, "blurry" here)'),
    ],
)
def test_what_makes_another_run_is_said(tmp_path, key, value, said):
    begin(tmp_path)
    with pytest.raises(InputError, match=f"holds a run of another config: {re.escape(said)}; take another"):
        workdir.plan(tmp_path, settings(**{key: value}))


def test_more_iterations_explore_no_more(tmp_path):
    """Three quarters of what was planned first; another number only where it is asked for."""
    begin(tmp_path, iterations=100)
    assert stored(tmp_path)["exploration"]["iterations"] == 75
    config, notes = workdir.plan(tmp_path, settings(iterations=200))
    assert config.exploration.iterations == 75
    assert notes == [
        "iterations is 200, was 100",
        "exploration is for the first 75 iterations, as planned first (exploration.iterations)",
    ]
    with workdir.claim(tmp_path, config, IDENTITY):
        pass
    assert workdir.plan(tmp_path, settings(iterations=400)).settings.exploration.iterations == 75
    config, notes = workdir.plan(tmp_path, settings(iterations=200, exploration__iterations=150))
    assert config.exploration.iterations == 150 and notes == ["exploration.iterations is 150, was 75"]
    assert workdir.plan(tmp_path / "new", settings(iterations=10)).settings.exploration.iterations == 8
    other = workdir.plan(tmp_path / "new", settings(iterations=10, exploration__iterations=3)).settings
    assert other.exploration.iterations == 3


@pytest.mark.parametrize(
    "schedule, now, planned", [("linear", 7.5e-4, 0.0), ("linear", 5e-4, 2.5e-4), ("cosine", 8.536e-4, 0.0)]
)
def test_a_rate_that_falls_is_stretched_by_more_iterations(tmp_path, schedule, now, planned):
    """Both rates at the newest checkpoint are said; of a constant one there is nothing to say."""
    first, then, done = (8, 12, 6) if planned else (2, 8, 2)
    optim = {"optim__schedule": schedule, "optim__lr": 1e-3, "exploration__enabled": False}
    begin(tmp_path, iterations=first, **optim)
    for name in ("0", str(done), f"{done + 1}.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(exist_ok=True)
    _, notes = workdir.plan(tmp_path, settings(iterations=then, **optim))
    assert notes[1:] == [
        f"the learning rate falls to 0 over {then} iterations in place of {first} (optim.schedule={schedule}): after "
        f"iteration {done} it is {now:.4g}, as planned first {planned:.4g}"
    ]


def test_how_the_work_is_split_may_change(tmp_path):
    begin(tmp_path)
    changes = {"batch__samples_per_forward": 4, "model__remat": "block", "model__vae_slice": 1, "eval__every": 0}
    _, notes = workdir.plan(tmp_path, settings(**changes))
    assert notes == [
        "batch.samples_per_forward is 4, was 32",
        "eval.every is 0, was 24",
        'model.remat is "block", was "step"',
        "model.vae_slice is 1, was 32",
    ]


def test_keys_that_an_older_version_did_not_know(tmp_path):
    begin(tmp_path)
    content = stored(tmp_path)
    del content["textnorm"], content["exploration"]["iterations"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "identity.json").unlink()
    config, notes = workdir.plan(tmp_path, settings(iterations=120))
    assert config.exploration.iterations == 36  # of the 48 that it began with
    assert notes[-1] == (
        "the run began in an older version: exploration.iterations, textnorm.contrast, textnorm.temperature, "
        "textnorm.uncertainty had the defaults"
    )
    with pytest.raises(InputError, match=r"textnorm.temperature \(1.0 there, 0.5 here\)"):
        workdir.plan(tmp_path, settings(textnorm__temperature=0.5))
    with pytest.raises(InputError, match='prompts \\("animal_activities" there, "animals" here\\)'):
        workdir.plan(tmp_path, settings(prompts="animals"))  # nothing else says that they are the same


# ------------------------------------------------------------------------------------------------------- what it is of


@pytest.mark.parametrize("key", ["model.path", "prompts", "reward"])
def test_other_names_for_the_same(tmp_path, key):
    """A moved folder or file goes on; other weights or prompts do not, whatever they are called."""
    begin(tmp_path)
    config, notes = workdir.plan(tmp_path, settings(**{key.replace(".", "__"): "elsewhere"}))
    assert notes == []
    with workdir.claim(tmp_path, config, IDENTITY):
        pass
    name = {"model.path": "model"}.get(key, key)
    before = stored(tmp_path)
    with pytest.raises(InputError) as error, workdir.claim(tmp_path, config, IDENTITY | {name: "9"}):
        pass
    assert f"holds a run of another {name}: {key}=" in str(error.value) and "take another" in str(error.value)
    assert stored(tmp_path) == before


def test_fingerprints():
    tree = {"a": np.arange(10_000, dtype=np.float32), "b": (jnp.ones((3, 2), jnp.bfloat16), np.array("text"))}
    assert fingerprint(tree) == fingerprint({"a": tree["a"].copy(), "b": tree["b"]}) and len(fingerprint(tree)) == 8
    for other in (
        {"a": tree["a"] + 1e-3, "b": tree["b"]},
        {"a": tree["a"].reshape(100, 100), "b": tree["b"]},
        {"c": tree["a"], "b": tree["b"]},
        {"a": tree["a"].astype(np.float64), "b": tree["b"]},
        {"a": tree["a"], "b": (tree["b"][0], np.array("texts"))},
    ):
        assert fingerprint(other) != fingerprint(tree)
    assert fingerprint(("a", "b"), np.zeros(0)) != fingerprint(("a", "c"), np.zeros(0))


# ----------------------------------------------------------------------------------------------------------------- lock

HOLD = """
import sys, time
from pathlib import Path
from configs import alignprop
from diffexp_jax.run import workdir
from diffexp_jax.settings import parsed
folder = Path(sys.argv[1])
with workdir.claim(folder, workdir.plan(folder, parsed(alignprop.get_config())).settings, {}):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_workdir_in_use(tmp_path):
    """A second program is refused at once; when the first is killed, the lock that it leaves is no hindrance."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    try:
        for use in (
            lambda: workdir.plan(tmp_path, settings()),
            lambda: workdir.claim(tmp_path, settings(), {}).__enter__(),
        ):
            with pytest.raises(InputError, match=f"in use by process {holder.pid} on "):
                use()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / "lock").exists()
    config, _ = workdir.plan(tmp_path, settings())
    with workdir.claim(tmp_path, config, {}):
        assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()


# --------------------------------------------------------------------------------------------- lock of several machines


@pytest.fixture
def quick(monkeypatch):
    """Leases that are renewed and go stale within a second."""
    monkeypatch.setattr(lease, "RENEW", 0.05)
    monkeypatch.setattr(lease, "STALE", 0.6)


def left_by(folder, host, **changes):
    """What a program on another machine leaves that was killed now."""
    folder.mkdir(exist_ok=True)
    (folder / "lock").touch()
    owner = {"host": host, "boot": "another", "pid": 7, "id": "theirs"} | changes
    (folder / "partial").write_text(json.dumps(owner))
    (folder / "partial").replace(folder / "lease.json")
    return owner


def test_a_run_on_another_machine_is_noticed(quick, tmp_path, capsys):
    """Its clock is an hour late, which does not matter: the file system's is looked at."""
    left_by(tmp_path, "elsewhere", time=0)
    stop = threading.Event()

    def renew():
        while not stop.wait(0.05):
            left_by(tmp_path, "elsewhere")

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        for create in (False, True):
            with (
                pytest.raises(InputError, match="in use by process 7 on elsewhere$"),
                lease.hold(tmp_path, create=create),
            ):
                pass
    finally:
        stop.set()
        thread.join()
    assert "process 7 on elsewhere had it 0 s ago; waits for a sign of it" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "{", "[1]"])
def test_a_dead_machines_lock_is_taken_over(quick, tmp_path, caplog, content):
    """Also one that was killed while it wrote. Nothing is left of either when the run ends."""
    left_by(tmp_path, "elsewhere")
    if content is not None:
        (tmp_path / "lease.json").write_text(content)
    with lease.hold(tmp_path) as held:
        time.sleep(0.2)
        held.check()
        assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()
    name = "process 7 on elsewhere" if content is None else "process ? on another machine"
    assert f"{name} left it without a word" in caplog.text and "taken over" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_program_killed_on_this_machine_is_not_waited_for(tmp_path, caplog):
    left_by(tmp_path, socket.gethostname(), boot=lease._boot())
    with lease.hold(tmp_path):
        pass
    assert not caplog.text


def test_a_run_that_was_taken_over_stops(quick, tmp_path):
    """It was silent for too long: its machine slept, say. What the other one wrote is left alone."""
    with lease.hold(tmp_path) as held:
        held.check()
        left_by(tmp_path, "elsewhere")
        time.sleep(0.3)
        with pytest.raises(OSError, match="process 7 on elsewhere has taken it over: this program was silent for"):
            held.check()
    assert json.loads((tmp_path / "lease.json").read_text())["id"] == "theirs"


def test_a_workdir_that_vanishes(quick, tmp_path):
    (tmp_path / "run").mkdir()
    with lease.hold(tmp_path / "run") as held:
        shutil.rmtree(tmp_path / "run")
        time.sleep(0.3)
        with pytest.raises(OSError, match="run: is gone$"):
            held.check()
    assert not (tmp_path / "run").exists()


def test_of_two_that_begin_at_once_one_does(tmp_path, monkeypatch):
    """On a file system without flock: both find nobody there."""
    monkeypatch.setattr(fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    one, other = lease.Lease(tmp_path), lease.Lease(tmp_path)
    one.begin()
    with pytest.raises(InputError, match=f"in use by process {os.getpid()} on "):
        other.begin()
    one.end()
    with lease.hold(tmp_path) as held:
        held.check()
