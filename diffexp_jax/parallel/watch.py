"""Notices hosts that have gone: killed, stopped, cut off, or ended by an error that only they met.

Left alone, the others would wait for such a host in a collective, or jax would end them from C++, some time later, with
a stack trace. Every host says now and then that it is alive, and listens. What it hears it says in one line, and ends.
"""

import atexit
import contextlib
import ctypes
import itertools
import os
import re
import signal
import sys
import threading
import time
from typing import Any

import jax

from diffexp_jax.errors import HostError, InputError, first_line

_ALIVE, _LEFT, _END = "diffexp/watch/alive", "diffexp/watch/left", "diffexp/watch/end"
_GRACE = 5.0  # seconds that the first host, which holds the service, stays for the others to hear why it ends
_GOES_ON = "the same command continues from the last checkpoint"
# What collectives and the coordination service say when another host is no longer there
_LOST = re.compile("closed by peer|reset by peer|[Cc]onnection|UNAVAILABLE|heartbeat|[Bb]arrier|NCCL|[Gg]loo")


class Watch:
    """A thread of one host that notices when another has gone; a context that stops it.

    Args:
      timeout: seconds after which a host that says nothing counts as gone.
    """

    def __init__(self, timeout: int):
        self.timeout = timeout
        self._every = min(1.0, timeout / 10)  # seconds
        self._client: Any = None
        self._index, self._number = 0, 1
        self._stopped = threading.Event()
        self._heard: dict[int, tuple[str, float]] = {}  # of each host: what it said last, and when that was new
        self._answered = 0.0  # when the first host did last
        self._left: dict[int, str] = {}
        self._last_words = ""

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop()

    def start(self, client: Any, index: int, number: int) -> None:
        """Begins to say that this host is alive, and to listen to the others."""
        self._client, self._index, self._number = client, index, number
        self._answered = time.monotonic()
        self._heard = {i: ("", self._answered) for i in range(number)}
        self._last_words = f"the first host has gone, or jax failed (it says above why); {_GOES_ON}"
        for name, target in (("beat", self._beat), ("listen", self._listen)):
            threading.Thread(target=target, daemon=True, name=f"hosts: {name}").start()

    def stop(self) -> None:
        """From now on a host that goes is no surprise."""
        self._stopped.set()

    # ------------------------------------------------------------------------------------------------------- threads

    def _beat(self) -> None:
        """Tells the first host, and asks it for the others. Blocks where it does not answer: `_listen` does not."""
        for n in itertools.count():
            with contextlib.suppress(Exception):  # no answer is told by the clock
                self._client.key_value_set(f"{_ALIVE}/{self._index}", str(n), allow_overwrite=True)
                alive = _by_host(self._client.key_value_dir_get(_ALIVE))
                self._left = _by_host(self._client.key_value_dir_get(_LEFT))
                self._answered = time.monotonic()
                for i, said in alive.items():
                    if self._heard[i][0] != said:
                        self._heard[i] = (said, self._answered)
            if self._stopped.wait(self._every):
                return

    def _listen(self) -> None:
        """Ends this process where another has gone."""
        looked = time.monotonic()
        while not self._stopped.wait(self._every):
            now = time.monotonic()
            if now - looked > self.timeout / 2:  # it was this host that stood still
                self._answered = now
                self._heard = {i: (said, now) for i, (said, _) in self._heard.items()}
            looked = now
            gone = self._gone(now)
            if gone and not self._stopped.is_set():
                code, why = gone
                self._last_words = why
                print(f"\nerror: {why}; this is host {self._index}: it ends too", file=sys.stderr, flush=True)
                self.leave(code, why, at_once=True)

    def _gone(self, now: float) -> tuple[int, str] | None:
        """(exit code, why) where a host has gone."""
        for i, said in self._left.items():
            code, _, why = said.partition(" ")
            return int(code), f"host {i}: {why}" if not why.startswith("host ") else why
        silent = [i for i, (_, at) in self._heard.items() if now - at > self.timeout and i != self._index]
        if now - self._answered > self.timeout:
            silent = [0]
        if silent:
            after = f"for {self.timeout} s (hosts.heartbeat_timeout)"
            return (
                1,
                f"host {silent[0]}: nothing was heard of it {after}, it was killed, stopped or cut off; {_GOES_ON}",
            )
        return None

    # -------------------------------------------------------------------------------------------------------- endings

    def finish(self, timeout: int) -> bool:
        """The end of a run that all come to: waits for the others, at most `timeout` seconds; whether all came."""
        try:
            self._client.wait_at_barrier(_END, 1000 * timeout)
        except Exception:  # of jax; of no known type
            return False
        self.stop()
        jax.distributed.shutdown()
        return True

    def explained(self, error: BaseException) -> HostError | None:
        """What to say in place of a collective's error where another host has gone; None where it is no such error."""
        of_jax = isinstance(error, jax.errors.JaxRuntimeError | ValueError) and not isinstance(error, InputError)
        if self._stopped.is_set() or not of_jax or not _LOST.search(str(error)):
            return None
        for _ in range(20):  # the one that raised says so within a moment
            if gone := self._gone(time.monotonic()):
                return HostError(gone[1])
            time.sleep(0.1)
        return HostError(f"another host of the run has gone ({first_line(error, 160)}); {_GOES_ON}")

    def leave(self, code: int, why: str, *, at_once: bool = False) -> None:
        """Tells the others why this host ends; then it does so without waiting for them, at once or at exit.

        jax would wait at exit for hosts that wait for this one.
        """
        self.stop()
        tell = threading.Thread(target=self._tell, args=(f"{code} {why}",), daemon=True)
        tell.start()
        tell.join(1.0)  # the first host may be the one that has gone
        if at_once:
            self._end(code)
        atexit.register(self._end, code)

    def _tell(self, text: str) -> None:
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_LEFT}/{self._index}", text, allow_overwrite=True)

    def _end(self, code: int) -> None:
        deadline = time.monotonic() + _GRACE
        while self._index == 0 and time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                if len(self._client.key_value_dir_get(_LEFT)) == self._number:
                    break
            time.sleep(0.05)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def say_when_aborted(self, words: str) -> None:
        """Ends this process in a plain line where jax's C++ does (SIGABRT): when the first host is gone, it does."""
        self._last_words = words

        def end(number: int) -> None:
            print(f"\nerror: {self._last_words}", file=sys.stderr, flush=True)
            os._exit(1)

        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)  # kept, or the pointer would dangle
        set_handler = ctypes.CDLL(None).signal
        set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        set_handler(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))


def _by_host(pairs: list[tuple[str, str]]) -> dict[int, str]:
    """{index: text} of the service's (KEY/INDEX, text)."""
    return {int(key.rpartition("/")[2]): text for key, text in pairs}
