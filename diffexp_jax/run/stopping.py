"""How a run is asked to stop: SIGTERM (a scheduler), SIGINT (Ctrl-C) and SIGHUP (a closed terminal) end it after the
current iteration.

The iteration may be one long program, and Python's own handlers wait until it is done. So a thread hears the signals:
it says what will happen, and ends the process when the time is over or when it is asked again.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SAME = 1.0  # seconds within which a second signal is the first one's echo: a launcher passes on what all have heard


class StopRequests:
    """Hears requests to stop for as long as the context lasts.

    Args:
      grace: seconds from the first request until the process is ended in the middle of what it does.

    Attributes:
      last_resort: called before that, in a thread: saves what there is. Not called at a second request, which ends the
        process at once.
    """

    def __init__(self, *, grace: float):
        self._grace, self._number = grace, 0
        self.last_resort: Callable[[], Any] = lambda: None

    def number(self) -> int:
        """The signal that asked to stop, 0: none has; the loop asks after every iteration.

        Several hosts take the largest of their numbers, so that all stop after the same iteration.
        """
        return self._number

    def __enter__(self) -> "StopRequests":
        self._before = None
        if threading.current_thread() is threading.main_thread():  # Python hears signals in no other
            self._heard, self._told = socket.socketpair()
            self._told.setblocking(False)
            self._thread = threading.Thread(target=self._listen, name="stop-requests", daemon=True)
            self._thread.start()
            self._before = {number: signal.signal(number, self._note) for number in signals()}
            self._wakeup = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._before is not None:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._told.close()  # which ends the thread
            self._thread.join()
            self._heard.close()

    def _note(self, number: int, frame: Any) -> None:
        self._number = self._number or number

    def _listen(self) -> None:
        """Listens, in the thread: Python writes each signal's number to the socket, whatever the main thread does."""
        number = self._next(None)
        if number is None:
            return
        self._number, heard = number, time.monotonic()
        name = signal.Signals(number).name
        _say(f"{name}: stops after this iteration, in {self._grace:g} s at the latest; a second time: at once")
        again: int | None = number
        while again and (time.monotonic() < heard + _SAME or again == signal.SIGHUP):  # which nobody sends to insist
            again = self._next(heard + self._grace - time.monotonic())
        if again is None:
            return
        if not again:
            try:
                self.last_resort()
            except Exception as error:  # on the disk is what there was before
                _say(f"error: {str(error).strip().partition(chr(10))[0] or type(error).__name__}")
        _say("stopped in the middle of an iteration; the same command continues from the last checkpoint")
        os._exit(128 + number)

    def _next(self, timeout: float | None) -> int | None:
        """The next request's signal; 0: none within these seconds; None: the context is left."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            self._heard.settimeout(None if end is None else max(end - time.monotonic(), 1e-3))
            try:
                data = self._heard.recv(1)
            except TimeoutError:
                return 0
            if not data:
                return None
            if data[0] in SIGNALS:
                return data[0]


def signals() -> list[int]:
    """The signals that ask to stop here: under nohup a closed terminal does not."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be closed
        print(f"\n{line}", file=sys.stderr, flush=True)
