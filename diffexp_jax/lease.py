"""A lock of a folder that several machines see: one program at a time has it, and a dead one's is taken over.

On one machine the system's own lock (flock) decides: it is gone with its program, however that ends. Between machines
flock may be unknown or local. There a lease decides, a small file that its owner writes anew every few seconds. A
lease that was left alone for long is of a machine that is dead, or cut off. How long is read from the times that the
file system gives to files, the lease and one written now, so that no machine's clock matters.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

from diffexp_jax import InputError

LOCK, LEASE = "lock", "lease.json"
RENEW = 10.0  # seconds between an owner's writes
# Seconds after which a lease is a dead machine's. NFS shows other machines a file's times up to a minute late.
STALE = 120.0


class Lease:
    """What `hold` gives: says whether the folder is still ours."""

    def __init__(self, folder: Path):
        self._folder, self._path = folder, folder / LEASE
        self._owner = {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "id": os.urandom(8).hex()}
        self._error: Exception | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def check(self) -> None:
        """Raises OSError where the folder is gone, cannot be written, or another machine has taken it over."""
        if self._error is None and not (self._folder / LOCK).exists():
            self._error = OSError(f"workdir {self._folder}: is gone")
        if self._error is not None:
            raise self._error

    def begin(self) -> None:
        try:
            with open(self._path, "x") as file:  # of two that begin at once, one makes it
                file.write(json.dumps(self._owner) + "\n")
        except FileExistsError:
            raise InputError(f"workdir {self._folder}: in use by {_name(_read(self._path) or {})}") from None
        self._thread.start()

    def end(self) -> None:
        self._end.set()
        self._thread.join()
        if (_read(self._path) or {}).get("id") == self._owner["id"]:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _renew(self) -> None:
        last = time.monotonic()
        while self._error is None and not self._end.wait(RENEW):
            found = _read(self._path)
            if found and found.get("id") != self._owner["id"]:
                self._error = OSError(
                    f"workdir {self._folder}: {_name(found)} has taken it over: this program was silent for {STALE:g} s"
                )
                return
            try:
                _write(self._path, self._owner)
                last = time.monotonic()
            except OSError as error:  # a shared file system may be away for a while
                if isinstance(error, FileNotFoundError) or time.monotonic() - last > STALE / 2:
                    self._error = OSError(f"workdir {self._folder}: is gone or cannot be written ({error.strerror})")


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
    with open(path, "a+") as file:
        _wait_until_free(folder, _flock(folder, file))
        if not create:
            yield None
            return
        (folder / LEASE).unlink(missing_ok=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        lease = Lease(folder)
        lease.begin()
        try:
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
        raise InputError(f"workdir {folder}: in use by {file.read().strip() or 'another program'}") from None
    except OSError:
        return False
    return True


def _wait_until_free(folder: Path, alone_here: bool) -> None:
    """Returns once the lease that is there, if any, is nobody's. Raises InputError where its owner is alive.

    Args:
      alone_here: whether no other program of this machine has the folder.
    """
    path, said = folder / LEASE, False
    first = _renewed(path)
    while (renewed := _renewed(path)) is not None:
        owner = _read(path) or {}
        if alone_here and (owner.get("host"), owner.get("boot")) == (socket.gethostname(), _boot()):
            return  # it was killed: the system's lock is free
        if renewed != first:
            raise InputError(f"workdir {folder}: in use by {_name(owner)}")
        age = _now(folder) - renewed
        if age > STALE:
            logging.warning("workdir %s: %s left it without a word %.0f s ago: taken over", folder, _name(owner), age)
            return
        if not said:
            line = f"workdir {folder}: {_name(owner)} had it {max(age, 0.0):.0f} s ago; waits for a sign of it"
            print(f"{line}, {STALE - age:.0f} s at most", file=sys.stderr)
            said = True
        time.sleep(min(1.0, RENEW))


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', 'another machine')}"


def _boot() -> str:
    """What tells machines of one name apart, and a machine from itself before it was started anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Any] | None:
    """The lease's owner; {} where it is damaged, None where there is none."""
    try:
        content = json.loads(path.read_text())
    except OSError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, owner: dict[str, Any]) -> None:
    """Replaces the file, so that nobody reads half of it, and its time is the file system's now."""
    partial = path.with_name(f"{LEASE}.{owner['id']}.partial")
    try:
        partial.write_text(json.dumps(owner) + "\n")
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _renewed(path: Path) -> float | None:
    """When the lease was written last, by the file system's clock; None: there is none."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _now(folder: Path) -> float:
    """The file system's clock: the time of a file that is written now."""
    probe = folder / f"{LEASE}.{os.urandom(4).hex()}.partial"
    try:
        probe.write_text("now")
        return probe.stat().st_mtime
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
