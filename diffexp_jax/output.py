"""What a program says to a terminal that may go: output that cannot be written never ends it."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Lets stdout and stderr close while the context lasts: a broken ssh connection, a `tee` that is killed.

    From the first write that fails on, what goes there is dropped, whoever writes it, also at the program's very end.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = ours = _Lasting(sys.stdout), _Lasting(sys.stderr)
    try:
        yield
    finally:
        for stream in ours:
            stream.flush()
        if (sys.stdout, sys.stderr) == ours:
            sys.stdout, sys.stderr = before


@contextlib.contextmanager
def above_bars() -> Iterator[None]:
    """Prints above tqdm's progress bars, in whole lines, for as long as the context lasts."""
    before, sys.stdout = sys.stdout, (ours := _AboveBars(sys.stdout))
    try:
        yield
    finally:
        ours.finish()
        if sys.stdout is ours:
            sys.stdout = before


class _AboveBars:
    """A text stream that keeps the beginning of a line, of each thread, until its end comes."""

    def __init__(self, stream: Any):
        self._stream, self._begun = stream, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:  # tqdm asks whether a stream is stdout
        return other is self or other is self._stream

    def __hash__(self) -> int:
        return hash(self._stream)

    def write(self, text: str) -> int:
        thread = threading.get_ident()
        lines, newline, begun = (self._begun.pop(thread, "") + text).rpartition("\n")
        if begun:
            self._begun[thread] = begun
        if newline and "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(lines, file=self._stream)
        elif newline:
            self._stream.write(lines + newline)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def finish(self) -> None:
        """Writes what has no end yet."""
        for begun in list(self._begun.values()):
            self._stream.write(begun)
        self._begun.clear()


class _Lasting:
    """A text stream that drops what it cannot write."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, work: Callable[[], Any]) -> None:
        if self._stream is None:  # the program was started without one
            return
        try:
            work()
        except OSError:  # the terminal has gone, nobody reads the pipe, the disk of a log is full
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
