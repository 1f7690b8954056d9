"""A run that is asked to stop: it saves and goes on bit for bit; what the second signal and the end of the grace do."""

import os
import pty
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest

from diffexp_jax import command, train
from diffexp_jax.cli import train as cli_train
from diffexp_jax.run import checkpoint, stopping
from diffexp_jax.run.metrics import MetricsWriter, read_metrics
from tests.support import ROOT
from tests.support.runs import PLAIN, assert_same_run, program

LATE = {"stop_grace": 600.0, "checkpoint.every": 100} | PLAIN  # nothing is saved but when a run is stopped


@pytest.mark.usefixtures("programs_once", "undrawn")
@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_run_after_the_iteration(make_config, tmp_path, monkeypatch, capfd, number, code):
    """It is saved, a line says how to go on, and it ends as if it had not been stopped."""
    config, reports = make_config("ddpo", LATE), []

    def write(self, iteration, values, original=MetricsWriter.write):
        original(self, iteration, values)
        if iteration == 2:  # the third iteration has not begun: it is not asked again before its end
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write)
        patch.setattr(train.report, "refresh", lambda workdir, *, at_once: reports.append(at_once))
        before = signal.getsignal(number)
        with pytest.raises(SystemExit) as stop:
            command.guarded(train.run, config, tmp_path / "run")
        assert signal.getsignal(number) == before
    said = capfd.readouterr().err
    assert stop.value.code == code
    name = signal.Signals(number).name
    assert f"\n{name}: stops after this iteration, in 600 s at the latest; a second time: at once\n" in said
    iteration = read_metrics(tmp_path / "run")[-1]["iteration"]
    assert said.endswith(f"\nstopped after iteration {iteration}, which is saved; the same command continues\n")
    assert checkpoint.read_lora(tmp_path / "run")[0] == iteration == 2
    assert reports == [True] and " 2/4 [" in said  # at once, and the bar says what is saved
    if number == signal.SIGTERM:  # one is enough
        train.run(config, tmp_path / "run")
        train.run(config, tmp_path / "whole")
        assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.usefixtures("programs_once")
def test_a_request_in_the_last_iteration_lets_the_run_end(make_config, tmp_path, monkeypatch):
    """It is complete then: the report and the LoRA are there, and the exit code is 0."""

    def iterate(*args, original=train.iterate):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(train, "iterate", iterate)
    command.guarded(train.run, make_config("ddpo", LATE | {"iterations": 1}), tmp_path)
    assert (tmp_path / "report.html").exists() and (tmp_path / train.LORA_FILE).exists()


# Runs a command that hears SIGHUP, also where the tests themselves run under nohup
HEARING = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
HEARING = [sys.executable, "-c", HEARING]


HEARS = """
import hashlib, sys
from pathlib import Path
from diffexp_jax.run import stopping
with stopping.StopRequests(grace=float(sys.argv[1])) as requests:
    requests.last_resort = lambda: Path(sys.argv[2]).write_text("saved")
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes, in which no handler of Python's runs
"""


@pytest.mark.parametrize(
    "grace, wait, signals, saved",
    [
        (1.5, 0.0, [signal.SIGTERM], True),  # the grace is over
        (600.0, 1.3, [signal.SIGTERM, signal.SIGTERM], False),  # at once
        # the same one twice, as launchers do
        pytest.param(1.5, 0.0, [signal.SIGTERM, signal.SIGTERM], True, marks=pytest.mark.slow),
        # the shell's and the terminal's: nobody insists
        pytest.param(2.5, 1.3, [signal.SIGHUP, signal.SIGHUP], True, marks=pytest.mark.slow),
    ],
)
def test_a_long_program_is_broken_off(tmp_path, grace, wait, signals, saved):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [*HEARING, sys.executable, "-c", HEARS, str(grace), str(tmp_path / "state")]
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(wait)
    try:
        said = process.communicate(timeout=60)[1].split("\n")
    finally:
        process.kill()
    assert process.returncode == 128 + signals[0]
    assert [line for line in said if line] == [
        f"{signals[0].name}: stops after this iteration, in {grace:g} s at the latest; a second time: at once",
        "stopped in the middle of an iteration; the same command continues from the last checkpoint",
    ]
    assert (tmp_path / "state").exists() == saved


TALKS = """
import sys, time
from pathlib import Path
from diffexp_jax import command
from diffexp_jax.errors import Stopped
from diffexp_jax.run import stopping
def main(folder):
    with stopping.StopRequests(grace=600.0) as stop:
        while not (stop.number() or (folder / "end").exists()):
            time.sleep(0.01)
            print("an iteration" * 100)
            print("its bar", file=sys.stderr, end="")
        for stream in (sys.stdout, sys.stderr):
            print("saves", file=stream, flush=True)
        (folder / "saved").touch()
        if stop.number():
            raise Stopped(1, stop.number())
command.guarded(main, Path(sys.argv[1]))
"""


@pytest.mark.parametrize("kind, code", [("terminal", 129), ("nohup", 0), ("pipe", 0)])
def test_a_terminal_that_is_closed(tmp_path, kind, code):
    """The run is saved, or goes on where it was told not to hear of it; what it says then does not end it."""
    ours, theirs = os.pipe() if kind == "pipe" else pty.openpty()
    line = "exec " + shlex.join([sys.executable, "-c", TALKS, str(tmp_path)])
    if kind != "pipe":  # the first terminal that a session's leader opens is its own
        ignores = "trap '' HUP; " if kind == "nohup" else ""
        line = f"exec <{os.ttyname(theirs)}; {ignores}{line}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*HEARING, "bash", "-c", line],
        env=environment,
        stdout=theirs,
        stderr=theirs,
        start_new_session=kind != "pipe",
    )
    os.close(theirs)
    said = b""
    while b"its bar" not in said:
        said += os.read(ours, 4096)
    os.close(ours)
    if not code:
        time.sleep(0.2)  # it talks on
        (tmp_path / "end").touch()
    try:
        assert process.wait(60) == code
    finally:
        process.kill()
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_an_iteration_that_takes_too_long(tiny_settings, tmp_path):
    """The state before it is saved, although no checkpoint was due; the same command ends as one undisturbed run."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'users'}"}
    slow = "import sys; from tests.run.test_stopping import run_with_a_long_iteration as run; run(sys.argv[1:])"
    settings = tiny_settings | LATE | {"stop_grace": 0.5}
    line = program("ddpo", tmp_path / "run", settings)
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *line[3:]], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    for said in process.stdout:
        if said == "long\n":
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert checkpoint.read_lora(tmp_path / "run")[0] == 2
    for workdir in ("run", "whole"):
        line = program("ddpo", tmp_path / workdir, settings)
        subprocess.run(line, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def run_with_a_long_iteration(arguments: list[str]) -> None:
    """The run of a command line, whose third iteration takes a minute."""

    def iterate(run, state, it, original=train.iterate):
        if it == 2:
            print("long", flush=True)
            time.sleep(60.0)
        return original(run, state, it)

    train.iterate = iterate
    sys.argv = ["train", *arguments]
    command.guarded(cli_train.main, cli_train.parse_flags(sys.argv))


def test_outside_of_the_main_thread_nothing_is_heard():
    with stopping.StopRequests(grace=1.0) as requests:
        pass
    numbers = []

    def use():
        with stopping.StopRequests(grace=1.0) as requests:
            numbers.append(requests.number())

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert numbers == [0] and requests.number() == 0
