"""What the command-line programs share: one line per mistake, and exit codes."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import flags, logging

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


def parse_flags(argv: list[str], config: flags.FlagHolder) -> list[str]:
    """absl's flag parsing, with a mistake in a config (a flag of ml_collections) reported in one line."""
    try:
        rest = flags.FLAGS(argv)
        getattr(config.value, "algorithm", None)  # a config file that is missing is an error only once it is used
        return rest
    except Exception as error:
        while "Error whilst parsing config file" in str(error):  # a traceback around what get_config said
            error = error.__context__
        if isinstance(error, KeyError | AttributeError):
            found = re.search(r'Did you mean "(.+?)" instead of "(.+?)"', str(error))
            message = f"no such key {found[2]!r}; did you mean {found[1]!r}?" if found else error
            error = InputError(f"config: {message}")
        if isinstance(error, OSError):  # a line for each place where the file was looked for
            error = InputError(f"config: {str(error).splitlines()[-1].strip()}")
        fail(2, error)
