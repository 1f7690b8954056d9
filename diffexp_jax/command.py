"""What the command-line programs share: one line per mistake, and exit codes."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import logging

from diffexp_jax import InputError, RewardError


def guarded(main: Callable[..., Any], *args: Any) -> None:
    """Runs main(*args); bad input ends in one line on stderr and exit code 2, a failed run in exit code 1."""
    # transformers advises at import that torch is missing: nothing here needs it
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.set_verbosity(logging.WARNING)  # orbax tells every file that it touches
    try:
        main(*args)
    except InputError as error:
        fail(2, error)
    except (FloatingPointError, RewardError, OSError) as error:  # a NaN; the disk is full, say
        fail(1, error)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def check_writable(folder: Path, flag: str) -> None:
    """Checks, before the work and without writing anything, that files can go into a folder that may not exist yet.

    Raises:
      InputError: they cannot; `flag` is what the user gave the folder by.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{flag} {folder}: cannot be written ({there} is not a folder)")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {folder}: cannot be written (no permission to write in {there})")


def fail(code: int, error: Exception) -> NoReturn:
    """One line on stderr, and the exit code."""
    lines = str(error).strip().splitlines()
    print(f"error: {lines[0] if lines else type(error).__name__}", file=sys.stderr)
    sys.exit(code)
