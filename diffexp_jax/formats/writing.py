"""Files that are written whole or not at all, and what is left of them where a program was killed."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_PARTIAL = re.compile(r"\.(\d{1,7})\.partial$")  # the end of what `replaced` writes; a lease has longer numbers there


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives a file to write beside `path`, which takes its place at the end, or is removed where that fails.

    Raises:
      OSError: it names `path`.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:  # a write to an open file does not say which
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def clear_partials(folder: Path) -> None:
    """Removes what `replaced` has left in a folder where its program was killed.

    What belongs to another program that lives on this machine stays: it may be writing it now.
    """
    for path in folder.glob("*.partial"):
        if (match := _PARTIAL.search(path.name)) and not _lives(int(match[1])):
            path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    """Whether there is another process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return pid != os.getpid()
