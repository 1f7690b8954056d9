"""Kills training runs at random moments and damages what they left; every one must end as if nothing had happened.

python tools/faults/fault_campaign.py --kills 100 --damages 10 --folder /tmp/faults --out /tmp/reliability.json
python tools/faults/fault_campaign.py --out docs/evidence/data/reliability.json --table docs/evidence/reliability.md

A run of the tests' tiny model, of one process or of two hosts, is killed (SIGKILL, SIGTERM, SIGINT, SIGHUP; one host or
both) again and again until it comes to its end: its last state, its LoRA and every line of its metrics must be those of
a run that nobody disturbed, bit for bit. So must those of runs whose files were damaged in between, whose disk was
full, read-only or gone, once that is mended, whose reports could not be drawn, and which two programs took over at
once: all cases are in fault_cases.py. Mounting a small disk wants root.

--out grows as the campaign goes, and the same command resumes where it was stopped: take a new file for a new campaign.
With --folder the next start is some minutes faster, with --seconds it stops by itself, with --only it tries these cases
alone. 100 kills take half an hour on two cores that do nothing else, and each further damage of every kind some two
minutes, four where hosts are stopped.

The table of docs/evidence/reliability.md is made of the file by --table.
"""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()  # the imports take seconds

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fault_cases
import fault_runs
from fault_runs import ALGORITHMS, HOSTS, differences, rows, start, until, wait, wait_for_all
from tqdm import tqdm

from diffexp_jax.errors import InputError
from diffexp_jax.formats.files import read_json
from diffexp_jax.limits import check_number, one_of, whole
from diffexp_jax.report import document_parts

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
MARKS = "<!-- table -->", "<!-- /table -->"
_LATE = 0.2  # seconds after the moment that was aimed at, at most
# And 0 where the run came to its end first. -15 and -1 are the usual effects, while the model is loaded: 143 and 129 in
# a shell.
_CODES = {"SIGKILL": (-9,), "SIGTERM": (143, -15), "SIGINT": (130,), "SIGHUP": (129, -1)}


def main(args: argparse.Namespace) -> None:
    if args.table:
        write_table(args.table, read(args.out))
        return
    for flag in ("kills", "damages"):
        check_number(f"--{flag} ", getattr(args, flag), whole(0, 10**6))
    check_number("--parallel ", args.parallel, whole(1, 1024))
    cases = chosen(args.only)
    command.check_writable(args.out.parent, "--out")
    found = read(args.out)
    end = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.parallel) as pool:
        campaign = Campaign(args.folder or Path(temporary), args.seed)
        list(pool.map(campaign.begin, ALGORITHMS))
        list(pool.map(campaign.begin_on_two_hosts, ALGORITHMS))
        numbers = itertools.count(1 + max((trial["run"] for trial in found["kills"]), default=-1))
        with tqdm(total=args.kills, initial=len(found["kills"]), unit="kill") as bar:
            while len(found["kills"]) < args.kills and time.monotonic() < end:
                for trials in pool.map(campaign.kill_until_it_ends, itertools.islice(numbers, args.parallel)):
                    found["kills"] += trials
                    bar.update(len(trials))
                write(args.out, found)
        have = Counter(trial["case"] for trial in found["damages"])
        left = [(case, n) for case in cases for n in range(have[case.name], args.damages)]
        for i in tqdm(range(0, len(left), args.parallel), unit=f"{args.parallel} damages"):
            if time.monotonic() < end and len(found["kills"]) >= args.kills:
                found["damages"] += pool.map(campaign.damage, left[i : i + args.parallel])
                write(args.out, found)
    bad = [trial for kind in found for trial in found[kind] if not trial["ok"]]
    print(f"{len(found['kills'])} kills, {len(found['damages'])} damages, {len(bad)} failures")
    if bad:
        sys.exit(1)


def chosen(names: str | None) -> list[fault_cases.Case]:
    """The cases with these names, separated by commas; None: all."""
    known = {case.name: case for case in fault_cases.CASES}
    for name in (wanted := names.split(",") if names else list(known)):
        one_of("--only", name, known)
    return [known[name] for name in wanted]


class Campaign:
    """The runs, what they must come to, and what is done to them."""

    def __init__(self, folder: Path, seed: int):
        self._folder, self._seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self._settings = fault_runs.prepare(folder / "files")

    def begin(self, algorithm: str) -> None:
        """Makes a run that nobody disturbs, and one that is killed with some iterations to go."""
        if (self.half(algorithm) / "checkpoints" / "6").exists():
            return
        if (end := wait(self.start(algorithm, self.whole(algorithm)))).code != 0:
            raise InputError(f"{algorithm}: the undisturbed run ended in {end.code}: {' '.join(end.said[-3:])}")
        run = self.start(algorithm, self.half(algorithm))
        until(run, lambda: (run.workdir / "checkpoints" / "6").is_dir())
        run.processes[0].kill()
        wait(run)

    def begin_on_two_hosts(self, algorithm: str) -> None:
        """Makes a run of two hosts that nobody disturbs."""
        whole = self.whole(algorithm, 2)
        if not (whole / fault_runs.LORA_FILE).exists():
            ends = wait_for_all(self.start(algorithm, whole, hosts=2))
            if any(end.code for end in ends):
                raise InputError(
                    f"{algorithm}: two undisturbed hosts: {'; '.join(' '.join(e.said[-3:]) for e in ends)}"
                )

    def start(self, algorithm: str, workdir: Path, **options: Any) -> fault_runs.Run:
        return start(algorithm, self._settings, workdir, **options)

    def whole(self, algorithm: str, hosts: int = 1) -> Path:
        return self._folder / f"whole-{algorithm}-{hosts}"

    def half(self, algorithm: str) -> Path:
        return self._folder / f"half-{algorithm}"

    def kill_until_it_ends(self, number: int) -> list[dict[str, Any]]:
        """Starts a run, kills it, starts it again..., until it comes to its end; a trial for each kill."""
        algorithm, rng, trials = ALGORITHMS[number % 2], random.Random(f"{self._seed} {number}"), []
        hosts = HOSTS[number // 2 % 2]
        workdir = self._folder / f"run{number}"
        shutil.rmtree(workdir, ignore_errors=True)
        while True:
            older = fault_runs.unfinished(workdir)
            run, name = self.start(algorithm, workdir, hosts=hosts), rng.choice(SIGNALS)
            victims = rng.choice([[0], [1], [0, 1]]) if hosts > 1 else [0]
            aim, reached = self.await_moment(run, older, rng)
            for victim in victims if reached else []:
                os.kill(run.processes[victim].pid, signal.Signals[name])
            ends = wait_for_all(run)
            codes = [end.code for end in ends]
            if not any(codes):
                break
            if not reached:
                raise InputError(f"{workdir}: ended in {codes} by itself: {' '.join(ends[0].said[-3:])}")
            begun = "iteration" if not {-15, -1} & set(codes) and rows(workdir) else "start"
            hit = "checkpoint" if fault_runs.unfinished(workdir) - older else begun
            right = are_right(ends, victims, name, complete=len(rows(workdir)) > fault_runs.ITERATIONS)
            says = [] if right else [f"exit codes {codes}", *(line for end in ends for line in end.said[-3:])]
            trials.append({"run": number, "algorithm": algorithm, "processes": hosts, "signal": name, "aim": aim})
            trials[-1] |= {"hit": hit, "rows": len(rows(workdir)), "victims": victims, "codes": codes, "wrong": says}
        wrong = differences(workdir, self.whole(algorithm, hosts))
        shutil.rmtree(workdir)
        return [trial | {"wrong": trial["wrong"] + wrong, "ok": not trial["wrong"] + wrong} for trial in trials]

    def await_moment(self, run: fault_runs.Run, older: set, rng: random.Random) -> tuple[str, bool]:
        """What the kill is aimed at, and whether it came to that before the run ended."""
        aim, late = rng.choice(("row", "row", "checkpoint", "start")), rng.uniform(0.0, _LATE)
        before = len(rows(run.workdir))
        if aim == "start":
            late, reached = rng.uniform(0.0, 2.0), True
        elif aim == "row":
            more = rng.randint(1, 4)
            reached = until(run, lambda: len(rows(run.workdir)) >= before + more)
        else:
            late *= 0.2
            reached = until(run, lambda: fault_runs.unfinished(run.workdir) - older)
        return aim, reached and not until(run, lambda: False, late) and run.is_alive()

    def damage(self, which: tuple[fault_cases.Case, int]) -> dict[str, Any]:
        """A trial of this case and number."""
        case, number = which
        algorithm, rng = ALGORITHMS[number % 2], random.Random(f"{self._seed} {case.name} {number}")
        workdir = self._folder / f"{case.name}{number}"
        shutil.rmtree(workdir, ignore_errors=True)
        wrong = case.try_it(self, algorithm, workdir, rng)
        shutil.rmtree(workdir, ignore_errors=True)
        return {"case": case.name, "algorithm": algorithm, "wrong": wrong, "ok": not wrong}


def is_right(end: fault_runs.End, name: str) -> bool:
    """Whether a run that got this signal ended as it must."""
    return end.code in _CODES[name] and not any("Traceback" in line for line in end.said)


def are_right(ends: Sequence[fault_runs.End], victims: Sequence[int], name: str, *, complete: bool) -> bool:
    """Whether all processes of a run ended as they must when these got this signal.

    `complete` says whether all iterations were done.

    Hosts that are asked to stop while they train stop together. One that is killed, or that ends while it loads, leaves
    the others, which end in one clear line.
    """
    stopped = [end for end in ends if end.code in _CODES[name] and end.code > 0]
    for index, end in enumerate(ends):
        together = len(ends) > 1 and name != "SIGKILL" and stopped and end.code == stopped[0].code
        left = len(ends) > 1 and fault_cases.is_told(end)
        if not (complete and end.code == 0) and not (together or left or (index in victims and is_right(end, name))):
            return False
    return True


# --------------------------------------------------------------------------------------------------------------- table


def read(path: Path) -> dict[str, list]:
    """What is recorded so far."""
    return read_json(path) if path.exists() else {"kills": [], "damages": []}


def write(path: Path, found: dict[str, list]) -> None:
    """Writes json, a trial a line."""
    parts = [f'"{kind}": [\n' + ",\n".join(map(json.dumps, trials)) + "\n]" for kind, trials in found.items()]
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def table(found: dict[str, list]) -> str:
    """What was tried, how often, and how often it ended as it must."""
    if not any(found.values()):
        return "No campaign is recorded yet.\n"
    lines = ["| what | algorithm | times | ended as it must |", "|---|---|---|---|"]

    def add(what: str, trials: list[dict]) -> None:
        for algorithm in ALGORITHMS:
            its = [trial for trial in trials if trial["algorithm"] == algorithm]
            if its:
                lines.append(f"| {what} | {algorithm} | {len(its)} | {sum(trial['ok'] for trial in its)} |")

    for hosts in HOSTS:
        kills = [x for x in found["kills"] if x["processes"] == hosts]
        of = "one process" if hosts == 1 else "two hosts"
        for name in SIGNALS:
            for hit, where in fault_cases.HITS.items():
                add(f"{of}: {name} {where}", [x for x in kills if (x["signal"], x["hit"]) == (name, hit)])
        add(f"**{of}: all kills**", kills)
    for case in fault_cases.CASES:
        add(case.says, [x for x in found["damages"] if x["case"] == case.name])
    return "\n".join(lines) + "\n"


def write_table(document: Path, found: dict[str, list]) -> None:
    document_parts.write_between(document, MARKS, [table(found).rstrip()])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kills", type=int, default=100, help="how many there are to be in the file")
    add("--damages", type=int, default=6, help="how many of each kind")
    add("--only", help=f"kinds of damage, separated by commas: {', '.join(case.name for case in fault_cases.CASES)}")
    add(
        "--folder",
        type=Path,
        help="of the model, compiled programs and runs, for the next time (default: none is left)",
    )
    add("--parallel", type=int, default=2, help="runs at once")
    add("--seed", type=int, default=0, help="of the moments")
    add("--seconds", type=float, default=1e9, help="stop after so many (at the end of a trial)")
    add("--out", type=Path, default=Path("docs/evidence/data/reliability.json"))
    add("--table", type=Path, help="only write the table of --out into this document, between its marks")
    command.guarded(main, parser.parse_args())
