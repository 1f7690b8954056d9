"""Checkpoints of a run: everything that the next iteration depends on, written whole or not at all, and checked.

A subfolder of WORKDIR/checkpoints for each: the arrays in `default/`, as orbax writes them, and in `contents/` the
checksum of each (a flipped bit is not always an error of the format), the newest rows of the metrics, and what the
checkpoint is ranked by, with a checksum of all this.
"""

import contextlib
import math
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from diffexp_jax import parallel
from diffexp_jax.algorithms.state import tuned_lora
from diffexp_jax.errors import InputError
from diffexp_jax.run import orbax_errors
from diffexp_jax.run.checksums import checksums, contents_of, read_contents, steps_in
from diffexp_jax.run.lease import LOCK

NEWEST, BEST = "newest", "best"  # which checkpoint, besides the number of an iteration
# Every host has the whole state, so one is enough to write it, and to read it for all (`parallel.from_first`): the
# others need not see the folder.
_FIRST_HOST = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})


class Checkpoints:
    """The folder WORKDIR/checkpoints; a context that closes it.

    Writes run beside the iterations, one at a time. What was handed over is copied first: the next update reuses the
    memory of its state. Every host may make one: what is not the first's does nothing.

    Args:
      keep: so many of the newest are kept, and besides them the one with the largest score.
    """

    def __init__(self, workdir: Path, *, keep: int):
        self._folder = (workdir / "checkpoints").absolute()
        self._is_first = parallel.is_first()
        if not self._is_first:
            return
        self._is_claimed = (self._folder.parent / LOCK).exists()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._clear_partials("*")
        self._scores = _scores(self._folder)
        self._held: dict[str, Any] | None = None
        self._writing: int | None = None
        self._lock = threading.RLock()  # a run that is stopped within an iteration saves from another thread
        orbax_errors.quiet()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(keep, self._scores), create=False, multiprocessing_options=_FIRST_HOST
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *error: Any) -> None:
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():  # the first error is said
            self.close()

    def close(self) -> None:
        """Waits for the last write. Raises OSError where it failed."""
        if not self._is_first:
            return
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # said already
                self._manager.close()

    def save(
        self, iteration: int, state: Any, *, rows: Iterable[Mapping[str, Any]] = (), score: float | None = None
    ) -> None:
        """Begins to write `state` (host arrays) under a temporary name that is changed at the end: a kill leaves the
        older ones. Nothing happens where the newest one is of this iteration or a later one.

        Args:
          rows: of the metrics, up to this iteration, see `rows_of`.
          score: the checkpoint with the largest one is kept, see `Checkpoints`.

        Raises:
          OSError: it, or the one before, could not be written (the disk is full, say); the older ones are untouched.
        """
        if not self._is_first:
            return
        with self._lock:
            self.wait()
            if iteration <= max(self._manager.all_steps(), default=-1):
                return
            if not self._folder.is_dir() or self._is_gone():  # orbax would make it anew
                raise OSError(f"{self._folder}: is gone; nothing was saved of iteration {iteration}")
            state = jax.tree.map(np.array, state)
            if _ranks(score):
                self._scores[iteration] = score
            contents = contents_of(state, score=score, rows=rows)
            args = ocp.args.Composite(default=ocp.args.StandardSave(state), contents=ocp.args.JsonSave(contents))
            self._writing = iteration
            try:
                orbax_errors.in_daemon_threads(lambda: self._manager.save(iteration, args=args))
            except Exception as error:
                self._failed(error)

    def is_best(self, score: float | None) -> bool:
        """Whether no checkpoint has as large a score."""
        return self._is_first and _ranks(score) and score > max(self._scores.values(), default=-math.inf)

    def hold(self, iteration: int, state: Any, *, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """Keeps `state` (host arrays), not written yet, for `save_held`: the update that comes ends the device's."""
        self._held = {"iteration": iteration, "state": state, "rows": list(rows)}

    def save_held(self) -> None:
        """Writes what `hold` was given last, and waits until it is there. Raises OSError as `save`."""
        if self._is_first and self._held is not None:
            self.save(**self._held)
        self.wait()

    def check(self) -> None:
        """Raises OSError where the write that went on beside the iterations has failed."""
        if self._is_first and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is written. Raises OSError as `save`."""
        if not self._is_first:
            return
        with self._lock:
            try:
                self._manager.wait_until_finished()
                if self._writing is not None and self._is_gone():
                    shutil.rmtree(self._folder / str(self._writing), ignore_errors=True)
                    raise OSError("the workdir is gone")
                self._writing = None
            except Exception as error:
                self._failed(error)

    def _is_gone(self) -> bool:
        """Whether the run's workdir was removed or renamed: its lock went with it. (orbax may have made another.)"""
        return self._is_claimed and not (self._folder.parent / LOCK).exists()

    def _failed(self, error: Exception) -> None:
        """orbax and tensorstore raise many types for one full disk: here they are one."""
        iteration, self._writing = self._writing, None
        self._scores.pop(iteration, None)
        self._clear_partials(str(iteration))
        for folder in (self._folder, self._folder.parent):  # tensorstore makes folders that are gone anew
            with contextlib.suppress(OSError):
                folder.rmdir()
        reason = orbax_errors.reason(error)
        raise OSError(
            f"{self._folder}: the checkpoint of iteration {iteration} could not be written ({reason}); the older "
            "ones are untouched, and the same command continues from them"
        ) from None

    def _clear_partials(self, iteration: str) -> None:
        """Removes what a write has left that failed or was killed; `iteration` may be "*"."""
        for partial in self._folder.glob(f"{iteration}.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)

    def restore_newest(self, like: Any) -> tuple[int, Any] | None:
        """(iteration, state) of the newest checkpoint that is whole, None where there is none yet.

        Broken ones that are newer are moved to WORKDIR/checkpoints-broken/ITERATION, with a warning.

        Raises:
          InputError: there are checkpoints, and none of them is whole.
        """
        self.wait()
        broken = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = _read(self._folder / str(step), like)
                if _shapes(state) != _shapes(like):
                    raise InputError("its arrays have other shapes")
            except Exception as error:  # whatever a damaged file raises, an older one may still be whole
                broken.append(step)
                logging.warning("checkpoint %s is broken (%s)", step, orbax_errors.reason(error))
            else:
                self._set_aside(broken)
                return step, state
        if broken:
            raise InputError(f"{self._folder}: every checkpoint is broken; move the folder away to start again")
        return None

    def rows_of(self, iteration: int | None) -> list[dict[str, Any]]:
        """The rows of the metrics that a checkpoint holds; none of an older version's, nor of None."""
        return read_contents(self._folder / str(iteration)).get("rows", [])

    def _set_aside(self, steps: Sequence[int]) -> None:
        for step in steps:
            aside = self._folder.parent / "checkpoints-broken" / str(step)
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            shutil.move(self._folder / str(step), aside)
            self._scores.pop(step, None)
            logging.warning("checkpoint %s: moved to %s", step, aside)
        self._manager.reload()


class _NewestAndBest:
    """An orbax PreservationPolicy: the newest ones, and the one with the largest score.

    orbax's own BestN needs its metrics files, and a damaged one of them keeps it from opening the folder.
    """

    def __init__(self, newest: int, scores: Mapping[int, float]):
        self._newest, self._scores = newest, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]
        best = max((step for step in steps if step in self._scores), key=self._scores.get, default=None)
        return [step == best or step in steps[-self._newest :] for step in steps]


# ------------------------------------------------------------------------------------------------------------- reading


def read_lora(workdir: Path, which: str = NEWEST) -> tuple[int, Any]:
    """(iteration, LoRA) of a run's newest or best checkpoint that is whole, or of that after `which` iterations.

    Raises:
      InputError: the workdir holds no such one, or only broken ones.
    """
    folder = (workdir / "checkpoints").absolute()
    steps = sorted(steps_in(folder), reverse=True)
    if not steps:
        raise InputError(f"{workdir}: no checkpoint there; wants the workdir of a run")
    chosen = steps
    if which == BEST:
        scores = _scores(folder)
        if not scores:
            raise InputError(f"{workdir}: no checkpoint has a score; wants a run with checkpoint.best")
        chosen = sorted(scores, key=scores.get, reverse=True)
    elif which != NEWEST:
        chosen = [step for step in steps if str(step) == which]
        if not chosen:
            there = ", ".join(map(str, reversed(steps)))
            raise InputError(f"{workdir}: no checkpoint {which!r}; accepted: {NEWEST}, {BEST}, {there}")
    for step in chosen:
        try:
            return step, tuned_lora(_read(folder / str(step)))
        except Exception as error:  # see Checkpoints.restore_newest
            logging.warning("checkpoint %s is broken (%s): passed over", step, orbax_errors.reason(error))
    raise InputError(f"{folder}: every checkpoint that could be used is broken")


def _read(folder: Path, like: Any = None) -> Any:
    """One checkpoint, whatever has become of its neighbours.

    Raises:
      InputError: arrays are not what was written. (A damaged file raises much else.)
    """
    orbax_errors.hide_closed_loops()
    with ocp.StandardCheckpointer(multiprocessing_options=_FIRST_HOST) as reader:
        state = reader.restore(folder / "default", like)
    written, found = read_contents(folder).get("crc32"), checksums(state)
    if written is None:
        logging.warning("checkpoint %s: has no checksums, of an older version; not checked", folder.name)
        return state
    if like is None or found.keys() == written.keys():
        changed = [name for name in written if found.get(name) != written[name]]
        if changed:
            raise InputError(f"{len(changed)} of its arrays are not what was written: {changed[0]}")
    return state


def _scores(folder: Path) -> dict[int, float]:
    """What checkpoints are ranked by, of those that say it."""
    found = {}
    for step in steps_in(folder):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # damaged, or it has none
            found[step] = float(read_contents(folder / str(step))["score"])
    return {step: score for step, score in found.items() if _ranks(score)}


def _ranks(score: float | None) -> bool:
    """Whether a checkpoint is ranked by it: NaN and infinity are no scores."""
    return score is not None and math.isfinite(score)


def _shapes(tree: Any) -> list:
    return [(jax.tree_util.keystr(path), np.shape(x)) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
