"""The settings that sampling reads, by short names: flags of scripts/sample.py, keywords of `Evaluator`."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffexp_jax.errors import InputError
from diffexp_jax.formats.json_text import parse_json
from diffexp_jax.settings.config import default_config, parsed, read_config

# What a name sets of a run's settings
KEYS = {
    "model": "model.path",
    "revision": "model.revision",
    "variant": "model.variant",
    "tokenizer": "model.tokenizer",
    "dtype": "model.dtype",
    "image_size": "model.image_size",
    "steps": "sampling.steps",
    "guidance": "sampling.guidance",
    "eta": "sampling.eta",
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


def sampling_config(run: Path | None, said: Mapping[str, Any], *, written: str = "{}=") -> ConfigDict:
    """A run's settings, or where there is none those of diffusers, with what is said instead: checked one by one.

    Args:
      run: its folder.
      said: by the names of `KEYS`; "scheduler" is for texts KEY=VALUE. None says nothing.
      written: what the user sets a name by: "--{} " of a flag.

    Raises:
      InputError: the run has no settings that can be read, or a value is not accepted.
    """
    if run is None:
        config = default_config()
        config.update_from_flattened_dict(WITHOUT_RUN)
    else:
        config, _ = read_config(run / "config.json")
    given = {name: value for name, value in said.items() if name in KEYS and value is not None}
    for name, value in given.items():
        try:
            config.update_from_flattened_dict({KEYS[name]: tuple(value) if isinstance(value, list) else value})
        except TypeError:
            raise InputError(f"{written.format(name)}{value!r}: the value is of another type; {_SAYS_WHICH}") from None
    for text in said.get("scheduler") or ():
        _set_scheduler(config, text, written.format("scheduler"))
    parsed(config, {KEYS[name]: written.format(name) for name in given})
    return config


def _set_scheduler(config: ConfigDict, text: str, name: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or key not in config.model.scheduler:
        raise InputError(f"{name}{text}: wants KEY=VALUE; accepted: {', '.join(config.model.scheduler)}")
    with contextlib.suppress(ValueError):
        value = parse_json(value.lower())  # a number, true, false; else a word
    try:
        config.model.scheduler[key] = value
    except TypeError:
        raise InputError(f"{name}{text}: the value is of another type; {_SAYS_WHICH}") from None
