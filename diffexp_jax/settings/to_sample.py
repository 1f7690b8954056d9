"""The settings that sampling reads, by short names: flags of scripts/sample.py, keywords of `Evaluator`."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffexp_jax.errors import InputError
from diffexp_jax.formats.json_text import parse_json
from diffexp_jax.limits import settings_of
from diffexp_jax.settings.config import changed, read_config
from diffexp_jax.settings.settings import Settings, by_key
from diffexp_jax.settings.training import Scheduler

# What a name sets of a run's settings
KEYS = {
    "model": "model.path",
    "revision": "model.revision",
    "variant": "model.variant",
    "tokenizer": "model.tokenizer",
    "dtype": "model.dtype",
    "image_size": "model.image_size",
    "t5_tokens": "model.t5_tokens",
    "steps": "eval.steps",
    "guidance": "eval.guidance",
    "eta": "eval.eta",
    "negative_prompt": "sampling.negative_prompt",
    "w_low": "exploration.w_low",
    "t_thresh": "exploration.t_thresh",
    "weight_range": "exploration.weight_range",
    "unit": "exploration.unit",
    "scope": "exploration.scope",
}
SAMPLED = {*KEYS, "scheduler"}
# Where there is no run: the defaults of diffusers' pipelines
WITHOUT_RUN = {"model.dtype": "float32", "sampling.steps": 50, "sampling.guidance": 7.5, "sampling.eta": 0.0}
_SAYS_WHICH = "configs/base.py says which"


def sampling_settings(run: Path | None, said: Mapping[str, Any], *, written: str = "{}=") -> Settings:
    """A run's settings, or where there is none those of diffusers, with what is said instead: checked one by one.

    Args:
      run: its folder.
      said: by the names of `KEYS`; "scheduler" is for texts KEY=VALUE. None says nothing.
      written: what the user sets a name by: "--{} " of a flag.

    Raises:
      InputError: the run has no settings that can be read, or a value is not accepted.
    """
    settings, changes = (Settings(), WITHOUT_RUN) if run is None else (read_config(run / "config.json")[0], {})
    known = {key: setting for key, setting, _ in by_key(settings)}
    given = {name: value for name, value in said.items() if name in KEYS and value is not None}
    for name, value in given.items():
        if not known[KEYS[name]].fits(value):
            raise InputError(f"{written.format(name)}{value!r}: the value is of another type; {_SAYS_WHICH}")
    changes = changes | {KEYS[name]: value for name, value in given.items()}
    for text in said.get("scheduler") or ():
        changes |= _of_scheduler(text, written.format("scheduler"))
    return changed(settings, changes, {KEYS[name]: written.format(name) for name in given})


def _of_scheduler(text: str, name: str) -> dict[str, Any]:
    """{dotted key: value} of KEY=VALUE."""
    known, (key, equals, value) = dict(settings_of(Scheduler)), text.partition("=")
    if not equals or key not in known:
        raise InputError(f"{name}{text}: wants KEY=VALUE; accepted: {', '.join(sorted(known))}")
    with contextlib.suppress(ValueError):
        value = parse_json(value.lower())  # a number, true, false; else a word
    if known[key].accepted is None and not known[key].fits(value):  # what is accepted is said later
        raise InputError(f"{name}{text}: the value is of another type; {_SAYS_WHICH}")
    return {f"model.scheduler.{key}": value}
