"""Checks of single settings: each mistake is one line that says what is accepted."""

from collections.abc import Collection
from typing import Any

from diffexp_jax import InputError


def one_of(key: str, value: Any, accepted: Collection[str]) -> None:
    """Raises InputError where the value is none of these."""
    if value not in accepted:
        raise InputError(f"{key}={value!r}: accepted: {', '.join(accepted)}")


def within(key: str, value: float, low: float, high: float | None = None) -> None:
    """Raises InputError where the value is below `low`, or above `high` if there is one."""
    if value < low or (high is not None and value > high):
        raise InputError(f"{key}={value}: wants {f'at least {low}' if high is None else f'{low}..{high}'}")
