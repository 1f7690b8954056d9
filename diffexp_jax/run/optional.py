"""What a run can do without: pictures, curves, reports, TensorBoard. Where one fails a warning says so, and no more."""

from collections.abc import Callable
from typing import Any, TypeVar

from absl import logging

from diffexp_jax.errors import first_line

T = TypeVar("T")
_said: set[tuple[str, str]] = set()  # what failed, and why


def attempt(what: str, work: Callable[..., T], *args: Any, **options: Any) -> T | None:
    """work(...), or None where it fails: one line says so, once for each cause.

    Args:
      what: fails, in words.
    """
    try:
        return work(*args, **options)
    except Exception as error:  # of drawing, of a full disk, of a service: nothing of it may end a run
        reason = reason_of(error)
        cause = what, getattr(error, "strerror", None) or reason
        if cause not in _said:
            _said.add(cause)
            logging.warning("%s: failed (%s); the run continues without", what, reason)
    return None


def reason_of(error: Exception) -> str:
    """Why, in part of a line."""
    line, kind = first_line(error, 300), type(error).__name__
    known = isinstance(error, OSError) or type(error).__module__.startswith("diffexp_jax")
    return line if known or line == kind else f"{kind}: {line}"
