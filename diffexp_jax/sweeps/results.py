"""Compares the runs of an experiment's arms over seeds: all that docs/evidence/results/NAME.json holds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from diffexp_jax.algorithms import METHODS
from diffexp_jax.errors import InputError
from diffexp_jax.formats.files import read_json
from diffexp_jax.settings import Settings, flat
from diffexp_jax.sweeps import comparison
from diffexp_jax.sweeps.cells import OF_TRAINING, telling_reward
from diffexp_jax.sweeps.comparison import Estimate
from diffexp_jax.sweeps.runs import (
    Experiment,
    Names,
    Seed,
    curves,
    evaluations,
    final_means,
    is_finished,
    iterations_done,
    names_of,
    read_runs,
    rounded,
    seconds,
)

# What tells arms apart is written for each; these for all of them
SHOWN = ("algorithm", "reward", "prompts", "iterations", "batch.samples", "sampling.steps", "sampling.guidance")
SHOWN += ("sampling.eta", "optim.lr", "optim.weight_decay", "lora.rank", "model.path")
_UNTOLD = ("seed", "cpu_devices", "compilation_cache", "log", "checkpoint", "eval.every", "exploration.iterations")


def analyse(experiment: Experiment) -> dict[str, Any]:
    """All of docs/evidence/results/NAME.json.

    Raises:
      InputError: the baseline has no finished run.
    """
    every = {arm: read_runs(folder) for arm, folder in experiment.arms.items()}
    arms = {arm: {seed: run for seed, run in runs.items() if is_finished(run)} for arm, runs in every.items()}
    arms = {arm: runs for arm, runs in arms.items() if runs}
    if experiment.baseline not in arms:
        where = experiment.arms[experiment.baseline]
        raise InputError(f"{experiment.name}: the baseline {experiment.baseline!r} has no finished run in {where}")
    baseline = arms[experiment.baseline]
    first = next(iter(baseline.values()))
    names = names_of(first)
    base = read_json(experiment.base, finite=False) if experiment.base and experiment.base.is_file() else {}
    finals = [seed.final for runs in arms.values() for seed in runs.values()]
    compared = {arm: arms.get(experiment.pairs.get(arm, experiment.baseline), {}) for arm in arms}
    results = {
        "name": experiment.name,
        "experiment": experiment.command,
        "shows": experiment.shows,
        "model": experiment.model,
        "overrides": experiment.overrides,
        "baseline": experiment.baseline,
        **names._asdict(),
        "settings": {key: value for key, value in flat(first.settings).items() if key in SHOWN},
        "machines": unique(final["machine"] for final in finals if "machine" in final),
        "samples_per_prompt": unique(final["samples_per_prompt"] for final in finals if final),
        "base": rounded(final_means(base)),
        "unfinished": {arm: unfinished(runs) for arm, runs in every.items() if unfinished(runs)},
        "arms": {
            arm: {
                "differs": differing(one_of(compared[arm] or baseline), one_of(runs)) if runs is not baseline else {},
                "seeds": {seed: stored(run) for seed, run in runs.items()},
                "summary": summary(names, runs, compared[arm], base),
            }
            for arm, runs in arms.items()
        },
    }
    return results | (paired(experiment, results, names, arms, base) if experiment.pairs else {})


def one_of(runs: Mapping[int, Seed]) -> Settings:
    """The settings of an arm's first run."""
    return next(iter(runs.values())).settings


def paired(
    experiment: Experiment, results: Mapping[str, Any], names: Names, arms: Mapping[str, Mapping], base: Mapping
) -> dict[str, Any]:
    """What is told besides where arms come in pairs: what the runs cost, and the gains of all pairs together."""
    level = half_of_best(results)
    costs = {arm: cost_of(runs, level, results) for arm, runs in arms.items()}
    couples = [(arms[arm], arms[without]) for arm, without in experiment.pairs.items() if {arm, without} <= arms.keys()]
    both = [(ours[seed], theirs[seed]) for ours, theirs in couples for seed in ours if seed in theirs]
    training = {arm: found for arm, runs in arms.items() if (found := in_training(runs.values()))}
    pooled = by_base_share(names, both, base)
    return {"pairs": experiment.pairs, "costs": costs, "training": training, "pooled": pooled}


def in_training(runs: Iterable[Seed]) -> dict[str, Estimate]:
    """{metric: its mean over the iterations that explore, or would}, of those that all runs have."""
    of_runs = [run.rows[1 : 1 + run.settings.exploring_iterations] for run in runs]
    means = {name: [np.mean([row.get(name, np.nan) for row in rows]) for rows in of_runs] for name in OF_TRAINING}
    return {name: rounded_estimate(comparison.mean_over_seeds(x)) for name, x in means.items() if np.isfinite(x).all()}


def half_of_best(results: Mapping[str, Any]) -> float | None:
    """The level at half of what the best arm gains in what tells most of the trained prompts."""
    prompts, what = results["prompts"], telling_reward(results)
    finals = [arm["summary"]["final"].get(prompts, {}).get(what) for arm in results["arms"].values()]
    first = results["base"].get(prompts, {}).get(what)
    best = max((estimate.mean for estimate in finals if estimate), default=None)
    return None if first is None or best is None else comparison.gain_level([first, best], 0.5)


def cost_of(runs: Mapping[int, Seed], level: float | None, results: Mapping[str, Any]) -> dict[str, Any]:
    """Reward queries until a run's evaluations are at the level (all of them where they never are), time and work."""
    curve = f"eval/{results['prompts']}/{telling_reward(results)}"
    evaluated = [curves(run)["evaluation"] for run in runs.values()]
    found = [] if level is None else [comparison.reach(x["reward_queries"], x[curve], level) for x in evaluated]
    spent = [x for x in map(seconds, runs.values()) if x is not None]
    return {
        "queries": rounded_estimate(comparison.mean_over_seeds([x for x, _ in found])) if found else None,
        "reached": sum(reached for _, reached in found),
        "seconds": rounded_estimate(comparison.mean_over_seeds(spent)) if spent else None,
        "evaluations": rounded(evaluations(next(iter(runs.values())))),
        "seeds": len(runs),
    }


def unfinished(runs: Mapping[int, Seed]) -> dict[int, list[int]]:
    """{seed: iterations done and planned} of runs that are left out: they still run, were stopped, or failed."""
    return {seed: [iterations_done(run), run.settings.iterations] for seed, run in runs.items() if not is_finished(run)}


def stored(run: Seed) -> dict[str, Any]:
    """What is kept of one run."""
    final = {way: rounded(final_means(run.final, way)) for way in ("plain", "explored") if way in run.final}
    return {"curves": curves(run), "final": final}


def summary(names: Names, runs: Mapping[int, Seed], baseline: Mapping[int, Seed], base: Mapping) -> dict[str, Any]:
    """An arm over its seeds, and against the baseline over the seeds that both have."""
    both = [(runs[seed], baseline[seed]) for seed in runs if seed in baseline]
    ours, theirs = (
        ([final_means(run.final) for run in column] for column in zip(*both, strict=True)) if both else ([], [])
    )
    explored = [final_means(run.final, "explored") for run in runs.values() if "explored" in run.final]
    plain = [final_means(run.final) for run in runs.values() if "explored" in run.final]
    evaluated = f"eval/{names.prompts}/{names.reward}"
    return {
        "seeds": list(runs),
        "paired": len(both),
        "final": estimates([final_means(run.final) for run in runs.values()]),
        "difference": estimates(differences(ours, theirs)),
        "explored_difference": estimates(differences(explored, plain)),
        "ratio": ratios([[curves(run)["evaluation"] for run in pair] for pair in both], evaluated),
        "training_ratio": ratios([[training_blocks(run) for run in pair] for pair in both], "reward/mean"),
        "by_base_share": by_base_share(names, both, base) if runs is not baseline else {},
    }


Means = Mapping[str, Mapping[str, float]]


def estimates(finals: Sequence[Means]) -> dict[str, dict[str, Estimate]]:
    """{prompt set: {what: its mean over seeds}} of what all of them have."""
    if not finals or not all(finals):
        return {}
    return {
        prompts: {
            what: rounded_estimate(comparison.mean_over_seeds([final[prompts][what] for final in finals]))
            for what in means
        }
        for prompts, means in finals[0].items()
        if all(prompts in final for final in finals)
    }


def differences(ours: Sequence[Means], theirs: Sequence[Means]) -> list[dict[str, dict[str, float]]]:
    """Pair by pair, ours minus theirs."""
    return [
        {prompts: {what: x - b[prompts][what] for what, x in a[prompts].items()} for prompts in a if prompts in b}
        for a, b in zip(ours, theirs, strict=True)
    ]


def training_blocks(run: Seed) -> dict[str, list[float]]:
    """The curves of training, as means of the iterations from one evaluation to the next: one batch's is noise."""
    n = min(run.settings.eval.every, run.settings.iterations)
    return {name: comparison.block_means(column, n) for name, column in curves(run)["training"].items()}


def ratios(pairs: Sequence[Sequence[Mapping[str, list]]], curve: str) -> dict[str, dict[str, dict[str, Any]]]:
    """{level: {unit of cost: `comparison.Ratio` to the baseline, as a dict}}.

    Args:
      pairs: the arm's and the baseline's curves of each seed.
      curve: the name of the one that the levels are of.
    """
    if not pairs:
        return {}
    levels = {"final": comparison.final_level, "gain": comparison.gain_level}
    found = {}
    for level, level_of in levels.items():
        found[level] = {}
        for cost in ("reward_queries", "unet_evaluations"):
            ours, theirs = ([(run[cost], run[curve]) for run in column] for column in zip(*pairs, strict=True))
            ratio = comparison.ratio_to_baseline(list(ours), list(theirs), level_of)
            found[level][cost] = ratio._replace(ratio=ratio.ratio and rounded_estimate(ratio.ratio))._asdict()
    return found


def by_base_share(names: Names, both: Sequence[tuple[Seed, Seed]], base: Mapping[str, Any]) -> dict[str, Any]:
    """{prompt set: bins}, of the first reward that is a share of successes; see `comparison.gain_by_base_share`.

    Nothing of a set whose prompts are all in one bin: the final models' table has that.
    """
    found, many = {}, base.get("many", {})
    for prompts, content in many.items():
        what = next(
            (name for name in (names.held_out, names.reward) if is_share(content["per_prompt"].get(name))), None
        )
        sides = [[run.final.get("plain", {}).get(prompts) for run in side] for side in zip(*both, strict=True)]
        if what is None or not sides or not all(all(side) for side in sides):
            continue
        if any(run["prompts"] != content["prompts"] for side in sides for run in side):
            raise InputError(f"{prompts}: the base model was evaluated on other prompts than a run")
        ours, theirs = (np.array([run["per_prompt"][what] for run in side]) for side in sides)
        bins = comparison.gain_by_base_share(np.array(content["per_prompt"][what]), theirs, ours)
        if len(bins) < 2:
            continue
        shown = [
            {key: rounded_estimate(x) if isinstance(x, Estimate) else x for key, x in one._asdict().items()}
            for one in bins
        ]
        found[prompts] = {"what": what, "samples_per_prompt": base["many_per_prompt"], "bins": shown}
    return found


def is_share(values: Sequence[float] | None) -> bool:
    """Whether these can be shares of successes."""
    return values is not None and all(0.0 <= x <= 1.0 for x in values)


def rounded_estimate(x: Estimate) -> Estimate:
    return Estimate(*(None if y is None else rounded(y) for y in x))


# ------------------------------------------------------------------------------------------------------------- settings


def differing(first: Settings, settings: Settings) -> dict[str, Any]:
    """What an arm sets otherwise than the baseline; of exploration, where only one has it, all of its numbers.

    Nothing of methods that are not the arm's own: it does not read their settings.
    """
    before, now = flat(first), flat(settings)
    untold = {*_UNTOLD, *METHODS} - {settings.algorithm}
    told = {key: x for key, x in now.items() if not any(key == k or key.startswith(f"{k}.") for k in untold)}
    switched = settings.exploration.enabled and not first.exploration.enabled
    return {
        key: value
        for key, value in told.items()
        if value != before.get(key) or (switched and key.startswith("exploration."))
    }


def unique(values: Iterable[Any]) -> list[Any]:
    """Each once, in order."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
