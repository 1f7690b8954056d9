"""Settings and what they are written as: a ConfigDict of ml_collections (configs/, flags), a run's config.json."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from diffexp_jax.algorithms import Method
from diffexp_jax.errors import InputError
from diffexp_jax.formats.files import read_json
from diffexp_jax.limits import one_of, settings_of
from diffexp_jax.settings.settings import Settings, by_key, sections_of


def default_config() -> ConfigDict:
    """Every setting with its default, as configs/base.py has it, and those of methods that it does not know."""
    return _section_config(Settings())


def _section_config(section: Any) -> ConfigDict:
    config = ConfigDict()
    for name, known in settings_of(section):
        config[name] = placeholder(type_of(known.type)) if known.default is None else known.default
    for name, part in sections_of(section):
        config[name] = _section_config(part)
    return config


def type_of(annotation: Any) -> type:
    """The type of a setting that may be None: str of `str | None`."""
    (kind,) = (kind for kind in typing.get_args(annotation) if kind is not type(None))
    return kind


def parsed(config: ConfigDict | Mapping[str, Any], names: Mapping[str, str] = {}) -> Settings:
    """The settings that a config says, each of which may be what it is; whether they go together is for `checked`.

    Args:
      config: complete, but for methods' sections: what these lack has its default.
      names: what the user sets a key by, where that is not KEY=.

    Raises:
      InputError: a value that is not accepted, a key that is missing, or one that no setting has.
    """
    content = config.to_dict() if isinstance(config, ConfigDict) else config
    return _filled(Settings(), content, "", names)


def _filled(section: Any, content: Mapping[str, Any], prefix: str, names: Mapping[str, str]) -> Any:
    """A section with what a config says of it, each value checked; `prefix` is of its keys."""
    own, parts = dict(settings_of(section)), dict(sections_of(section))
    whose = "config" if not prefix else prefix.removesuffix(".")
    for name in content:
        one_of(f"{whose}: the key", name, [*own, *parts])
    for name in (*own, *parts):
        is_of_a_method = isinstance(section, Method) or isinstance(parts.get(name), Method)
        if name not in content and not is_of_a_method:
            raise InputError(f"config: has no key {prefix}{name}; configs/base.py has them all")
    values = {name: _frozen(content[name]) for name in own if name in content}
    for name, value in values.items():
        own[name].check(prefix + name, value, names.get(prefix + name))
    filled = {name: _filled(part, content.get(name, {}), f"{prefix}{name}.", names) for name, part in parts.items()}
    methods = {name: part for name, part in filled.items() if isinstance(part, Method)}
    sections = {name: part for name, part in filled.items() if name not in methods}
    return dataclasses.replace(section, **values, **sections, **({"methods": methods} if methods else {}))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def as_dict(section: Any) -> dict[str, Any]:
    """What config.json holds of `Settings`, or of a section's value."""
    own = {name: getattr(section, name) for name, _ in settings_of(section)}
    return own | {name: as_dict(part) for name, part in sections_of(section)}


def flat(settings: Settings) -> dict[str, Any]:
    """{dotted key: value}."""
    return {key: value for key, _, value in by_key(settings)}


def read_config(path: Path) -> tuple[ConfigDict, list[str]]:
    """The settings of a run's config.json, and the keys that it lacks: newer ones, which get their defaults.

    Raises:
      InputError: the file is missing, is no json object, or has keys or types of values that no run has.
    """
    stored = flatten_dict(read_json(path), sep=".")
    config = default_config()
    known = flatten_dict(config.to_dict(), sep=".")
    if unknown := sorted(stored.keys() - known.keys()):
        raise InputError(f"{path}: no run has the keys {', '.join(unknown[:6])}; is it of another version?")
    for key, value in stored.items():
        try:
            if value is None and known[key] is not None:
                raise TypeError
            if isinstance(value, bool) != isinstance(known[key], bool) and known[key] is not None:
                raise TypeError
            config.update_from_flattened_dict({key: _frozen(value)})
        except (TypeError, AttributeError, KeyError, ValueError):
            wanted = "another type" if known[key] is None else f"a {type(known[key]).__name__}, as {known[key]!r}"
            raise InputError(f"{path}: {key}={json.dumps(value)}: wants {wanted}") from None
    return config, sorted(known.keys() - stored.keys())
