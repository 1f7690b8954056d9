"""Settings and what they are written as: a ConfigDict of ml_collections (configs/, flags), a run's config.json."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from diffexp_jax.algorithms import METHODS, Method
from diffexp_jax.errors import InputError
from diffexp_jax.formats.files import read_json
from diffexp_jax.limits import one_of, settings_of
from diffexp_jax.settings.settings import Settings, by_key, sections_of


def parsed(config: ConfigDict | Settings, names: Mapping[str, str] = {}) -> Settings:
    """The settings that a config says, each of which may be what it is; whether they go together is for `checked`.

    Args:
      config: complete, but for methods' sections: what these lack has its default. `Settings` are checked in the same
        way.
      names: what the user sets a key by, where that is not KEY=.

    Raises:
      InputError: a value that is not accepted, a key that is missing, or one that no setting has.
    """
    values = flat(config) if isinstance(config, Settings) else flatten_dict(config.to_dict(), sep=".")
    return _checked(values, names)


def changed(settings: Settings, changes: Mapping[str, Any], names: Mapping[str, str] = {}) -> Settings:
    """Settings of which those with these dotted keys are others; all are checked, see `parsed`."""
    return _checked(flat(settings) | changes, names)


def _checked(values: Mapping[str, Any], names: Mapping[str, str]) -> Settings:
    """The settings of {dotted key: value}, see `parsed`."""
    values = {key: _as_field(value) for key, value in values.items()}
    known = {key: setting for key, setting, _ in by_key(Settings())}
    for key in values:
        section, _, name = key.rpartition(".")
        if key not in known and section in METHODS:
            one_of(f"{section}: the key", name, [name for name, _ in settings_of(METHODS[section])])
        elif key not in known:
            raise InputError(f"config: no setting has the key {key}; configs/base.py has them all")
    for key, setting in known.items():
        if key in values:
            setting.check(key, values[key], names.get(key))
        elif key.partition(".")[0] not in METHODS:
            raise InputError(f"config: has no key {key}; configs/base.py has them all")
    return _filled(Settings(), values)


def _filled(section: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A section in which settings with these dotted keys have these values."""
    own = {name: _as_field(values[prefix + name]) for name, _ in settings_of(section) if prefix + name in values}
    parts = {name: _filled(part, values, f"{prefix}{name}.") for name, part in sections_of(section)}
    methods = {name: part for name, part in parts.items() if isinstance(part, Method)}
    sections = {name: part for name, part in parts.items() if name not in methods}
    return dataclasses.replace(section, **own, **sections, **({"methods": methods} if methods else {}))


def _as_field(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def as_dict(section: Any) -> dict[str, Any]:
    """What config.json holds of `Settings`, or of a section's value."""
    own = {name: getattr(section, name) for name, _ in settings_of(section)}
    return own | {name: as_dict(part) for name, part in sections_of(section)}


def flat(settings: Settings) -> dict[str, Any]:
    """{dotted key: value}."""
    return {key: value for key, _, value in by_key(settings)}


def read_config(path: Path) -> tuple[Settings, list[str]]:
    """The settings of a run's config.json, and the keys that it lacks: newer ones, which get their defaults.

    Values have their types. Whether they are accepted is not checked: what only reports a run needs none of it.

    Raises:
      InputError: the file is missing, is no json object, or has keys or types of values that no run has.
    """
    stored = flatten_dict(read_json(path), sep=".")
    known = {key: setting for key, setting, _ in by_key(Settings())}
    if unknown := sorted(stored.keys() - known.keys()):
        raise InputError(f"{path}: no run has the keys {', '.join(unknown[:6])}; is it of another version?")
    for key, value in stored.items():
        if not known[key].fits(value):
            raise InputError(f"{path}: {key}={json.dumps(value)}: wants {known[key].wanted}")
    return _filled(Settings(), stored), sorted(known.keys() - stored.keys())
