"""Single settings: what one is, and checks of its value; each mistake is one line that says what is accepted."""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from diffexp_jax.errors import InputError, did_you_mean


class Number(NamedTuple):
    """The numbers that a setting may be: finite ones from `low` to `high`. The upper ends only keep out nonsense."""

    low: float
    high: float
    whole: bool = False
    above: bool = False  # more than `low`, not equal to it
    below: bool = False  # less than `high`, not equal to it
    optional: bool = False  # None is accepted too
    multiple: int = 1  # of this
    pair: bool = False  # the setting is two of them, (low, high)

    def accepts(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        inside = (self.low < value if self.above else self.low <= value) and (  # not so of a NaN
            value < self.high if self.below else value <= self.high
        )
        return inside and abs(value) != math.inf and not (self.multiple > 1 and value % self.multiple)

    def __str__(self) -> str:
        low, high = f"{self.low:.10g}", f"{self.high:.10g}"
        text = f"{low}..{high}"
        if self.above or self.below:
            text = f"{'more than' if self.above else 'at least'} {low}, "
            text += f"{'less than' if self.below else 'at most'} {high}"
        return f"a multiple of {self.multiple}, {text}" if self.multiple > 1 else text


def whole(low: int, high: int = 10**7, **kwargs) -> Number:
    """Whole numbers from low to high."""
    return Number(low, high, whole=True, **kwargs)


def positive(high: float = 1e6) -> Number:
    """Numbers above 0."""
    return Number(0.0, high, above=True)


SEED = whole(0, 2**32 - 1)  # jax takes a seed modulo 2**32
LORA_SCALE = Number(-100.0, 100.0)  # a factor of a LoRA that is mixed in; below 0 it leads the other way


def check_number(name: str, value: Any, accepted: Number) -> None:
    """Raises InputError where the value is no such number; `name` is what the user sets it by, "KEY=" or "--FLAG "."""
    if not accepted.accepts(value):
        kind = "a whole number, " if accepted.whole and not isinstance(value, int) else ""
        raise InputError(f"{name}{value}: wants {kind}{accepted}")


def check_numbers(name: str, value: Any, accepted: Number) -> None:
    """`check_number` of a setting that is a number, several numbers, or a pair of them."""
    several = isinstance(value, tuple | list)
    for number in value if several else [value]:
        check_number(name, number, accepted)
    if accepted.pair and not (several and len(value) == 2 and value[0] <= value[1]):
        raise InputError(f"{name}{value}: wants (low, high) with low <= high")


def check_text(name: str, value: Any) -> None:
    """Raises InputError where the value is neither "" nor words that can be written as UTF-8; `name` as above."""
    try:
        if isinstance(value, str) and (not value or value.strip()):
            value.encode()
            return
    except UnicodeEncodeError:  # half of a pair of surrogates, as of a command line in another encoding
        pass
    raise InputError(f"{name}{value!r:.100}: wants words (of valid UTF-8), or nothing")


def one_of(key: str, value: Any, accepted: Collection[str | None]) -> None:
    """Raises InputError where the value is none of these."""
    if value not in accepted:
        listed = ", ".join(map(str, accepted))
        raise InputError(f"{key}={value!r}: accepted: {listed}{did_you_mean(value, accepted)}")


# ------------------------------------------------------------------------------------------------------------- settings

# What a setting may be: a number (of several, each of them); one of some words; or what a function (name, value) does
# not refuse by an InputError. None: anything of its type.
Accepted = Number | tuple[str | None, ...] | Callable[[str, Any], Any] | None


class Setting(NamedTuple):
    """All that there is to know of a setting but its name."""

    default: Any
    type: Any  # as the dataclass has it: str | None, say
    meaning: str  # a few words, with the unit
    accepted: Accepted
    about: str  # what else is to be known; "": nothing

    @property
    def kind(self) -> type:
        """The type of a value that is not None: str of `str | None`, tuple of `tuple[str, ...]`."""
        return typing.get_origin(self._annotation) or self._annotation

    @property
    def _annotation(self) -> Any:
        (annotation,) = set(typing.get_args(self.type) if isinstance(self.type, types.UnionType) else [self.type]) - {
            types.NoneType
        }
        return annotation

    def fits(self, value: Any) -> bool:
        """Whether the value is of its type: a list does for a tuple, a whole number for any, True for none of these."""
        if value is None:
            return self.default is None
        if self.kind is tuple:
            of = typing.get_args(self._annotation)[0]
            return isinstance(value, tuple | list) and all(_is(item, of) for item in value)
        return _is(value, self.kind)

    @property
    def wanted(self) -> str:
        """What `fits`, in words."""
        return "another type" if self.default is None else f"a {self.kind.__name__}, as {self.default!r}"

    def check(self, key: str, value: Any, name: str | None = None) -> None:
        """Raises InputError where the value is not accepted; `name` is what the user sets it by, if not by "KEY="."""
        name = f"{key}=" if name is None else name
        if isinstance(self.accepted, Number):
            check_numbers(name, value, self.accepted)
        elif isinstance(self.accepted, tuple):
            one_of(key, value, self.accepted)
        elif self.accepted is not None:
            self.accepted(name, value)
        elif not self.fits(value):
            raise InputError(f"{name}{value!r:.100}: wants {self.wanted}")


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int | float if kind is float else kind)


def setting(default: Any, meaning: str, accepted: Accepted = None, *, about: str = "") -> Any:
    """A field of a section's dataclass; see `Setting`."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "accepted": accepted, "about": about})


def settings_of(section: Any) -> Iterator[tuple[str, Setting]]:
    """(name, setting) of a section's own settings, in their order; `section` is its dataclass, or a value of it."""
    yield from _settings_of_class(section if isinstance(section, type) else type(section))


@functools.cache  # a config's check asks for each section many times
def _settings_of_class(section: type) -> tuple[tuple[str, Setting], ...]:
    fields = [field for field in dataclasses.fields(section) if "meaning" in field.metadata]
    return tuple((field.name, Setting(field.default, field.type, **field.metadata)) for field in fields)
