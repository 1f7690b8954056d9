"""Json from files that anybody may have made: one reader, bounded in size, depth and numbers."""

import json
import math
from pathlib import Path
from typing import Any

MOST_BYTES = 2**24  # of a file: the longest that belongs to a model is a tokenizer.json of some megabytes
_MOST_LEVELS = 64  # brackets within brackets
_MOST_DIGITS = 300  # of a whole number; a float has no larger ones


def parse_json(text: str, *, finite: bool = True) -> Any:
    """What json text says.

    Args:
      finite: refuses NaN, Infinity and numbers that a float rounds to it; Python writes and reads them, json has none.

    Raises:
      ValueError: of one line. It is no json, has more than 64 levels, a number of more than 300 digits, half of a
        character (a lone surrogate, which can be written nowhere), or a key twice with different values.
    """
    try:
        content = json.loads(
            text,
            parse_int=_whole,
            parse_float=_finite if finite else float,
            parse_constant=_refused if finite else float,
            object_pairs_hook=_object,
        )
    except RecursionError:
        raise ValueError(f"more than {_MOST_LEVELS} levels of brackets") from None
    level = [content]
    for _ in range(_MOST_LEVELS + 1):
        level = [x for item in level for x in _inside(item)]
    if level:
        raise ValueError(f"more than {_MOST_LEVELS} levels of brackets")
    return content


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not UTF-8, or has more than `most` bytes, which are not read then.
    """
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"longer than {most // 2**20} MB")
    return data.decode("utf-8")


def _inside(item: Any) -> list[Any]:
    """What is within a list or object; of a text, that it is whole characters."""
    if isinstance(item, dict):
        return [*item, *item.values()]
    if isinstance(item, str) and not item.isascii():
        item.encode("utf-8")
    return item if isinstance(item, list) else []


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"the number {number[:20]} is too large")
    return value


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is no number of json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"the key {key[:40]!r} is there twice, with different values")
    return found
