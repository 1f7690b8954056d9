"""The commands of a sweep's runs, and what of them is done already."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from diffexp_jax import config_files
from diffexp_jax.formats.files import read_json
from diffexp_jax.models.lora import LORA_FILE
from diffexp_jax.run.metrics import read_metrics
from diffexp_jax.sweeps.plan import FINAL, Run

REPORT = "report.html"  # the last file that a run writes


# ----------------------------------------------------------------------------------------------------- what is done


def is_trained(run: Run) -> bool:
    """Whether the run came to its end."""
    return has_all_rows(run) and all((run.workdir / name).exists() for name in (LORA_FILE, REPORT))


def has_all_rows(run: Run) -> bool:
    rows = read_metrics(run.workdir)
    return bool(rows) and rows[-1]["iteration"] >= run.iterations


def has_final(path: Path, *, samples_per_prompt: int, many: int, explored: bool) -> bool:
    """Whether the evaluation is there as it is wanted: files are written whole or not at all."""
    if not path.exists():
        return False
    found = read_json(path, finite=False)
    as_wanted = found.get("samples_per_prompt") == samples_per_prompt and found.get("many_per_prompt", 0) >= many
    return as_wanted and ("explored" in found or not explored)


# ------------------------------------------------------------------------------------------------------------- commands


def train_command(run: Run, *, cpu_devices: int | None) -> list[str]:
    file, _, rest = run.argument.partition(":")
    changes = run.changes | ({} if cpu_devices is None else {"cpu_devices": cpu_devices})
    config = f"--config={_shown(Path(config_files.module(file.removesuffix('.py')).__file__))}:{rest}"
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    return ["python", "-m", "diffexp_jax.train", config, f"--workdir={run.workdir}", *flags]


def final_command(run: Run, out: Path, *, samples_per_prompt: int, many: int, base: bool, explored: bool) -> list[str]:
    flags = [flag for flag, on in (("--base", base), ("--explored", explored), (f"--many={many}", many)) if on]
    wanted = [f"--workdir={run.workdir}", f"--samples_per_prompt={samples_per_prompt}", f"--out={out}"]
    return ["python", "-m", "diffexp_jax.sweeps.final_evaluation", *wanted, *flags, "--trust_code"]  # of its own


def commands_left(
    runs: Sequence[Run], *, cpu_devices: int | None, samples_per_prompt: int, base_samples: int
) -> list[tuple[Run, list[list[str]]]]:
    """The commands of every run that is not done, in order; the base model's are with the first run that shares it.

    Args:
      samples_per_prompt: images of a final evaluation, or as many as the run's own evaluations have, if more.
      base_samples: the same of the base model, for how often it succeeds.

    A run of which only numbers were kept, see `sweep_runs.keep`, is done.
    """
    left, begun = [], set()
    for run in runs:
        n_images, n_base = max(samples_per_prompt, run.images), max(base_samples, run.images)
        wanted = {"samples_per_prompt": n_images, "explored": run.explored}
        is_kept = samples_per_prompt and has_all_rows(run) and has_final(run.workdir / FINAL, many=0, **wanted)
        commands = [] if is_kept or is_trained(run) else [train_command(run, cpu_devices=cpu_devices)]
        for path, base, many in ((run.workdir / FINAL, False, 0), (run.base, True, n_base)):
            if path and path not in begun and samples_per_prompt and not has_final(path, many=many, **wanted):
                begun.add(path)
                commands.append(final_command(run, path, base=base, many=many, **wanted))
        if commands:
            left.append((run, commands))
    return left


def slurm_script(left: Sequence[tuple[Run, list[list[str]]]], out: Path, *, name: str) -> str:
    """An sbatch script with an array job for each run."""
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={name}",
        f"#SBATCH --array=0-{len(left) - 1}",
        f"#SBATCH --output={out}/slurm-%A_%a.log",
        "#SBATCH --requeue  # a stopped run resumes",
        "# Add what your cluster wants: partition, time, GPUs.",
        "set -e",
        'case "$SLURM_ARRAY_TASK_ID" in',
    ]
    for i, (_, commands) in enumerate(left):
        lines += [f"{i})", *(f"  {shlex.join(words)}" for words in commands), "  ;;"]
    return "\n".join([*lines, "esac"])


def _shown(path: Path) -> Path:
    """Relative to the current folder where it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def environment() -> dict[str, str]:
    """The environment of the programs that a sweep starts, which are of the same source as it is."""
    here, beside = Path(__file__).parents[2], Path(config_files.module("base").__file__).parents[1]
    paths = [*dict.fromkeys([str(here), str(beside)]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
