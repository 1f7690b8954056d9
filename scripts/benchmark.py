"""Times this package beside careful plain torch on the same work, in turns, and writes docs/benchmarks.md's table.

    python scripts/benchmark.py --out docs/benchmarks.json --table docs/benchmarks.md    # tens of minutes on a CPU
    python scripts/benchmark.py --model mid --case sampling --repeats 9 --out mid.json
    python scripts/benchmark.py --model sd15 --model sdxl --out gpu.json         # on a GPU or a TPU

Each side is a process of its own that stays ready while the other one runs, so that both meet the same machine: a
repetition of one, a repetition of the other, and so on. Reported are medians, their ratio, each side's peak memory, how
long the first repetition took (compiling, here; allocating, there), and the share of the machine's own matrix peak that
our arithmetic comes to. Torch is installed for the tests (requirements-test.txt); torch_peer.py says what it does. With
--no_torch our side is timed alone.

The work of a repetition on a CPU: 64 images of 20 steps with the emoji model, or 4 of 5 steps with a random model of
the shape of SD 1.5 ("mid": 50 million parameters, 32 x 32 latents), from two prompts, with brightness as the reward. On
an accelerator: SD 1.5 at 512 pixels and SDXL at 1024, random weights in bfloat16, as many images as SIZES says.
"""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()  # the imports take seconds

import argparse
import contextlib
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from random_weights import peak_memory, random_weights
from tqdm import tqdm

from diffexp_jax import InputError, backend, flops, parallel, settings
from diffexp_jax.algorithms import Inputs
from diffexp_jax.experiment import Experiment
from diffexp_jax.limits import check_number, whole
from diffexp_jax.models.lora import init_lora
from diffexp_jax.programs import make_programs

HERE = Path(__file__).resolve().parent
PROMPTS = ("a dog riding a bike", "a cat")


class Size(NamedTuple):
    """How much work a repetition is, on all devices of a CPU or on each accelerator."""

    samples: int
    steps: int
    per_forward: int  # samples at once
    remat: str = "step"  # see configs/base.py


SIZES = {"emoji": Size(64, 20, 64), "mid": Size(4, 5, 4), "sd15": Size(16, 50, 8), "sdxl": Size(4, 20, 4, "block")}
PUBLISHED = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}

# name: (method, what it changes, whether exploration's schedule is on)
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "sampling": ("alignprop", {}, False),
    "sampling, DiffExp's schedule": ("alignprop", {"exploration.t_thresh": 600}, True),
    "DDPO, two updates": ("ddpo", {"ddpo.updates": 2}, False),
    "DDPO, one update": ("ddpo", {"ddpo.updates": 1}, False),
    "AlignProp, K = T": ("alignprop", {"alignprop.truncation": "fixed"}, False),
    "AlignProp, K = T/4": ("alignprop", {"alignprop.truncation": "fixed"}, False),
}


def brightness(images):
    """The reward, [B,H,W,3] -> [B]."""
    return images.mean((1, 2, 3))


def live_steps(case: str, n_steps: int) -> int:
    """K of the case."""
    return n_steps // 4 if case.endswith("T/4") else n_steps


# ---------------------------------------------------------------------------------------------------------------- ours


def configure(model: str, folder: str, case: str) -> Any:
    """A run's settings that do the case's work, on this machine's devices, which it sets up."""
    method, changes, _ = CASES[case]
    size, config = SIZES[model], settings.default_config()
    config.algorithm = method
    config.prompts, config.reward = str(Path(folder, "prompts.txt")), "jax:benchmark:brightness"
    path = "emoji" if model == "emoji" else PUBLISHED.get(model, folder)
    config.update_from_flattened_dict(
        {
            "model.path": path,
            "model.remat": size.remat,
            "model.vae_slice": 32 if model not in PUBLISHED else size.per_forward,
            "batch.samples": size.samples,
            "batch.samples_per_forward": size.per_forward,
            "sampling.steps": size.steps,
            "sampling.eta": 1.0 if method == "ddpo" else 0.0,
            "eval.every": 0,
            "log.images_every": 0,
            "alignprop.truncation_k": live_steps(case, size.steps),
        }
        | changes
    )
    backend.set_cpu_devices(settings.cpu_devices(config))
    if backend.platform() == "cpu":  # its devices share the work; each accelerator does all of it
        config.batch.samples_per_forward = size.per_forward // jax.device_count()
    else:
        config.batch.samples = size.samples * jax.device_count()
    return config


def our_work(model: str, folder: str, case: str) -> tuple[Callable[[], Any], float]:
    """A function that does the case once, by a run's own programs, and its floating-point operations."""
    sys.path.insert(0, str(HERE))  # of the reward
    experiment = Experiment.build(configure(model, folder, case), weights=model not in PUBLISHED)
    programs, n = make_programs(experiment), jax.device_count()
    if model in PUBLISHED:
        frozen = random_weights(experiment.frozen)
        lora = init_lora(jax.random.key(0), experiment.sampler.pipeline.base, rank=experiment.config.lora.rank)
    else:
        frozen, lora = parallel.replicate(experiment.frozen), experiment.initial_lora()
    key = parallel.replicate(jax.random.key(0))
    steps = parallel.replicate(experiment.sampler.steps(explore=CASES[case][2]))
    batch = experiment.draw_batch(0, None)
    if case.startswith("sampling"):
        args = frozen["model"], parallel.replicate(lora), batch.context, batch.key, steps
        return lambda: programs.generate(*args), n * flops.of(programs.generate, *args)
    state = [parallel.replicate(jax.device_get(programs.algorithm.init(lora)))]

    def iterate():
        samples = programs.sample(state[0], frozen, batch, steps) if programs.sample else None
        state[0], metrics = programs.update(state[0], frozen, Inputs(batch, steps, key, samples))
        return metrics

    samples = jax.eval_shape(programs.sample, state[0], frozen, batch, steps) if programs.sample else None
    work = flops.of(programs.update, state[0], frozen, Inputs(batch, steps, key, samples))
    if programs.sample:
        work += flops.of(programs.sample, state[0], frozen, batch, steps)
    return iterate, n * work


def matrix_peak() -> float:
    """FLOP/s of a matrix product, the best of some: float32 with all cores of a CPU, bfloat16 on an accelerator."""
    n, dtype, best = (2048, jnp.float32, 0.0) if backend.platform() == "cpu" else (8192, jnp.bfloat16, 0.0)
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = jax.jit(jnp.dot)
    jax.block_until_ready(product(a, a))
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


# ------------------------------------------------------------------------------------------------------------- workers


def worker(side: str, model: str, folder: str, case: str) -> None:
    """Does the case once for each line on stdin, and answers with the seconds; at the end, with its peak memory.

    A line that names a folder: jax's profile of that repetition is written there.
    """
    if side == "ours":
        work, operations = our_work(model, folder, case)
        run, device_peak = (lambda: jax.block_until_ready(work())), peak_memory
    else:
        import torch_peer

        run, operations = torch_peer.make_work(model, folder, case, SIZES[model], live_steps, PUBLISHED), 0.0
        device_peak = torch_peer.peak_memory
    print(json.dumps({"ready": True, "flops": operations}), flush=True)
    for line in sys.stdin:
        with jax.profiler.trace(line.strip()) if line.strip() else contextlib.nullcontext():
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds}), flush=True)
    peak = device_peak() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_bytes": peak}), flush=True)


class Side:
    """A worker's process."""

    def __init__(self, side: str, model: str, folder: str, case: str):
        line = [sys.executable, __file__, "--worker", side, "--model", model, "--folder", folder, "--case", case]
        # two programs share an accelerator: neither takes all of its memory at the start
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
        environment |= {"PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"}
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
    model: str, folder: str, case: str, repeats: int, bar: tqdm, *, names: Sequence[str], profile: Path | None
) -> dict[str, Any]:
    """The sides of these names in turns; a row of the results."""
    sides = {name: Side(name, model, folder, case) for name in names}
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
    if "torch" in row:
        row["ratio"] = row["torch"]["median"] / row["ours"]["median"]
    return row


# -------------------------------------------------------------------------------------------------------------- report


def table(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| model | case | ours | torch | torch / ours | memory, ours | torch | first, ours | share of matrix peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        ours, torch = row["ours"], row.get("torch")
        share = row["flops"] / ours["median"] / report["matrix_peak"]
        cells = [row["model"], row["case"], f"{ours['median']:.2f} s"]
        cells += [f"{torch['median']:.2f} s", f"{row['ratio']:.2f}"] if torch else ["", ""]
        cells += [f"{side['peak_bytes'] / 1e9:.2f} GB" if side else "" for side in (ours, torch)]
        lines.append(f"| {' | '.join(cells)} | {ours['first']:.0f} s | {100 * share:.0f} % |")
    devices, *versions = report["machine"].items()
    versions = ", ".join([devices[1], *(f"{name} {version}" for name, version in versions)])
    lines.append(
        f"\n{versions}; matrix peak {report['matrix_peak'] / 1e9:,.0f} GFLOP/s; "
        f"medians of {report['repeats']}, {report['date']}; `{report['command']}`"
    )
    return "\n".join(lines)


def write_table(path: Path, text: str) -> None:
    """Puts the table between the markers of a document."""
    before, begin, rest = path.read_text().partition("<!-- benchmark -->\n")
    _, end, after = rest.partition("<!-- /benchmark -->")
    if not begin or not end:
        raise InputError(f"--table {path}: wants the lines <!-- benchmark --> and <!-- /benchmark -->")
    path.write_text(f"{before}{begin}{text}\n{end}{after}")


def main(args: argparse.Namespace) -> None:
    if args.worker:
        return worker(args.worker, args.model[0], args.folder, args.case[0])
    check_number("--repeats ", args.repeats, whole(1, 1000))
    command.check_writable(args.out.parent, "--out")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or this program would hold all memory
    names, cases = ("ours",) if args.no_torch else ("ours", "torch"), args.case or list(CASES)
    models = args.model or [name for name in SIZES if (name in PUBLISHED) == (backend.platform() != "cpu")]
    report = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "machine": backend.machine(),
        "repeats": args.repeats,
        "matrix_peak": matrix_peak(),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        write_models(folder, models, torch="torch" in names)
        with tqdm(total=len(names) * len(models) * len(cases) * (args.repeats + 1), unit="repetition") as bar:
            for model in models:
                for case in cases:
                    bar.set_description(f"{model}, {case}")
                    options = {"names": names, "profile": args.profile}
                    row = compare(model, str(Path(folder, model)), case, args.repeats, bar, **options)
                    report["rows"].append(row)
                    args.out.write_text(json.dumps(report, indent=1) + "\n")  # what is there so far
                    tqdm.write(f"{model}, {case}: {in_words(row)}")
    print(table(report))
    if args.table:
        write_table(args.table, table(report))


def write_models(folder: str, models: Sequence[str], *, torch: bool) -> None:
    """FOLDER/MODEL of each, with prompts.txt, and the files of the random model.

    Raises:
      InputError: torch, which writes them, or which is to be timed, is not there.
    """
    for name in models:
        Path(folder, name).mkdir()
        Path(folder, name, "prompts.txt").write_text("\n".join(PROMPTS))
    if torch or "mid" in models:
        try:
            import torch_peer
        except ImportError as error:
            raise InputError(f"{error}; wants torch, diffusers and peft: requirements-test.txt") from None
        if "mid" in models:
            torch_peer.write_mid(Path(folder, "mid"))


def in_words(row: dict[str, Any]) -> str:
    """The medians, and their ratio."""
    ours = f"{row['ours']['median']:.2f} s"
    return f"{ours}, torch {row['torch']['median']:.2f} s, ratio {row['ratio']:.2f}" if "torch" in row else ours


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("benchmark.json"), help="the .json file to write")
    add("--table", type=Path, help="a Markdown file to put the table into")
    add(
        "--model", action="append", choices=tuple(SIZES), help="(repeat for several; default: the machine's, see above)"
    )
    add("--case", action="append", choices=tuple(CASES), help="(repeat for several; default: all)")
    add("--repeats", type=int, default=5, help="timed repetitions of each side, after a first")
    add("--no_torch", action="store_true", help="time our side alone")
    add("--profile", type=Path, help="a folder for jax's profiles of one more repetition of ours (for XProf)")
    add("--worker", help=argparse.SUPPRESS)
    add("--folder", help=argparse.SUPPRESS)
    command.guarded(main, parser.parse_args())
