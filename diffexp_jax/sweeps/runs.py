"""The files of an experiment's runs: which they are, their curves, and their final evaluations."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffexp_jax.algorithms.algorithm import WITH_GRADIENT
from diffexp_jax.cost.evaluations import evaluations_of
from diffexp_jax.errors import InputError
from diffexp_jax.formats.files import read_json
from diffexp_jax.prompts import load_prompts
from diffexp_jax.report import evaluation_of
from diffexp_jax.run.metrics import read_metrics
from diffexp_jax.settings import Settings, read_config
from diffexp_jax.sweeps.plan import usual_name

DIGITS = 6  # significant ones of what is written


class Experiment(NamedTuple):
    """What is compared: folders of runs, one subfolder a seed."""

    name: str
    command: str | None  # scripts/sweep.py's --experiment; None: runs that were given by hand
    shows: str
    model: str | None
    baseline: str
    arms: dict[str, Path]
    base: Path | None  # final.json of the model before fine-tuning
    overrides: dict[str, Any]  # settings of all arms that the command gave
    pairs: dict[str, str] = {}  # {arm: the arm that it is compared with}, of arms with a baseline of their own


class Seed(NamedTuple):
    """A run of an arm."""

    settings: Settings
    rows: list[dict[str, Any]]  # of metrics.jsonl
    final: dict[str, Any]  # final.json; {}: there is none


class Names(NamedTuple):
    """What the curves are of."""

    reward: str
    held_out: str | None  # the first reward that is only reported
    prompts: str  # the set that is trained on, as evaluated
    unseen: tuple[str, ...]


def find(sweeps: Path, experiment: str, model: str | None = None) -> Experiment:
    """An experiment of scripts/sweep.py, by its name or that of its file in SWEEPS/experiments.

    Raises:
      InputError: there is none, or several.
    """
    folder, experiment = sweeps / "experiments", usual_name(experiment)
    found = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"), key=lambda path: path.stem)}
    fits = {
        stem: about
        for stem, about in found.items()
        if experiment in (stem, about.get("experiment")) and model in (None, about.get("model"))
    }
    if experiment in fits:
        fits = {experiment: fits[experiment]}
    if len(fits) != 1:
        known = ", ".join(fits or found) or "none"
        raise InputError(f"--experiment {experiment}: {folder} has {'several' if fits else 'no such one'}: {known}")
    ((stem, about),) = fits.items()
    usual = about["model"] in (None, "emoji") and not about["overrides"]
    arms = {arm: sweeps / path for arm, path in about["arms"].items()}
    name = about["experiment"] if usual else stem
    return Experiment(
        name=name,
        command=about["experiment"],
        shows=about["shows"],
        model=about["model"],
        baseline=about["baseline"],
        arms=arms,
        base=sweeps / about["base"],
        overrides=about["overrides"],
        pairs=about.get("pairs", {}),
    )


def read_runs(folder: Path) -> dict[int, Seed]:
    """{seed: run} of an arm's folder, or of a single run's, finished or not."""
    runs = {}
    for path in [folder, *folder.glob("seed*")]:
        if (path / "config.json").is_file():
            settings, _ = read_config(path / "config.json")
            final = read_json(path / "final.json", finite=False) if (path / "final.json").is_file() else {}
            runs[settings.seed] = Seed(settings, read_metrics(path), final)
    return dict(sorted(runs.items()))


def keep(experiment: Experiment, sweeps: Path, to: Path) -> None:
    """Copies what an experiment's numbers are made of, and what a sweep on another machine resumes from.

    Of each run its settings, metrics and final evaluation; the base model's evaluation; what the arms are.
    """
    about = (sweeps / "experiments").glob("*.json")
    files = [path for path in about if experiment.name in (path.stem, read_json(path)["experiment"])]
    files += [experiment.base] if experiment.base else []
    for folder in experiment.arms.values():
        for seed in read_runs(folder):
            files += [folder / f"seed{seed}" / name for name in ("config.json", "metrics.jsonl", "final.json")]
    for path in filter(Path.is_file, files):
        copied = to / path.relative_to(sweeps)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)


def iterations_done(run: Seed) -> int:
    return run.rows[-1]["iteration"] if run.rows else 0


def is_finished(run: Seed) -> bool:
    return iterations_done(run) >= run.settings.iterations


def names_of(seed: Seed) -> Names:
    """Raises InputError where the run evaluated nothing."""
    settings, reward = seed.settings, seed.settings.trained_reward.name
    evaluated = [name for row in seed.rows for name in row if name.startswith("eval/")]
    sets = list(dict.fromkeys(prompts for prompts, _ in filter(None, map(evaluation_of, evaluated))))
    if not sets:
        raise InputError("a run without evaluations (eval.every=0): nothing to compare")
    trained = load_prompts(settings.prompts).name
    prompts = trained if trained in sets else sets[0]
    others = [spec.name for spec in settings.reported_rewards if spec.name != reward]
    return Names(reward, (others or [None])[0], prompts, tuple(name for name in sets if name != prompts))


def curves(seed: Seed) -> dict[str, dict[str, list[float]]]:
    """The curves of every evaluation, and of the training reward: columns of numbers."""
    spent = ("reward_queries", "unet_evaluations")
    evaluated = [row for row in seed.rows if any(name.startswith("eval/") for name in row)]
    trained = [row for row in seed.rows if "reward/mean" in row]
    columns = {name for row in evaluated for name in row if name.startswith("eval/")}
    return {
        "evaluation": {name: [row.get(name, 0) for row in evaluated] for name in ("iteration", *spent)}
        | {name: rounded([row[name] for row in evaluated]) for name in sorted(columns)},
        "training": {name: rounded([row[name] for row in trained]) for name in ("iteration", *spent, "reward/mean")},
    }


def seconds(run: Seed) -> float | None:
    """Of a run's iterations, all as long as the median one: the first compile."""
    times = [row["time/sample"] + row["time/train"] for row in run.rows if "time/train" in row]
    return float(np.median(times)) * run.settings.iterations if times else None


def evaluations(run: Seed) -> dict[str, float]:
    """The network's evaluations for each reward query: "all", and those that "gradient" is taken through.

    Of the run's mean iteration: exploration leaves out some. A guided evaluation is of two halves.
    """
    last = run.rows[-1]
    chain = last["unet_evaluations"] / last["reward_queries"] / run.settings.method.chains
    passes = evaluations_of(run.settings, chain)
    through = sum(n for words, n in passes.items() if words.endswith(WITH_GRADIENT))
    return {"all": sum(passes.values()), "gradient": through}


def final_means(final: Mapping[str, Any], way: str = "plain") -> dict[str, dict[str, float]]:
    """{prompt set: {what: mean}} of a final.json."""
    return {
        prompts: {what: x["mean"] for what, x in content["means"].items()}
        for prompts, content in final.get(way, {}).items()
    }


def rounded(x: Any) -> Any:
    """To DIGITS significant digits, also in lists and dicts."""
    if isinstance(x, dict):
        return {key: rounded(y) for key, y in x.items()}
    return [rounded(y) for y in x] if isinstance(x, list) else float(f"{x:.{DIGITS}g}")
