r"""Runs an experiment's arms over seeds, and resumes where it was stopped; `configs/sweeps.py` has the experiments.

python scripts/sweep.py --experiment fig4_ddpo_pickscore --model emoji --seeds 3 --out runs/sweeps
python scripts/sweep.py --experiment fig1 --seeds 5 --out runs/sweeps --print slurm > fig1.sbatch

What is done already is left alone. A run's output is in its folder's log.txt. Settings of all arms are given as
--config.KEY=VALUE.
"""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()  # the imports take seconds

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import jax
from tqdm import tqdm

jax.config.update("jax_platforms", "cpu")  # what a sweep computes is little; accelerators are for its runs

from diffexp_jax import backend  # noqa: E402
from diffexp_jax.errors import InputError  # noqa: E402
from diffexp_jax.formats.files import write_whole  # noqa: E402
from diffexp_jax.limits import check_number, whole  # noqa: E402
from diffexp_jax.run import stopping  # noqa: E402
from diffexp_jax.run.metrics import read_metrics  # noqa: E402
from diffexp_jax.sweeps import commands, plan  # noqa: E402
from diffexp_jax.sweeps.plan import Run  # noqa: E402

LOG = "log.txt"
GPU_MEMORY = 0.9  # of a GPU's memory that the runs on it have together
POLL = 0.5  # seconds between looks at what runs
GRACE = 120.0  # seconds that a program may take to stop before it is killed: one that compiles does not listen


class Active(NamedTuple):
    """A run whose commands are being worked through."""

    run: Run
    rest: list[list[str]]  # commands that follow
    process: subprocess.Popen
    log: IO[str]
    place: dict[str, str]  # see `places`


def main(args: argparse.Namespace, rest: Sequence[str]) -> None:
    for flag, least in (("seeds", 1), ("first_seed", 0), ("samples_per_prompt", 0), ("base_samples", 0)):
        check_number(f"--{flag} ", getattr(args, flag), whole(least))
    for flag in ("parallel", "iterations"):
        check_number(f"--{flag} ", getattr(args, flag), whole(1, optional=True))
    overrides = dict(map(plan.parse_override, rest))
    overrides |= {} if args.iterations is None else {"iterations": args.iterations}
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs, experiments = plan.plan(
        args.experiment, model=args.model, seeds=seeds, out=args.out, overrides=overrides, only=args.arm
    )
    command.check_writable(args.out, "--out")
    wanted = {"samples_per_prompt": args.samples_per_prompt, "base_samples": args.base_samples}
    if args.print:
        left = commands.commands_left(runs, cpu_devices=None, **wanted)
    else:
        kind, n_devices = devices()
        parallel, cpu_devices = processes(args.parallel, len(runs), kind, n_devices)
        left = commands.commands_left(runs, cpu_devices=cpu_devices, **wanted)
    note(args.out, experiments)
    if not left:
        print(f"nothing to do: {len(runs)} runs are done", file=sys.stderr if args.print else sys.stdout)
    elif args.print == "slurm":
        print(commands.slurm_script(left, args.out, name="-".join(args.experiment)))
    elif args.print:
        print("\n".join(shlex.join(words) for _, of_run in left for words in of_run))
    else:
        if len(left) < len(runs):
            print(f"{len(runs) - len(left)} of {len(runs)} runs are done")
        n_gpus = n_devices if kind == "gpu" and parallel > 1 else 0
        run_all(runs, left, places(min(parallel, len(left)), n_gpus))


def processes(asked: int | None, n_runs: int, kind: str, n_devices: int) -> tuple[int, int | None]:
    """How many runs at once, and what cpu_devices each gets: None leaves it to the run.

    A run on each core of a CPU, or on each GPU, is faster than one on all. One that has begun on one device stays
    there, also when it is the last that is left: with another number of devices last bits differ.
    """
    cores = backend.cores()
    if asked is None:
        asked = {"cpu": cores, "gpu": n_devices}.get(kind, 1) if n_runs > 1 else 1
    return asked, 1 if asked > 1 and kind == "cpu" else None


def places(parallel: int, n_gpus: int) -> list[dict[str, str]]:
    """What each of the runs at once finds in its environment: its GPU, and its part of that one's memory.

    Args:
      n_gpus: that the runs share out; 0 where they choose for themselves.
    """
    if not n_gpus:
        return [{}] * parallel
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = listed.split(",") if listed else [str(i) for i in range(n_gpus)]
    on_one = -(-parallel // n_gpus)
    part = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{GPU_MEMORY / on_one:.3f}"} if on_one > 1 else {}
    return [part | {"CUDA_VISIBLE_DEVICES": names[i % n_gpus]} for i in range(parallel)]


def devices() -> tuple[str, int]:
    """("cpu", "gpu" or "tpu", how many): asked of another program, so that this one holds no accelerator.

    Raises:
      InputError: jax finds no device.
    """
    code = "import jax; print(jax.default_backend(), jax.local_device_count())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if found.returncode:
        raise InputError(f"no device to run on: {(found.stderr.strip().splitlines() or ['jax cannot start'])[-1]}")
    kind, n = found.stdout.split()[-2:]
    return kind, int(n)


def note(out: Path, experiments: dict[str, dict]) -> None:
    """Writes down which runs are the arms of each experiment, for scripts/analyse.py."""
    for name, content in experiments.items():
        write_whole(out / "experiments" / f"{name}.json", json.dumps(content, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------- running


def run_all(runs: Sequence[Run], left: Sequence[tuple[Run, list[list[str]]]], places: Sequence[dict[str, str]]) -> None:
    """Works through all commands, a run at each place; a run that fails is named, and the others continue.

    Raises SystemExit: 1 where a run failed; 130, 143 or 129 where SIGINT, SIGTERM or SIGHUP stopped it.
    """
    received: list[int] = []
    for number in stopping.signals():
        signal.signal(number, lambda number, frame: received.append(number))
    waiting, free, active, failed = list(left), list(places), [], []
    unfinished = {run.workdir for run, _ in left}
    done = {run.workdir: done_of(run, run.workdir in unfinished) for run in runs}
    total = sum(run.iterations for run in runs)
    with tqdm(total=total, initial=sum(done.values()), unit="it", desc="sweep", smoothing=0.0) as bar:
        while (waiting or active) and not received:
            while waiting and free:
                active.append(start(*waiting.pop(0), free.pop(0)))
            time.sleep(POLL)
            for item in active:
                done[item.run.workdir] = done_of(item.run, True)
            bar.update(sum(done.values()) - bar.n)
            before, active = active, []
            for item in before:
                later = follow(item, failed)
                if later:
                    active.append(later)
                else:
                    free.append(item.place)
            runs_left = len(waiting) + len(active)
            done_runs = f"{len(runs) - runs_left - len(failed)} of {len(runs)} runs done"
            bar.set_postfix_str(done_runs, refresh=sys.stderr.isatty())  # into a file only when there is progress
    if received:
        stop(active, received[0])
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(128 + received[0])
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again", file=sys.stderr)
        sys.exit(1)


def done_of(run: Run, unfinished: bool) -> int:
    """An unfinished run without checkpoints begins again, whatever numbers of it were kept."""
    if unfinished and not (run.workdir / "checkpoints").exists():
        return 0
    rows = read_metrics(run.workdir)
    return min(rows[-1]["iteration"], run.iterations) if rows else 0


def start(run: Run, left: list[list[str]], place: dict[str, str]) -> Active:
    """Begins the first of a run's commands; what it says is added to the run's log."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    log = open(run.workdir / LOG, "a", encoding="utf-8")
    words, *rest = left
    print(f"$ {shlex.join(words)}", file=log, flush=True)
    words = [sys.executable, *words[1:]]  # where it says python
    environment = commands.environment() | place
    process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
    return Active(run, rest, process, log, place)


def follow(item: Active, failed: list[Run]) -> Active | None:
    """What has become of it: still the same, the run's next command, or None where the run has ended or failed."""
    code = item.process.poll()
    if code is None:
        return item
    item.log.close()
    if code == 0:
        return start(item.run, item.rest, item.place) if item.rest else None
    failed.append(item.run)
    path = item.run.workdir / LOG
    lines = path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
    tqdm.write(f"failed: {item.run.label} (exit code {code}): {lines[-1]} ({path})", file=sys.stderr)
    return None


def stop(active: Sequence[Active], number: int) -> None:
    """Passes the signal on and waits for the programs to end."""
    for item in active:
        item.process.send_signal(number)
    deadline = time.monotonic() + GRACE
    for item in active:
        try:
            item.process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            item.process.kill()
            item.process.wait()
        item.log.close()


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and what is left: settings of all arms."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--experiment", action="append", required=True, help="a name of configs/sweeps.py (repeat for several)")
    add("--arm", action="append", default=[], help="run only this arm (repeat for several; default: all)")
    add("--model", help="a name of configs/models.py: emoji for the miniature (default: the paper's)")
    add("--seeds", type=int, default=3, help="how many runs of each arm")
    add("--first_seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/sweeps"), help="folder of all sweeps: runs that they share are run once")
    add("--parallel", type=int, help="runs at once (default: one for each core of a CPU or each GPU)")
    add("--iterations", type=int, help="of every run (default: the config's)")
    add("--samples_per_prompt", type=int, default=4, help="images of the final evaluation, at least; 0: none")
    add("--base_samples", type=int, default=16, help="images of each prompt that say how often the base model succeeds")
    add("--print", nargs="?", const="commands", choices=("commands", "slurm"), help="print what is left, run nothing")
    return parser.parse_known_args(argv)


if __name__ == "__main__":
    command.guarded(main, *parse(sys.argv[1:]))
