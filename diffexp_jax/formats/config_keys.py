"""What published config files may say: a table for each, in which a key is read, or must have one value, or cannot
matter.

The tables are beside their readers; tests/formats/test_config_keys.py holds them against the signatures of diffusers
and transformers.
"""

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from absl import logging

from diffexp_jax.errors import InputError
from diffexp_jax.limits import Number

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_UNSET = (None, False, "", [], {})  # values of an unknown key that say nothing


class Many(NamedTuple):
    """Accepts a list of one or more values, each by the rule `of`; `or_one`: also one value, for all."""

    of: "Rule"
    or_one: bool = False


Rule = Number | Many | type[bool] | tuple[str, ...]  # a tuple: one of these words


class Keys(NamedTuple):
    """The keys of one kind of config file."""

    read: Mapping[str, Rule]  # honoured; a null is as good as an absent key
    only: Mapping[str, tuple]  # must have one of these values, or be a list of them, or be absent
    ignored: frozenset[str] = frozenset()  # cannot change what is computed here
    class_names: tuple[str, ...] = ()  # accepted for `_class_name`; (): any


def checked(config: Any, keys: Keys, where: str) -> dict[str, Any]:
    """The entries that are read, without nulls; lists are tuples. Warns of keys that no table knows.

    Args:
      config: of the json file.
      where: the file, for the errors.

    Raises:
      InputError: it is no object, or a key has a value that is not accepted.
    """
    if not isinstance(config, Mapping):
        raise InputError(f"{where}: wants a json object, found {shown(config)}")
    if keys.class_names and config.get("_class_name", keys.class_names[0]) not in keys.class_names:
        name = shown(config["_class_name"])
        raise InputError(f"{where}: _class_name={name} is not supported; accepted: {', '.join(keys.class_names)}")
    for key, accepted in keys.only.items():
        value = config.get(key, accepted[0])
        if any(x not in accepted for x in (value if isinstance(value, list | tuple) and value else [value])):
            words = ", ".join(map(shown, accepted))
            raise InputError(f"{where}: {key}={shown(value)} is not supported; accepted: {words}")
    found = {key: config[key] for key in keys.read if config.get(key) is not None}
    for key, value in found.items():
        if not accepts(keys.read[key], value):
            raise InputError(f"{where}: {key}={shown(value)}; accepted: {in_words(keys.read[key])}")
    known = {*keys.read, *keys.only, *keys.ignored}
    unknown = [key for key in config if key not in known and not key.startswith("_") and config[key] not in _UNSET]
    if unknown:
        logging.warning("%s: not known here, and ignored: %s", where, ", ".join(map(shown, sorted(unknown))))
    return {key: as_tuple(value) for key, value in found.items()}


def accepts(rule: Rule, value: Any) -> bool:
    """Whether a value follows a rule."""
    if isinstance(rule, Many):
        if isinstance(value, list | tuple):
            return bool(value) and all(accepts(rule.of, x) for x in value)
        return rule.or_one and accepts(rule.of, value)
    if isinstance(rule, Number):
        return rule.accepts(value)
    return isinstance(value, bool) if rule is bool else isinstance(value, str) and value in rule


def in_words(rule: Rule) -> str:
    """What a rule accepts, for an error."""
    if isinstance(rule, Many):
        one = in_words(rule.of)
        return f"a list of {one}" + (f", or one: {one}" if rule.or_one and not isinstance(rule.of, Many) else "")
    if isinstance(rule, Number):
        return f"whole numbers {rule}" if rule.whole else f"numbers {rule}"
    return "true, false" if rule is bool else ", ".join(rule)


def uniform(value: Any, key: str, where: str) -> Any:
    """The one value of a list of equal ones, or the value itself.

    Raises:
      InputError: a list of different values.
    """
    if not isinstance(value, tuple):
        return value
    if any(x != value[0] for x in value):
        raise InputError(f"{where}: {key}={shown(value)} is not supported; accepted: one value for all")
    return value[0]


def check_lengths(values: Mapping[str, Any], n: int, of: str, where: str) -> None:
    """Raises InputError where one of these is a list that has not n values, one for each of `of`."""
    for key, value in values.items():
        if isinstance(value, tuple) and len(value) != n:
            raise InputError(f"{where}: {key} has {len(value)} values; wants {n}, one for each of {of}")


def check_divides(divisors: Iterable[int], numbers: Iterable[int], key: str, of: str, where: str) -> None:
    """Raises InputError where a number is no multiple of its divisor; `key` and `of` name the two in the file."""
    for divisor, number in zip(divisors, numbers, strict=True):
        if number % divisor:
            raise InputError(f"{where}: {key}={divisor} does not divide {of}={number}")


def as_tuple(value: Any) -> Any:
    """Lists, also inner ones, as tuples."""
    return tuple(map(as_tuple, value)) if isinstance(value, list | tuple) else value


def shown(value: Any) -> str:
    """A value as json spells it, cut to some 80 characters."""
    words = {"True": "true", "False": "false", "None": "null"}
    text = _SHORT.repr(list(value) if isinstance(value, tuple) else value)
    return words.get(text, text)
