"""The folder of a run: which runs may be in it, and its config.json."""

import json
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from diffexp_jax import InputError, command

# config keys that a continued run may change
_FREE = ("eval", "log", "checkpoint", "host_reward", "iterations", "compilation_cache")


def check(workdir: Path, config: dict[str, Any]) -> None:
    """Checks, without writing anything, that a run of this config can be in the workdir, or go on there.

    Raises:
      InputError: not writable, or it holds a run of another config (the message lists the keys that differ).
    """
    command.check_writable(workdir, "workdir")
    path = workdir / "config.json"
    if path.exists() and any((workdir / "checkpoints").glob("[0-9]*")):  # else nothing of that run is there to lose
        try:
            old = json.loads(path.read_text())
        except ValueError:
            raise InputError(f"{path}: not readable as json; remove it or take another --workdir") from None
        differing = sorted(k for k in _flat(old).items() ^ _flat(config).items() if k[0].split(".")[0] not in _FREE)
        if differing:
            names = sorted({k for k, _ in differing})
            differences = ", ".join(f"{k} ({_flat(old).get(k)} there, {_flat(config).get(k)} here)" for k in names[:6])
            raise InputError(f"workdir {workdir}: holds a run of another config: {differences}; take another --workdir")


def create(workdir: Path, config: dict[str, Any]) -> None:
    """Creates the workdir and its config.json.

    Raises:
      InputError: that is not possible.
    """
    partial = workdir / "config.partial"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(config, indent=2) + "\n")
        partial.replace(workdir / "config.json")
    except OSError as error:
        raise InputError(f"workdir {workdir}: cannot be written ({error.strerror or error})") from None


def _flat(config: dict[str, Any]) -> dict[str, str]:
    """{dotted key: its value as json}."""
    return {key: json.dumps(value) for key, value in flatten_dict(config, sep=".").items()}
