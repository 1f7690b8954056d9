"""Training runs and programs, and what they left."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

from diffexp_jax.run.metrics import read_metrics
from tests.support import ROOT
from tests.support.tiny import as_flags

LORA = "pytorch_lora_weights.safetensors"
PLAIN = {"eval.every": 0, "log.images": 0}  # nothing but the training itself


def rows_of(workdir: Path) -> list[dict]:
    """The metrics without the clock's."""
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(workdir)]


def assert_same_run(workdir: Path, expected: Path) -> None:
    """The same LoRA and the same metrics, bit for bit."""
    ours, theirs = load_file(workdir / LORA), load_file(expected / LORA)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert rows_of(workdir) == rows_of(expected)


def program(algorithm: str, workdir: Path, settings: dict) -> list[str]:
    config = f"--config=configs/{algorithm}.py"
    return [sys.executable, "-m", "diffexp_jax.train", config, f"--workdir={workdir}", *as_flags(settings)]


def run_program(*arguments, cwd):
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(cwd)}
    line = [sys.executable, *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)


class Ended(NamedTuple):
    """What became of a process."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Its last line on stderr."""
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ended(processes: list[subprocess.Popen], *, seconds: float = 300) -> list[Ended]:
    """Waits for all of them; one that does not end fails the test."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


PROCESS = str(ROOT / "tests" / "support" / "host_process.py")


FINAL_EVALUATION = "diffexp_jax.sweeps.final_evaluation"  # run as a module


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
