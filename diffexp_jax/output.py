"""What a program says to a terminal that may go: output that cannot be written never ends it."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """For as long as the context lasts stdout and stderr may close: a broken ssh connection, a `tee` that is killed.

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
