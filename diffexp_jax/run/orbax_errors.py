"""What orbax and tensorstore say where something fails: one line of it is of use."""

import errno
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from diffexp_jax.errors import first_line


def quiet() -> None:
    """Keeps orbax from logging a traceback for every thread that an error meets: we say it in a line. For good, as a
    thread may meet it when all else has ended.
    """
    hide_closed_loops()
    for name in ("absl", "root"):
        logging.getLogger(name).addFilter(_is_not_orbaxs)  # a second time changes nothing


def _is_not_orbaxs(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def in_daemon_threads(work: Callable[[], Any]) -> Any:
    """work(), whose threads do not hold up the end of the program: those of a write to a read-only disk wait for ten
    minutes. A thread is a daemon where the one that begins it is.
    """
    done: dict[str, Any] = {}

    def run() -> None:
        try:
            done["result"] = work()
        except Exception as error:
            done["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if "error" in done:
        raise done["error"]
    return done["result"]


def hide_closed_loops() -> None:
    """After an error tensorstore reports to an event loop that orbax has closed: a traceback that says nothing."""
    if getattr(sys.unraisablehook, "__name__", "") == "_without_closed_loops":
        return

    def _without_closed_loops(unraisable, before=sys.unraisablehook):
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = _without_closed_loops


def reason(error: Exception) -> str:
    """The first line of what it says, or what the system says of the disk."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
        if os.strerror(number) in str(error):
            return os.strerror(number)
    return first_line(error)
