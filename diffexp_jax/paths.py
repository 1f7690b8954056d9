"""Paths that users give, on a command line or in a config: every one of them becomes a `Path` here."""

import errno
import os
import re
from pathlib import Path

from diffexp_jax.errors import InputError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # more than a letter: C:/ is no such thing
_COPY = {"gs": "gcloud storage rsync", "s3": "aws s3 sync", "hdfs": "hdfs dfs -get", "hf": "hf download"}


def local(name: str, path: str | Path) -> Path:
    """The path on this machine, with ~ for the home folder; nothing need be there.

    Args:
      name: what the user gives it by, "workdir" or "model.path=": errors begin with it.

    Raises:
      InputError: it is in a bucket or a URL, is no UTF-8, is empty, or is no path at all.
    """
    shown = f"{name}{'' if name.endswith(('=', ' ')) else ' '}{_printable(path)}"
    if scheme := _SCHEME.match(str(path)):
        raise InputError(f"{shown}: wants a path on this machine{_instead(scheme[1].lower(), str(path))}")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{shown}: its name is not UTF-8; wants one that is") from None
    if not str(path):
        raise InputError(f"{shown}: wants a path, which is empty here")
    try:
        found = Path(path).expanduser()
        os.stat(found)
    except RuntimeError:
        raise InputError(f"{shown}: there is no such user, or no home folder") from None
    except ValueError:
        raise InputError(f"{shown}: wants a path without zero bytes") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise InputError(f"{shown}: {error.strerror}") from None
    return found


def local_or_none(name: str, path: str | Path | None) -> Path | None:
    """`local` of a path that may be left out, as None or ""."""
    return local(name, path) if path else None


def _instead(scheme: str, path: str) -> str:
    """What to do about a path in a bucket, or a URL."""
    if scheme == "file":
        return f", without file://: /{path.partition(':')[2].lstrip('/')}"
    with_ = f" with `{_COPY[scheme]}`" if scheme in _COPY else ""
    return f", or on a mounted file system (NFS, gcsfuse); copy from there or to there{with_}"


def _printable(path: str | Path) -> str:
    text = re.sub(r"^([A-Za-z][\w+.-]+):/(?!/)", r"\1://", str(path))  # of which a `Path` drops a slash
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 200 else f"{text[:200]}..."
