"""The files of a lock that several machines see (`lease.py`): of several programs that write one, one succeeds.

link() makes a file whole, or fails where there is one. To replace a lease a program makes a claim to it in the same
way, a file with the lease's id in its name, and renames the claim onto the lease: no other program can do so meanwhile.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from diffexp_jax.errors import InputError
from diffexp_jax.formats.json_text import parse_json

LEASE = "lease.json"
_LONGEST = 4096  # bytes of a lease that are read
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # of a file system without them


class Found(NamedTuple):
    """A lease, or a claim to one, as it is on the disk."""

    path: Path
    owner: dict[str, Any]  # {} where it is damaged
    key: str  # its id, or a checksum where it is damaged
    state: Any  # another one whenever it was written anew
    time: float  # when that was, by the file system's clock

    @property
    def name(self) -> str:
        """Whose it is, in words."""
        pid, host = self.owner.get("pid"), self.owner.get("host")
        machine = host[:100] if isinstance(host, str) else "another machine"
        return f"process {pid if isinstance(pid, int) else '?'} on {machine}"


def take(folder: Path, stale: Sequence[Found], owner: dict[str, Any]) -> BinaryIO | None:
    """Makes the folder's lease in place of the stale one; its open file, or None where another program was faster.

    Args:
      stale: the lease, the claim to it of a program that died in just this function, the claim to that one, and so on.
    """
    if not stale:
        return create(folder / LEASE, owner)
    ours = claim(folder, stale[-1].key)
    if (file := create(ours, owner)) is None:
        return None
    try:
        for found in reversed(stale):  # who has the claim to it is the only one that may replace it
            there = read(found.path)
            if there is None or there.key != found.key:
                file.close()
                return None
            ours = ours.replace(found.path)
        return file
    finally:
        if ours.name != LEASE:
            ours.unlink(missing_ok=True)


def remove(folder: Path, key: str, owner: dict[str, Any]) -> None:
    """Removes the lease with this key, unless another program is about to replace it; `owner` has an id of its own."""
    ours = claim(folder, key)
    if (file := create(ours, owner)) is not None:
        file.close()
        try:
            if (found := read(folder / LEASE)) and found.key == key:
                found.path.unlink()
        finally:
            ours.unlink()


def chain(folder: Path) -> list[Found]:
    """The folder's lease, the claim to it, the claim to that...: the owner of the last one decides."""
    found: list[Found] = []
    path = folder / LEASE
    while (there := read(path)) and all(there.key != other.key for other in found):
        found.append(there)
        path = claim(folder, there.key)
    return found


def claim(folder: Path, key: str) -> Path:
    """The file of the only one that may replace the lease with this key."""
    return folder / f"{LEASE}.{key}.next"


def read(path: Path) -> Found | None:
    """A lease or a claim, None where there is none.

    Raises:
      InputError: it is no file (a pipe would be waited for).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise InputError(f"{path}: wants a file, as a run writes it; remove it")
        content = os.read(descriptor, _LONGEST)
    finally:
        os.close(descriptor)
    try:
        owner = parse_json(content.decode("utf-8"))
    except ValueError:
        owner = {}
    name = owner.get("id") if isinstance(owner, dict) else None
    known = isinstance(name, str) and re.fullmatch(r"[\w-]{1,64}", name, re.ASCII)
    key = name if known else hashlib.sha256(content).hexdigest()[:16]
    state = path, content, about.st_mtime_ns, about.st_ino
    return Found(path, owner if known else {}, key, state, about.st_mtime)


def create(path: Path, owner: dict[str, Any]) -> BinaryIO | None:
    """Makes a lease or a claim, whole; its open file, or None where there is one already."""
    partial = path.with_name(f"{LEASE}.{owner['id']}.partial")
    file = open(partial, "xb", buffering=0)
    try:
        write(file, owner)
        try:
            os.link(partial, path)
        except OSError as error:
            if error.errno in _NO_LINKS:
                file.close()
                file = open(path, "xb", buffering=0)
                write(file, owner)
            elif not ((found := read(path)) and found.key == owner["id"]):  # NFS may answer so to who has made it
                raise
        return file
    except FileExistsError:
        file.close()
        return None
    finally:
        partial.unlink(missing_ok=True)


def write(file: BinaryIO, owner: dict[str, Any]) -> None:
    """Writes the open file anew, in one piece; its time is the file system's now."""
    content = json.dumps(owner).encode() + b"\n"
    os.pwrite(file.fileno(), content, 0)
    os.ftruncate(file.fileno(), len(content))
    os.fsync(file.fileno())


def now(folder: Path) -> float:
    """The file system's clock: the time of a file that is written now."""
    probe = folder / f"{LEASE}.{os.urandom(4).hex()}.partial"
    try:
        probe.write_text("now")
        return probe.stat().st_mtime
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
