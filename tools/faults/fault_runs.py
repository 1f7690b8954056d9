"""The runs that tools/faults/fault_campaign.py breaks: of the tests' tiny model, each in a process of its own.

Their processes are forked from one that has imported everything but used no device, which saves seconds for each.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffexp_jax.cli import train as cli_train
from diffexp_jax.models.lora import LORA_FILE
from diffexp_jax.run.checkpoint import read_lora
from diffexp_jax.run.metrics import read_metrics

ROOT = Path(__file__).parents[2]
ALGORITHMS = ("ddpo", "alignprop")
HOSTS = (1, 2)  # how many processes a run has
ITERATIONS = 8
# Besides those of the tests' tiny run: evaluations, pictures and checkpoints after different iterations
SETTINGS = {"iterations": ITERATIONS, "checkpoint.every": 2, "log.images_every": 4}
SETTINGS["checkpoint.best"] = "eval/unseen/pickscore"
_IMPORTS = [
    "diffexp_jax.train",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "huggingface_hub",
    "PIL.ImageOps",
]
_IMPORTS += ["transformers.models.clip.tokenization_clip", "transformers.tokenization_utils_base"]
_MODEL = """
import json, sys
from pathlib import Path
from tests.support import tiny
folder = Path(sys.argv[1])
for name in ("model", "clip", "prompts"):
    (folder / name).mkdir()
clip = tiny.write_tiny_clip(folder / "clip")
settings = tiny.write_tiny_settings(folder / "prompts", tiny.write_tiny_model(folder / "model"), clip)
print(json.dumps({key: str(value) for key, value in settings.items()}))
"""
TIMEOUT = 300.0  # seconds that a run may take: one that takes longer hangs
TIMEOUT_OF_HOSTS = 10  # seconds after which a silent host counts as gone
LEASE_STALE = 6.0  # seconds after which a lease is stale where two programs contend for a workdir
TIMEOUT_OF_STARTS = 60  # within which both are there: one that is killed before leaves the other waiting

_context = multiprocessing.get_context("forkserver")


class Run(NamedTuple):
    """A run: a process, or one for each host."""

    processes: list[Any]
    workdir: Path
    logs: list[Path]  # of each
    begun: float

    def is_alive(self) -> bool:
        """Whether all of it is."""
        return all(process.is_alive() for process in self.processes)


class End(NamedTuple):
    """How it ended."""

    code: int  # -9 where SIGKILL ended it
    said: list[str]  # lines on stderr and stdout, without the bar's

    @property
    def is_clear(self) -> bool:
        return (
            not any("Traceback" in line for line in self.said) and sum(x.startswith("error:") for x in self.said) == 1
        )


def prepare(folder: Path) -> dict[str, str]:
    """Writes the model into the folder, if it is not there, and imports in the process that the others are forked from.

    Returns the settings of every run.
    """
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiles faster, as in the tests
    _context.set_forkserver_preload(_IMPORTS)
    if (folder / "settings.json").exists():
        return json.loads((folder / "settings.json").read_text())
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", _MODEL, str(folder)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    values = json.loads(done.stdout) | SETTINGS | {"compilation_cache": str(folder / "cache")}
    (folder / "settings.json").write_text(json.dumps(values))
    return values


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(
    algorithm: str,
    settings: Mapping[str, Any],
    workdir: Path,
    *,
    hosts: int = 1,
    port: int | None = None,
    fails: tuple[int, int] | None = None,
    alone: bool = True,
    log: str = "",
) -> Run:
    """Begins a run, or resumes it; see `_train` for `fails` and `alone`.

    Args:
      port: where the hosts meet; None: one that is free.
      log: added to the names of the logs, where several programs are in one workdir.
    """
    places: list[dict[str, Any]] = [{}]
    if hosts > 1:
        common = {
            "hosts.coordinator": f"127.0.0.1:{port or free_port()}",
            "hosts.number": hosts,
            "hosts.heartbeat_timeout": TIMEOUT_OF_HOSTS,
            "hosts.initialization_timeout": TIMEOUT_OF_STARTS,
        }
        places = [common | {"hosts.index": index} for index in range(hosts)]
    folder = Path(settings["compilation_cache"]).parent  # not on the run's disk, which may be full
    logs = [folder / f"{workdir.parent.name}-{workdir.name}-{index}{log}.log" for index in range(hosts)]
    processes = [
        _context.Process(target=_train, args=(algorithm, {**settings, **place}, workdir, path, fails, alone))
        for place, path in zip(places, logs, strict=True)
    ]
    for process in processes:
        process.start()
    return Run(processes, workdir, logs, time.monotonic())


def _train(
    algorithm: str, settings: Mapping[str, Any], workdir: Path, log: Path, fails: tuple[int, int] | None, alone: bool
) -> None:
    """What `python -m diffexp_jax.train` does, in a process of its own; on host fails[0] iteration fails[1] raises.

    alone: False: as on a machine of its own, without the system's lock; a lease is stale after seconds.
    """
    import signal

    from diffexp_jax import command, train
    from diffexp_jax.errors import RewardError
    from diffexp_jax.run import lease

    if not alone:
        lease._flock, lease.RENEW, lease.STALE = lambda *args: False, 0.5, LEASE_STALE

    def iterate(run, state, it, original=train.iterate):
        if fails == (settings.get("hosts.index"), it):
            raise RewardError("the server has gone")
        return original(run, state, it)

    train.iterate = iterate
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = [f"--config={ROOT / 'configs' / f'{algorithm}.py'}", f"--workdir={workdir}"]
    sys.argv = ["train", *arguments, *(f"--config.{key}={value}" for key, value in settings.items())]
    command.guarded(cli_train.main, cli_train.parse_flags(sys.argv))


def wait(run: Run) -> End:
    """Waits for the end of a run of one process. Raises TimeoutError where it hangs."""
    (end,) = wait_for_all(run)
    return end


def wait_for_all(run: Run) -> list[End]:
    """The end of each process of a run. Raises TimeoutError where one hangs."""
    for process in run.processes:
        process.join(max(run.begun + TIMEOUT - time.monotonic(), 0.0))
    if any(process.is_alive() for process in run.processes):
        for process in run.processes:
            process.kill()
        raise TimeoutError(f"{run.workdir}: does not end within {TIMEOUT:g} s")
    return [End(process.exitcode, _said(log)) for process, log in zip(run.processes, run.logs, strict=True)]


def _said(log: Path) -> list[str]:
    """The lines of a log, without the bar's; the file goes."""
    text = log.read_text(errors="replace") if log.exists() else ""
    log.unlink(missing_ok=True)
    lines = [line.rpartition("\r")[2].strip() for line in text.split("\n")]
    return [line for line in lines if line and not line.startswith("fine-tuning")]


def until(run: Run, condition: Callable[[], Any], patience: float = TIMEOUT) -> bool:
    """Waits until the condition holds; False where the run has ended before, or the patience."""
    end = time.monotonic() + patience
    while run.is_alive() and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.001)
    return False


# ------------------------------------------------------------------------------------------------------------- results


def rows(workdir: Path) -> list[dict[str, Any]]:
    """The metrics without the clock's."""
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(workdir)]


def unfinished(workdir: Path) -> set[tuple[str, int]]:
    """Checkpoints that are not whole yet, or were not when a run was killed: an earlier kill's may still be there."""
    found = set()
    for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
        with contextlib.suppress(FileNotFoundError):  # it is whole now
            found.add((path.name, path.stat().st_ino))
    return found


def state(workdir: Path) -> dict[str, Any]:
    """The checksums of everything in the newest checkpoint: LoRA, optimizer, statistics."""
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    contents = json.loads((workdir / "checkpoints" / str(max(steps)) / "contents" / "metadata").read_text())
    return {"iteration": max(steps), "crc32": contents["crc32"]}


def differences(workdir: Path, expected: Path) -> list[str]:
    """What differs between two runs, bit for bit: the last state, the LoRA, the metrics; [] for nothing."""
    found = []
    if state(workdir) != state(expected):
        found.append("the last state")
    if (workdir / LORA_FILE).read_bytes() != (expected / LORA_FILE).read_bytes():
        found.append("the LoRA's file")
    if rows(workdir) != rows(expected):
        found.append("the metrics")
    lines = (workdir / "metrics.jsonl").read_text().split("\n")
    if len(lines) != ITERATIONS + 2 or lines[-1]:
        found.append(f"{len(lines) - 1} lines of metrics")
    if read_lora(workdir, "best")[0] != read_lora(expected, "best")[0]:
        found.append("the best checkpoint")
    return found


def copy(workdir: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(workdir, to)
