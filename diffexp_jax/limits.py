"""Checks of single settings: each mistake is one line that says what is accepted."""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

from diffexp_jax.errors import InputError


class Number(NamedTuple):
    """The numbers that a setting may be: finite ones from `low` to `high`. The upper ends only keep out nonsense."""

    low: float
    high: float
    whole: bool = False
    above: bool = False  # more than `low`, not equal to it
    below: bool = False  # less than `high`, not equal to it
    optional: bool = False  # None is accepted too
    multiple: int = 1  # of this

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


LORA_SCALE = Number(-100.0, 100.0)  # a factor of a LoRA that is mixed in; below 0 it leads the other way


def check_number(name: str, value: Any, accepted: Number) -> None:
    """Raises InputError where the value is no such number; `name` is what the user sets it by, "KEY=" or "--FLAG "."""
    if not accepted.accepts(value):
        kind = "a whole number, " if accepted.whole and not isinstance(value, int) else ""
        raise InputError(f"{name}{value}: wants {kind}{accepted}")


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
        raise InputError(f"{key}={value!r}: accepted: {', '.join(map(str, accepted))}")
