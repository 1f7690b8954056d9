"""What tools/faults/fault_campaign.py does to the files of a run besides killing it."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fault_runs import TIMEOUT_OF_HOSTS, End, copy, differences, free_port, rows, until, wait, wait_for_all

HITS = {
    "start": "while it loads, or before the first row",
    "iteration": "in an iteration or an evaluation",
    "checkpoint": "while a checkpoint is written",
}
_TMPFS_KB = 4096


class Case(NamedTuple):
    """A kind of damage."""

    name: str
    says: str  # what the table calls it
    try_it: Callable[[Any, str, Path, random.Random], list[str]]  # (campaign, algorithm, workdir, rng) -> what is wrong


def newest(workdir: Path) -> Path:
    folders = [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    return max(folders, key=lambda path: int(path.name))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def goes_on(damage: Callable[[Path, random.Random], None]) -> Callable:
    """A run whose files are damaged while it is stopped: the same command ends it as an undisturbed one."""

    def try_it(campaign: Any, algorithm: str, workdir: Path, rng: random.Random) -> list[str]:
        damage(copy(campaign.half(algorithm), workdir), rng)
        return ended(wait(campaign.start(algorithm, workdir)), workdir, campaign.whole(algorithm))

    return try_it


def ended(end: End, workdir: Path, whole: Path) -> list[str]:
    """What is wrong with the end of a run."""
    if end.code != 0:
        return [f"exit code {end.code}", *end.said[-3:]]
    return differences(workdir, whole) + [line for line in end.said if "Traceback" in line]


# ------------------------------------------------------------------------------------------------------------- damages


def truncate(workdir: Path, rng: random.Random) -> None:
    for path in rng.sample(files(newest(workdir)), 2):
        os.truncate(path, rng.randrange(path.stat().st_size))


def flip(workdir: Path, rng: random.Random) -> None:
    """A bit of a file, the large ones more often."""
    all_files = files(newest(workdir))
    (path,) = rng.choices(all_files, [path.stat().st_size for path in all_files])
    flip_in(path, rng)


def flip_in(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flip_rows(workdir: Path, rng: random.Random) -> None:
    """A bit of the metrics, which most often are json still."""
    flip_in(workdir / "metrics.jsonl", rng)


def flip_contents(workdir: Path, rng: random.Random) -> None:
    """A bit of what the newest checkpoint says of itself: its rows of the metrics, its score, its checksums."""
    flip_in(newest(workdir) / "contents" / "metadata", rng)


def remove(workdir: Path, rng: random.Random) -> None:
    path = rng.choice([*files(newest(workdir)), *(path for path in newest(workdir).iterdir() if path.is_dir())])
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def tear(workdir: Path, rng: random.Random) -> None:
    """Cuts the metrics within their last lines, or doubles lines, or both."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if rng.random() < 0.5:
        lines += lines[-2:]
    text = "".join(lines)
    path.write_text(text[: len(text) - rng.randrange(len(lines[-1]) + len(lines[-2]))])


def spoil_reports(workdir: Path, rng: random.Random) -> None:
    """Nothing that people look at can be written: another thing is in its place."""
    shutil.rmtree(workdir / "images")
    (workdir / "images").touch()
    for name in ("curves.png", "report.html"):
        (workdir / name).unlink(missing_ok=True)
        (workdir / name).mkdir()


def contend(campaign: Any, algorithm: str, workdir: Path, rng: random.Random) -> list[str]:
    """Two programs take over a dead machine's workdir at once, without the system's lock: one of them is refused."""
    copy(campaign.half(algorithm), workdir)
    owner = {"host": "elsewhere", "boot": "another", "pid": 7, "id": f"{rng.getrandbits(64):016x}"}
    (workdir / "lease.json").write_text(json.dumps(owner) if rng.random() < 0.8 else "damaged")
    runs = [campaign.start(algorithm, workdir, alone=False, log=f"-{n}") for n in range(2)]
    ends = [wait(run) for run in runs]
    codes = sorted(end.code for end in ends)
    refused = [end for end in ends if end.code == 2]
    wrong = [] if codes == [0, 2] else [f"exit codes {codes}", *(line for end in ends for line in end.said[-3:])]
    wrong += [line for end in refused for line in end.said if not end.is_clear]
    return wrong or differences(workdir, campaign.whole(algorithm))


# ---------------------------------------------------------------------------------------------------------------- disk


def on_a_small_disk(fill: Callable[[Path], None], mend: Callable[[Path], None]) -> Callable:
    """A run on a tmpfs of its own, to which something happens: it stops with one line and exit code 1, its newest
    checkpoint is whole, and once it is mended the same command ends it as an undisturbed one."""

    def try_it(campaign: Any, algorithm: str, workdir: Path, rng: random.Random) -> list[str]:
        whole, disk = campaign.whole(algorithm), workdir.with_name(f"{workdir.name}-disk")
        disk.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_TMPFS_KB}k", "tmpfs", str(disk)], check=True)
        try:
            run = campaign.start(algorithm, disk / "run")
            count = rng.randint(2, 6)
            until(run, lambda: len(rows(run.workdir)) >= count)
            fill(disk)
            end = wait(run)
            wrong = [] if end.code == 1 and end.is_clear else [f"exit code {end.code}", *end.said[-3:]]
            lines = (disk / "run" / "metrics.jsonl").read_text()
            wrong += [] if lines.endswith("\n") else ["a torn line of metrics"]
            mend(disk)
            return wrong + ended(wait(campaign.start(algorithm, disk / "run")), disk / "run", whole)
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)

    return try_it


def fill_up(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue


def make_read_only(disk: Path) -> None:
    """Mounts a second time over the first, which the kernel would not change while a file is open to be written."""
    subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)


def make_writable(disk: Path) -> None:
    subprocess.run(["umount", str(disk)], check=True)


def vanish(campaign: Any, algorithm: str, workdir: Path, rng: random.Random) -> list[str]:
    """The workdir is removed while the run goes on: it stops with one line, and makes no new one."""
    run = campaign.start(algorithm, workdir)
    count = rng.randint(1, 5)
    until(run, lambda: len(rows(workdir)) >= count)
    gone = workdir.rename(workdir.with_name(f"{workdir.name}-gone"))
    end = wait(run)
    shutil.rmtree(gone)
    wrong = [] if end.code == 1 and end.is_clear else [f"exit code {end.code}", *end.said[-3:]]
    return wrong + [f"there is {path.name}" for path in workdir.rglob("*")]


# --------------------------------------------------------------------------------------------------------------- hosts


def of_two_hosts(harm: str) -> Callable:
    """One of two hosts is killed, stands still, or raises: the other ends with one clear line and exit code 1, and the
    same command reaches the end of an undisturbed run of two."""

    def try_it(campaign: Any, algorithm: str, workdir: Path, rng: random.Random) -> list[str]:
        victim, count = rng.randrange(2), rng.randint(1, 5)
        run = campaign.start(algorithm, workdir, hosts=2, fails=(victim, count) if harm == "raises" else None)
        if harm != "raises":
            until(run, lambda: len(rows(workdir)) > count)
            os.kill(run.processes[victim].pid, signal.SIGKILL if harm == "killed" else signal.SIGSTOP)
            run.processes[1 - victim].join(6 * TIMEOUT_OF_HOSTS)
            run.processes[victim].kill()  # it may stand still
        ends = wait_for_all(run)
        watched = ends if harm == "raises" else [ends[1 - victim]]
        wrong = [f"{harm}: {end.code}: {line}" for end in watched if not is_told(end) for line in end.said[-3:] or [""]]
        ends = wait_for_all(campaign.start(algorithm, workdir, hosts=2))
        if [end.code for end in ends] != [0, 0]:
            return [*wrong, *(f"exit code {end.code}: {' '.join(end.said[-3:])}" for end in ends)]
        return wrong + differences(workdir, campaign.whole(algorithm, 2))

    return try_it


def port_is_taken(campaign: Any, algorithm: str, workdir: Path, rng: random.Random) -> list[str]:
    """Another program listens where the hosts are to meet: both end with one line; elsewhere it is done."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        ends = wait_for_all(campaign.start(algorithm, workdir, hosts=2, port=other.getsockname()[1]))
    bad = [end for end in ends if end.code != 2 or not end.is_clear]
    wrong = [f"exit code {end.code}: {' '.join(end.said[-3:])}" for end in bad]
    ends = wait_for_all(campaign.start(algorithm, workdir, hosts=2, port=free_port()))
    wrong += [f"exit code {end.code}: {' '.join(end.said[-3:])}" for end in ends if end.code]
    return wrong or differences(workdir, campaign.whole(algorithm, 2))


def is_told(end: End) -> bool:
    """Whether a host that another one has left ends so: jax's C++ may print its own stack above the line."""
    return end.code == 1 and end.is_clear


CASES = (
    Case("truncated", "files of the newest checkpoint cut short", goes_on(truncate)),
    Case("flipped", "a bit of the newest checkpoint flipped", goes_on(flip)),
    Case("missing", "a file or folder of the newest checkpoint missing", goes_on(remove)),
    Case("rows-flipped", "a bit of the metrics flipped", goes_on(flip_rows)),
    Case(
        "contents-flipped", "a bit of the newest checkpoint's rows, score or checksums flipped", goes_on(flip_contents)
    ),
    Case("torn", "metrics torn, lines doubled", goes_on(tear)),
    Case("reports", "pictures, curves and report that cannot be written", goes_on(spoil_reports)),
    Case("contenders", "two programs take over a dead machine's workdir at once", contend),
    Case("full", "full disk (tmpfs)", on_a_small_disk(fill_up, lambda disk: (disk / "filler").unlink())),
    Case("read-only", "disk read-only (tmpfs)", on_a_small_disk(make_read_only, make_writable)),
    Case("removed", "workdir removed", vanish),
    Case("host-killed", "one host of two killed: the other ends in one line", of_two_hosts("killed")),
    Case("host-stopped", "one host of two stopped (SIGSTOP): the other ends in one line", of_two_hosts("stopped")),
    Case("host-raises", "one host of two raises: both end in one line", of_two_hosts("raises")),
    Case("port", "the port of two hosts is taken: both end in one line", port_is_taken),
)
