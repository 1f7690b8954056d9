"""Checkpoints of a run: everything that the next iteration depends on, written whole or not at all."""

import contextlib
import errno
import logging as python_logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from diffexp_jax import InputError, parallel

# Every host has the whole state, so one is enough to write it, and to read it for all (`parallel.from_first`): the
# others need not see the folder.
_FIRST_HOST = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})


class Checkpoints:
    """The folder WORKDIR/checkpoints, one subfolder per kept iteration; a context that closes it.

    Every host may make one: what is not the first's writes nothing.
    """

    def __init__(self, workdir: Path, *, keep: int):
        self._folder = (workdir / "checkpoints").absolute()
        if not parallel.is_first():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=False, multiprocessing_options=_FIRST_HOST
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        if parallel.is_first():
            self._manager.close()

    def save(self, iteration: int, state: Any) -> None:
        """Writes `state` (host arrays) under a temporary name, then renames it: a kill leaves the older ones.

        Raises:
          OSError: it could not be written (the disk is full, say); the older ones are untouched.
        """
        if not parallel.is_first():
            return
        try:
            with _quiet():
                self._manager.save(iteration, args=ocp.args.StandardSave(state))
        except Exception as error:  # orbax and tensorstore raise many types for one full disk
            for partial in self._folder.glob(f"{iteration}.orbax-checkpoint-tmp*"):
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"{self._folder}: the checkpoint of iteration {iteration} could not be written ({_reason(error)}); "
                "the older ones are untouched"
            ) from None

    def restore_newest(self, like: Any) -> tuple[int, Any] | None:
        """(iteration, state) of the newest checkpoint that is whole, None where there is none yet.

        Broken ones that are newer are moved to WORKDIR/checkpoints-broken/ITERATION, with a warning.

        Raises:
          InputError: there are checkpoints, and none of them is whole.
        """
        broken = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = _read(self._folder / str(step), like)
                if _shapes(state) != _shapes(like):
                    raise InputError("its arrays have other shapes")
            except Exception as error:  # whatever a damaged file raises, an older one may still be whole
                broken.append(step)
                logging.warning("checkpoint %s is broken (%s)", step, _reason(error))
            else:
                self._set_aside(broken)
                return step, state
        if broken:
            raise InputError(f"{self._folder}: every checkpoint is broken; move the folder away to start again")
        return None

    def _set_aside(self, steps: list[int]) -> None:
        for step in steps:
            aside = self._folder.parent / "checkpoints-broken" / str(step)
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            shutil.move(self._folder / str(step), aside)
            logging.warning("checkpoint %s: moved to %s", step, aside)
        self._manager.reload()


def newest_lora(workdir: Path) -> tuple[int, Any]:
    """(iteration, LoRA) of a run's newest checkpoint that is whole.

    Raises:
      InputError: the workdir holds none.
    """
    folder = (workdir / "checkpoints").absolute()
    steps = sorted((int(path.name) for path in folder.glob("*") if path.name.isdigit()), reverse=True)
    if not steps:
        raise InputError(f"{workdir}: no checkpoint there; wants the workdir of a run")
    for step in steps:
        try:
            return step, _read(folder / str(step))["lora"]
        except Exception as error:  # see Checkpoints.restore_newest
            logging.warning("checkpoint %s is broken (%s): passed over", step, _reason(error))
    raise InputError(f"{folder}: every checkpoint is broken")


def _read(folder: Path, like: Any = None) -> Any:
    """One checkpoint, whatever has become of its neighbours."""
    with ocp.StandardCheckpointer(multiprocessing_options=_FIRST_HOST) as reader:
        return reader.restore(folder / "default", like)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax from logging the traceback of every thread that an error met."""
    before = python_logging.root.manager.disable
    python_logging.disable(python_logging.CRITICAL)
    try:
        yield
    finally:
        python_logging.disable(before)


def _reason(error: Exception) -> str:
    """The first line of what it says, or what the system says of the disk."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
        if os.strerror(number) in str(error):
            return os.strerror(number)
    return f"{error}".strip().partition("\n")[0][:200] or type(error).__name__


def _shapes(tree: Any) -> list:
    return [(jax.tree_util.keystr(path), np.shape(x)) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
