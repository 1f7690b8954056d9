"""What a sweep consists of: experiments of configs/sweeps.py become runs with folders, commands, and what is done.

Two arms that come to the same config are one run: its folder is named after what it is, and a digest of its settings.
"""

import ast
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from diffexp_jax import command, config_files
from diffexp_jax.errors import InputError
from diffexp_jax.limits import one_of
from diffexp_jax.prompts import short_name
from diffexp_jax.settings import Settings, checked, flat

FINAL = "final.json"  # a run's final evaluation, in its folder

# Settings that do not change what a run learns or reports: where and how its work is done
_ELSEWHERE = ("seed", "cpu_devices", "compilation_cache", "host_reward", "log", "checkpoint", "deterministic")
_ELSEWHERE += ("batch.samples_per_forward", "model.remat", "model.scan_layers", "model.vae_slice")


class Run(NamedTuple):
    """One arm with one seed."""

    workdir: Path
    label: str  # for people: experiment, arm and seed of the first experiment that has it
    argument: str  # what follows --config
    changes: dict[str, Any]  # of that config
    iterations: int
    images: int  # of each prompt in the run's own evaluations
    base: Path | None  # of a baseline: where the evaluation of the model before fine-tuning is
    explored: bool  # whether the final evaluation is with DiffExp's guidance schedule too


# ---------------------------------------------------------------------------------------------------------- experiments


def usual_name(experiment: str) -> str:
    """The usual name of an experiment that has several."""
    return config_files.module("paper").ALIASES.get(experiment, experiment)


def parse_override(text: str) -> tuple[str, Any]:
    """ "--config.KEY=VALUE" -> (KEY, value).

    Raises:
      InputError: it is not written so.
    """
    key, equals, value = text.removeprefix("--config.").partition("=")
    if not text.startswith("--config.") or not equals:
        raise InputError(f"unexpected argument {text!r}; settings of all arms are given as --config.KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, command.split_list(value) if key in command.LISTS else value


def resolve(argument: str, changes: Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[Settings, dict]:
    """The settings of `changed_config`, checked: that asks how many devices there are; and what an arm changes."""
    config, changed = changed_config(argument, changes, overrides)
    return checked(config), changed


def changed_config(argument: str, changes: Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[ConfigDict, dict]:
    """An arm's config, and all that it changes of what `argument` names: values in place of functions.

    Args:
      argument: FILE.py:ARGUMENT of configs/.
      changes: by dotted key, values or functions of the config that give them.
      overrides: of the config that the arm starts from; they win over ALL_ARMS, not over the arm's own changes.

    Raises:
      InputError: a setting that does not exist.
    """
    file, _, rest = argument.partition(":")
    with config_files.mistakes_in(argument):
        config = config_files.module(file.removesuffix(".py")).get_config(rest).lock()
        config.update_from_flattened_dict(overrides)
        everywhere = {
            key: value for key, value in config_files.module("sweeps").ALL_ARMS.items() if key not in overrides
        }
        changed = {key: x(config) if isinstance(x, Callable) else x for key, x in (everywhere | dict(changes)).items()}
        config.update_from_flattened_dict(changed)
    return config, dict(overrides) | changed


def digest(content: Any) -> str:
    """Ten hexadecimal digits of the content as json."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def settings_that_matter(settings: Settings) -> dict[str, Any]:
    """{dotted key: value} of what differs from configs/base.py, without what only says where and how it is computed.

    A key that a later version adds with a default does not turn a run into another one.
    """
    usual, ours = flat(Settings()), flat(settings)
    return {
        key: value
        for key, value in sorted(ours.items())
        if json.dumps(value) != json.dumps(usual[key])
        and not any(key == name or key.startswith(f"{name}.") for name in _ELSEWHERE)
    }


def run_name(settings: Settings) -> str:
    """The name of the folder with an arm's seeds: what it is in words, and the digest of its settings."""
    model = short_name(Path(settings.model.path).name)
    words = (
        settings.algorithm,
        settings.trained_reward.name,
        model,
        "diffexp" if settings.exploration.enabled else "plain",
    )
    return "-".join((*words, digest(settings_that_matter(settings))))


def base_file(settings: Settings, *, explored: bool) -> str:
    """The file of the base model's evaluation, in a folder named after what decides how it is sampled and scored."""
    decisive = ("model", "sampling", "eval", "reward", *(("exploration",) if explored else ()))
    matter = settings_that_matter(settings) | {"eval.every": None, "exploration.enabled": explored}
    chosen = {key: x for key, x in matter.items() if key.split(".")[0] in decisive}
    return f"base/{short_name(Path(settings.model.path).name)}-{digest(chosen)}/{FINAL}"


def plan(
    names: Sequence[str],
    *,
    model: str | None,
    seeds: Iterable[int],
    out: Path,
    overrides: Mapping[str, Any],
    only: Sequence[str] = (),
) -> tuple[list[Run], dict[str, dict]]:
    """All runs, seed by seed and the arms next to each other, each once; and of each experiment what is where.

    Args:
      only: arms to run; none: all of them.

    Raises:
      InputError: an unknown experiment or arm, or an arm whose settings cannot work.
    """
    sweeps, names = config_files.module("sweeps").SWEEPS, list(dict.fromkeys(map(usual_name, names)))
    for name in names:
        one_of("--experiment", name, sweeps)
    for arm in only:
        one_of("--arm", arm, list(dict.fromkeys(arm for name in names for arm in sweeps[name]["arms"])))
    folders, experiments = {}, {}
    for name in names:
        sweep, arms, base = sweeps[name], {}, None
        for arm, (argument, changes) in sweep["arms"].items():
            argument += f",model={model}" if model else ""
            settings, changed = resolve(argument, changes, overrides)
            arms[arm] = f"runs/{run_name(settings)}"
            is_baseline = arm == sweep["baseline"]
            if is_baseline:
                base = base_file(settings, explored=sweep["explored_evaluation"])
            if only and arm not in only:
                continue
            run = folders.setdefault(
                arms[arm],
                Run(
                    out / arms[arm],
                    f"{name} {arm}",
                    argument,
                    changed,
                    settings.iterations,
                    settings.eval.samples_per_prompt,
                    base=None,
                    explored=False,
                ),
            )
            if is_baseline and (run.base is None or sweep["explored_evaluation"]):
                folders[arms[arm]] = run._replace(base=out / base, explored=sweep["explored_evaluation"])
        about = {"experiment": name, "model": model, "overrides": dict(overrides), "shows": sweep["shows"]}
        about |= {"baseline": sweep["baseline"], "arms": arms, "base": base, "pairs": sweep["pairs"]}
        experiments[file_name(name, model, overrides)] = about
    return [of_seed(run, seed) for seed in seeds for run in folders.values()], experiments


def of_seed(run: Run, seed: int) -> Run:
    """The run of an arm with this seed."""
    changes = run.changes | {"seed": seed}
    return run._replace(workdir=run.workdir / f"seed{seed}", label=f"{run.label} seed {seed}", changes=changes)


def file_name(experiment: str, model: str | None, overrides: Mapping[str, Any]) -> str:
    """The name of the file that says which runs are an experiment's arms."""
    return "-".join((experiment, *([model] if model else []), *([digest(dict(overrides))[:6]] if overrides else [])))
