"""A lock of a folder that several machines see: one program at a time has it, and a dead one's is taken over.

On one machine the system's own lock (flock) decides: it is gone with its program, however that ends. Between machines
flock may be unknown or local. There a lease decides, a small file that its owner writes anew every few seconds. A
lease that nobody writes for long is of a machine that is dead, or cut off.

Two programs never both get it, see `lease_files.py`. An owner writes to its open file, so one that wakes up late does
not write over the lease of another that has taken the folder over.
"""

import contextlib
import fcntl
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from diffexp_jax.errors import InputError
from diffexp_jax.run import lease_files
from diffexp_jax.run.lease_files import LEASE, Found

LOCK = "lock"
RENEW = 10.0  # seconds between an owner's writes
# Seconds after which a lease is a dead machine's. NFS shows other machines a file's times up to a minute late.
STALE = 120.0


class Lease:
    """What `hold` gives: says whether the folder is still ours."""

    def __init__(self, folder: Path):
        self._folder, self._path = folder, folder / LEASE
        self._owner = {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "id": os.urandom(8).hex()}
        self._error: OSError | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def check(self) -> None:
        """Raises OSError where the folder is gone, cannot be written, or another machine has taken it over."""
        self._look()
        if self._error is not None:
            raise self._error

    def begin(self, stale: Sequence[Found] = ()) -> None:
        """Makes the lease, in place of what `_wait_until_free` found stale.

        Raises:
          InputError: another program was faster.
        """
        self._file = lease_files.take(self._folder, stale, self._owner)
        if self._file is None:
            others = [found.name for found in lease_files.chain(self._folder)]
            raise InputError(f"workdir {self._folder}: in use by {(others or ['another program'])[-1]}")
        self._thread.start()

    def end(self) -> None:
        """Removes the lease, if it is ours: by a claim to it, so that nobody replaces it in the same moment."""
        self._end.set()
        self._thread.join()
        self._file.close()
        with contextlib.suppress(OSError, InputError):
            lease_files.remove(self._folder, self._owner["id"], self._owner | {"id": os.urandom(8).hex()})

    def _look(self) -> Found | None:
        """Reads the lease; notes what is wrong."""
        found = None
        with contextlib.suppress(OSError, InputError):  # a shared file system may be away for a while
            if not (self._folder / LOCK).exists():
                self._error = self._error or OSError(f"workdir {self._folder}: is gone")
            found = lease_files.read(self._path)
        if found and found.owner and found.key != self._owner["id"]:
            silent = f"this program was silent for {STALE:g} s"
            self._error = OSError(f"workdir {self._folder}: {found.name} has taken it over: {silent}")
        return found

    def _keep(self) -> None:
        """Writes the lease again now and then, in the thread."""
        last, count = time.monotonic(), 0
        while self._error is None and not self._end.wait(RENEW):
            found = self._look()
            try:
                if self._error is None and not (found and found.owner):  # somebody has removed or damaged it
                    if file := lease_files.take(self._folder, [found] if found else [], self._owner):
                        self._file.close()
                        self._file = file
                count += 1
                lease_files.write(self._file, self._owner | {"renewed": count})
                last = time.monotonic()
            except (OSError, InputError) as error:
                if time.monotonic() - last > STALE / 2:
                    reason = getattr(error, "strerror", None) or error
                    self._error = OSError(f"workdir {self._folder}: is gone or cannot be written ({reason})")


@contextlib.contextmanager
def hold(folder: Path, *, create: bool = True) -> Iterator[Lease | None]:
    """Holds the folder for as long as the context lasts.

    A lease of another machine that may be alive is watched until its owner renews it (refused), or it is stale (taken
    over, with a warning).

    Args:
      create: False: only makes sure that nobody has it; nothing is left there.

    Raises:
      InputError: a running program has it.
      OSError: the folder cannot be written.
    """
    path = folder / LOCK
    if not create and not path.exists():
        yield None
        return
    with open(path, "a+", errors="replace") as file:
        stale = _wait_until_free(folder, _flock(folder, file))
        if not create:
            yield None
            return
        lease = Lease(folder)
        lease.begin(stale)
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield lease
        finally:
            lease.end()


def _flock(folder: Path, file: Any) -> bool:
    """Whether the system's lock is ours; False: the file system has none.

    Raises:
      InputError: a program holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise InputError(f"workdir {folder}: in use by {file.read(200).strip() or 'another program'}") from None
    except OSError:
        return False
    return True


_watched: dict[Path, tuple[Any, float]] = {}  # what each folder's lease was, and since when this process has seen it so


def _wait_until_free(folder: Path, alone_here: bool) -> list[Found]:
    """Returns once the lease that is there, if any, is nobody's: what is to be replaced, [] where there is none.

    A lease is stale once this program has watched it for STALE seconds, by its own clock; one that is that old by the
    file system's clock, after two periods of renewal: clocks are set now and then.

    Args:
      alone_here: whether no other program of this machine has the folder.

    Raises:
      InputError: its owner is alive.
    """
    first, said = None, False
    while chain := lease_files.chain(folder):
        last, states = chain[-1], [found.state for found in chain]
        if alone_here and (last.owner.get("host"), last.owner.get("boot")) == (socket.gethostname(), _boot()):
            return chain  # it was killed: the system's lock is free
        if states != (first := first or states):
            raise InputError(f"workdir {folder}: in use by {last.name}")
        if _watched.get(folder, (None,))[0] != states:
            _watched[folder] = states, time.monotonic()
        watched, age = time.monotonic() - _watched[folder][1], lease_files.now(folder) - last.time
        left = min(STALE - watched, max(STALE - age, 2 * RENEW - watched))
        if left <= 0:
            logging.warning(
                "workdir %s: %s left it without a word %.0f s ago: taken over", folder, last.name, max(age, watched)
            )
            return chain
        if not said:
            line = f"workdir {folder}: {last.name} had it {max(age, 0.0):.0f} s ago; waits for a sign of it"
            print(f"{line}, {left:.0f} s at most", file=sys.stderr)
            said = True
        time.sleep(min(1.0, RENEW, left))
    return []


def _boot() -> str:
    """What tells machines of one name apart, and a machine from itself before it was started anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
