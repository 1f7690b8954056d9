"""Times this package beside careful plain torch on the same work, in turns, and writes a table of it.

    python tools/benchmark/benchmark.py --out docs/evidence/data/benchmarks.json \\
        --table docs/evidence/benchmarks.md                                              # tens of minutes
    python tools/benchmark/benchmark.py --model mid --case sampling --repeats 9 --out mid.json
    python tools/benchmark/benchmark.py --model sd15 --model sdxl --out gpu.json         # on a GPU or a TPU
    python tools/benchmark/benchmark.py --no_torch --before ../old --out change.json     # has a change made it slower?

Each side is a process of its own that stays ready while the other one runs, so that both meet the same machine: a
repetition of one, a repetition of the other, and so on. Reported are medians, their ratio, each side's peak memory, how
long the first repetition took (compiling, here; allocating, there), and the share of the machine's own matrix peak that
our arithmetic comes to. Torch is installed for the tests (requirements-test.txt); torch_peer.py says what it does. With
--no_torch torch is not timed, with --trl TRL's trainers are timed too (trl_peer.py), with --before another checkout of
this package, of cases that both have.

The work of a repetition on a CPU: 64 images of 20 steps with the emoji model, or 4 of 5 steps with a random model of
the shape of SD 1.5 ("mid") or SD 3.5 medium ("mid_sd3"), each of some 50 million parameters and 32 x 32 latents; from
two prompts, with brightness as the reward. On an accelerator: SD 1.5 at 512 pixels, SDXL and SD 3.5 medium at 1024,
random weights in bfloat16, as many images as SIZES says.
"""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()  # the imports take seconds

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark_work import CASES, HERE, PUBLISHED, SCORING, SIZES, matrix_peak
from tqdm import tqdm

from diffexp_jax import backend
from diffexp_jax.errors import InputError
from diffexp_jax.limits import check_number, whole
from diffexp_jax.report.document_parts import check, write_between

MARKERS = "<!-- benchmark -->", "<!-- /benchmark -->"
PEERS = ("torch", "trl", "before")
CUT = ("T/4", "uniform K", "schedule")  # cases with steps that are less work, or have no gradient
PROMPTS = ("a dog riding a bike", "a cat")
# More and less work of this package: cost should follow it, and the first repetition's should not.
GROWTH = [("emoji", "sampling", {"samples": n}) for n in (16, 64, 256)]
GROWTH += [("emoji", "sampling", {"steps": n}) for n in (10, 50)]
GROWTH += [("emoji", "DDPO, one update", {"samples": n}) for n in (16, 64, 256)]
GROWTH += [("emoji", "AlignProp, K = T", {"live": n}) for n in (1, 5, 10, 20)]


def worker_of(root: Path) -> Path:
    """The worker's program in a checkout of this package."""
    return root / "tools" / "benchmark" / "benchmark_work.py"


class Side:
    """A worker's process.

    size: flags that change how much its work is. cache: where compiled programs are kept. root: the checkout of this
    package that it runs.
    """

    def __init__(
        self,
        side: str,
        model: str,
        folder: str,
        case: str,
        *,
        cache: str = "",
        size: Sequence[str] = (),
        root: Path = HERE.parents[1],
    ):
        line = [sys.executable, str(worker_of(root)), side, model, folder, case, *size]
        # two programs share an accelerator: neither takes all of its memory at the start
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
        environment |= {"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
        environment |= {"JAX_COMPILATION_CACHE_DIR": cache} if cache else {}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(line, env=environment, text=True, **pipes)
        self.flops = self.answer()["flops"]
        self.seconds: list[float] = []

    def answer(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise InputError("a worker ended: its message is above")

    def repeat(self, profile: str = "") -> None:
        """`profile`: a folder for a profile of a repetition whose time does not count."""
        self.process.stdin.write(f"{profile}\n")
        self.process.stdin.flush()
        seconds = self.answer()["seconds"]
        if not profile:
            self.seconds.append(seconds)

    def close(self) -> int:
        self.process.stdin.close()
        peak = self.answer()["peak_bytes"]
        self.process.wait()
        return peak


def compare(
    model: str,
    folder: str,
    case: str,
    repeats: int,
    bar: tqdm,
    *,
    names: Sequence[str],
    profile: Path | None,
    before: Path | None,
) -> dict[str, Any]:
    """A row: the sides of these names in turns, then ours once more, with its programs compiled before."""
    cache = str(Path(folder, f"cache-{case}".replace("/", "-")))
    sides = {name: Side(name, model, folder, case, cache=cache) for name in names if name != "before"}
    if "before" in names:
        sides["before"] = Side("ours", model, folder, case, cache=f"{cache}-before", root=before)
    for _ in range(repeats + 1):  # the first compiles, or allocates
        for side in sides.values():
            side.repeat()
            bar.update()
    if profile:
        sides["ours"].repeat(str(profile / f"{model}-{case}".replace(" ", "_").replace("/", "-")))
    row: dict[str, Any] = {"model": model, "case": case, "flops": sides["ours"].flops}
    for name, side in sides.items():
        row[name] = {
            "first": side.seconds[0],
            "seconds": side.seconds[1:],
            "median": statistics.median(side.seconds[1:]),
            "peak_bytes": side.close(),
        }
    again = Side("ours", model, folder, case, cache=cache)
    again.repeat()
    row["ours"] |= {"peak_bytes_again": again.close(), "first_again": again.seconds[0]}
    for name in names[1:]:
        row[name]["ratio"] = row[name]["median"] / row["ours"]["median"]
    return row


def grow(model: str, folder: str, case: str, size: dict[str, int], repeats: int) -> dict[str, Any]:
    """A row of this package alone, with more or less work."""
    side = Side("ours", model, folder, case, size=[f"--{name}={n}" for name, n in size.items()])
    for _ in range(repeats + 1):
        side.repeat()
    side.close()
    seconds = {"first": side.seconds[0], "median": statistics.median(side.seconds[1:])}
    return {"model": model, "case": case, "size": size, "flops": side.flops} | seconds


# -------------------------------------------------------------------------------------------------------------- report


def table(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    peers = [name for name in PEERS if any(name in row for row in report["rows"])]
    header = ["model", "case", "ours", *(x for name in peers for x in (name, f"{name} / ours"))]
    header += ["memory, ours", "again", *peers, "first", "again", "matrix peak"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in report["rows"]:
        ours, others = row["ours"], [row.get(name) for name in peers]
        share = f"{100 * row['flops'] / ours['median'] / report['matrix_peak']:.0f} %"
        if row["case"].endswith(CUT):  # the count is as if all steps were alike
            share = ""
        cells = [row["model"], row["case"], f"{ours['median']:.2f} s"]
        for side in others:
            cells += [f"{side['median']:.2f} s", f"{side['ratio']:.2f}"] if side else ["", ""]
        peaks = [ours["peak_bytes"], ours["peak_bytes_again"], *(side and side["peak_bytes"] for side in others)]
        cells += [f"{peak / 1e9:.2f} GB" if peak else "" for peak in peaks]
        cells += [f"{ours['first']:.0f} s", f"{ours['first_again']:.0f} s", share]
        lines.append(f"| {' | '.join(cells)} |")
    if report["growth"]:
        lines += ["", "| model | case | work | seconds | a TFLOP | first |", "|---|---|---|---|---|---|"]
    for row in report["growth"]:
        work = ", ".join(f"{name} {n}" for name, n in row["size"].items())
        cells = [
            row["model"],
            row["case"],
            work,
            f"{row['median']:.2f} s",
            "" if "live" in row["size"] else f"{1e12 * row['median'] / row['flops']:.1f} s",
        ]
        lines.append(f"| {' | '.join(cells)} | {row['first']:.0f} s |")
    devices, *versions = report["machine"].items()
    versions = ", ".join([devices[1], *(f"{name} {version}" for name, version in versions)])
    lines.append(
        f"\n{versions}; matrix peak {report['matrix_peak'] / 1e9:,.0f} GFLOP/s; "
        f"medians of {report['repeats']}, {report['date']}; `{report['command']}`"
    )
    return "\n".join(lines)


def write_table(path: Path, text: str) -> None:
    """Puts the table between the markers of a document."""
    write_between(path, MARKERS, [text])


def main(args: argparse.Namespace) -> None:
    check_number("--repeats ", args.repeats, whole(1, 1000))
    command.check_writable(args.out.parent, "--out")
    if args.table:
        check(args.table, MARKERS)
    if args.before and not worker_of(args.before).is_file():
        raise InputError(f"--before {args.before}: not a checkout of this package")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or this program would hold all memory
    models = args.model or [name for name in SIZES if (name in PUBLISHED) == (backend.platform() != "cpu")]
    work = [
        (model, case, sides_of(args, model, case))
        for model in models
        for case in args.case or [*CASES, *SCORING]
        if model == "emoji" or case not in SCORING
    ]
    report = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "machine": backend.machine(),
        "repeats": args.repeats,
        "matrix_peak": matrix_peak(),
        "rows": [],
        "growth": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        write_models(
            folder, list(dict.fromkeys([*models, *(GROWTH[0][:1] if args.growth else ())])), torch=not args.no_torch
        )
        with tqdm(total=sum(len(x[2]) for x in work) * (args.repeats + 1), unit="repetition") as bar:
            for model, case, names in work:
                bar.set_description(f"{model}, {case}")
                options = {"names": names, "profile": args.profile, "before": args.before}
                row = compare(model, str(Path(folder, model)), case, args.repeats, bar, **options)
                report["rows"].append(row)
                args.out.write_text(json.dumps(report, indent=1) + "\n")  # what is there so far
                tqdm.write(f"{model}, {case}: {in_words(row)}")
        for model, case, size in tqdm(GROWTH if args.growth else [], desc="growth"):
            report["growth"].append(grow(model, str(Path(folder, model)), case, size, args.repeats))
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    if args.table:
        write_table(args.table, table(report))


def sides_of(args: argparse.Namespace, model: str, case: str) -> tuple[str, ...]:
    """Who does this case.

    Raises:
      InputError: TRL is asked for and not there.
    """
    names = ("ours",) if args.no_torch else ("ours", "torch")
    if args.trl:
        try:
            import trl_peer
        except ImportError as error:
            raise InputError(f"--trl: {error}; tools/benchmark/trl_peer.py says what to install") from None
        names += ("trl",) if trl_peer.can(model, case) else ()
    return (*names, "before") if args.before else names


def write_models(folder: str, models: Sequence[str], *, torch: bool) -> None:
    """FOLDER/MODEL of each, with prompts.txt, and the files of the random model.

    Raises:
      InputError: torch, which writes them, or which is to be timed, is not there.
    """
    for name in models:
        Path(folder, name).mkdir()
        Path(folder, name, "prompts.txt").write_text("\n".join(PROMPTS))
    random = [name for name in models if name.startswith("mid")]
    if torch or random:
        try:
            import torch_models
            import torch_peer  # noqa: F401
        except ImportError as error:
            raise InputError(f"{error}; wants torch, diffusers and peft: requirements-test.txt") from None
        for name in random:
            torch_models.WRITERS[name](Path(folder, name))


def in_words(row: dict[str, Any]) -> str:
    """The medians, and their ratio."""
    said = [f"{row['ours']['median']:.2f} s"]
    said += [f"{x} {row[x]['median']:.2f} s, ratio {row[x]['ratio']:.2f}" for x in PEERS if x in row]
    return ", ".join(said)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("benchmark.json"), help="the .json file to write")
    add("--table", type=Path, help="a Markdown file to put the table into")
    add(
        "--model", action="append", choices=tuple(SIZES), help="(repeat for several; default: the machine's, see above)"
    )
    add("--case", action="append", choices=(*CASES, *SCORING), help="(repeat for several; default: all)")
    add("--repeats", type=int, default=5, help="timed repetitions of each side, after a first")
    add("--no_torch", action="store_true", help="do not time torch")
    add("--trl", action="store_true", help="time TRL's trainers too; tools/benchmark/trl_peer.py says what to install")
    add("--before", type=Path, help="another checkout of this package, timed beside this one")
    add("--profile", type=Path, help="a folder for jax's profiles of one more repetition of ours (for XProf)")
    add("--growth", action="store_true", help="also time the emoji model with other batches, steps and K")
    command.guarded(main, parser.parse_args())
