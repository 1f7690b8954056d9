"""metrics.jsonl: a line an iteration, always; TensorBoard and Weights & Biases on top where asked for."""

import contextlib
import errno
import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from diffexp_jax import parallel
from diffexp_jax.errors import InputError, first_line
from diffexp_jax.formats.files import replaced
from diffexp_jax.formats.json_text import parse_json
from diffexp_jax.limits import one_of
from diffexp_jax.run import optional

_RECENT = 100  # rows
_LONGEST = 2**20  # bytes of a line; a row has about a thousand
_TENSORBOARD, _WANDB = "TensorBoard (log.tensorboard)", "Weights & Biases (log.wandb)"


class MetricsWriter:
    """Appends rows to WORKDIR/metrics.jsonl, and sends them on; a context that closes what it opened.

    With a row goes the image grid of its iteration (`grid_path`), where one was drawn since this was made.

    Every host may make one: what is not the first's writes nothing.

    Args:
      tensorboard: also write its event files to WORKDIR/tensorboard.
      wandb: the run's settings where Weights & Biases is to have them too.

    Raises:
      InputError: wandb is asked for and not installed, or cannot begin; of a run that had begun there it is a warning.
    """

    def __init__(self, workdir: Path, *, tensorboard: bool = False, wandb: Mapping[str, Any] | None = None):
        self._workdir, self._path = workdir, workdir / "metrics.jsonl"
        self.recent: deque[dict[str, Any]] = deque(maxlen=_RECENT)  # the newest rows, for a checkpoint to keep too
        self._wants_tensorboard, self._tensorboard = tensorboard, None
        self._wandb = _start_wandb(workdir, wandb) if wandb is not None and parallel.is_first() else None
        self._grids = _times(workdir)  # of an earlier start, whose iterations may come again

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._tensorboard:
            optional.attempt(_TENSORBOARD, self._tensorboard.close)
        if self._wandb:
            optional.attempt(_WANDB, self._wandb.finish, exit_code=int(error is not None))

    def continue_from(self, iteration: int | None, known: Iterable[Mapping[str, Any]] = ()) -> None:
        """Drops the rows after the iteration that is continued from, lines that were cut short, and second ones.

        So the file reads as if nothing had happened. None: there is nothing to continue, every row goes. `known` are
        rows that the checkpoint has: they replace those of the file, which may be damaged, and what it has lost.
        """
        if not parallel.is_first():
            return
        last = -1 if iteration is None else iteration
        rows = {row["iteration"]: row for row in (*read_metrics(self._workdir), *filter(_is_row, known))}
        kept = {it: rows[it] for it in sorted(rows) if it <= last}
        missing = sorted(set(range(last + 1)) - kept.keys())
        if missing:
            logging.warning("%s: has no rows of the iterations %s", self._path, _as_ranges(missing))
        with replaced(self._path) as partial, open(partial, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept.values())
            file.flush()
            os.fsync(file.fileno())
        self.recent.extend(kept.values())
        if self._wants_tensorboard:
            folder = self._workdir / "tensorboard"
            self._tensorboard = optional.attempt(_TENSORBOARD, _TensorBoard, folder, last + 1)

    def write(self, iteration: int, values: Mapping[str, Any]) -> None:
        """Adds a row. It is on the disk when this returns: before any checkpoint that follows it.

        Raises:
          OSError: it could not be written, and nothing of it is left. What it is sent on to may fail without.
        """
        if not parallel.is_first():
            return
        row = {"iteration": iteration} | {k: v if isinstance(v, int) else float(v) for k, v in values.items()}
        _append(self._path, (json.dumps(row) + "\n").encode())
        self.recent.append(row)
        finite = {name: x for name, x in row.items() if name != "iteration" and math.isfinite(x)}
        grid = self._new_grid(iteration) if self._tensorboard or self._wandb else None
        if self._tensorboard:
            optional.attempt(_TENSORBOARD, self._tensorboard.write, iteration, finite, grid)
        if self._wandb:
            optional.attempt(_WANDB, self._send_to_wandb, iteration, finite, grid)

    def _send_to_wandb(self, iteration: int, values: Mapping[str, float], grid: Image.Image | None) -> None:
        self._wandb.log({**values} | ({} if grid is None else {"images": _wandb_image(grid)}), step=iteration)

    def _new_grid(self, iteration: int) -> Image.Image | None:
        """The image grid of this iteration, if there is one that this program drew; a damaged one is passed over."""
        path = grid_path(self._workdir, iteration)
        try:
            if path.stat().st_mtime_ns == self._grids.get(path.name):
                return None
            with Image.open(path, formats=("PNG",)) as picture:
                return picture.convert("RGB")
        except FileNotFoundError:
            return None
        except Exception as error:  # Pillow raises many types; no picture is worth the end of a run
            logging.warning("%s: goes to no logger (%s)", path, error)
            return None


def grid_path(workdir: Path, iteration: int) -> Path:
    """The file of a run's image grid after this iteration."""
    return workdir / "images" / f"{iteration:06d}.png"


def _times(workdir: Path) -> dict[str, int]:
    """{name: when it was written} of the grids that are there."""
    with contextlib.suppress(OSError):
        return {path.name: path.stat().st_mtime_ns for path in grid_path(workdir, 0).parent.glob("*.png")}
    return {}


def _wandb_image(picture: Image.Image) -> Any:
    import wandb

    return wandb.Image(picture)


def check_finite(iteration: int, values: Mapping[str, float], workdir: Path) -> None:
    """Raises FloatingPointError where an iteration's loss, gradient or LoRA is not finite."""
    loss, gradient, lora = (values[name] for name in ("loss", "grad_norm", "lora_norm"))
    if not all(map(math.isfinite, (loss, gradient, lora))):
        raise FloatingPointError(
            f"iteration {iteration}: loss {loss}, norm of the gradient {gradient}, of the LoRA {lora}: stopped; the "
            f"last checkpoint is untouched in {workdir / 'checkpoints'}"
        )


def _append(path: Path, line: bytes) -> None:
    """Adds the line to a file, all of it or nothing: one write, taken back where the disk is full."""
    try:
        with open(path, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise OSError(
            f"{path}: cannot be written ({error.strerror}); the last checkpoint is untouched, and the same command "
            "continues from it"
        ) from None


class _TensorBoard:
    """TensorBoard's event files, written here and now: a thread of tensorboardX would die of a full disk, and whoever
    has more to write would wait for it.

    Args:
      step: what the folder holds of this step and later ones is hidden.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step)
        self._events = self._writer.file_writer.event_writer
        self._events._worker.stop()
        self._events.add_event = self._events._ev_writer.write_event

    def write(self, iteration: int, values: Mapping[str, float], grid: Image.Image | None) -> None:
        """A row, and the image grid of then."""
        self._try(lambda: [self._writer.add_scalar(name, value, iteration) for name, value in values.items()])
        if grid is not None:
            self._try(lambda: self._writer.add_image("images", np.asarray(grid), iteration, dataformats="HWC"))
        self._try(self._writer.flush)

    def close(self) -> None:
        self._try(self._writer.close)

    def _try(self, work: Callable[[], Any]) -> None:
        """Writes; after a failure nothing more, where tensorboardX would print a traceback at the program's end."""
        if self._events._closed:
            return
        try:
            work()
        except Exception:
            self._events._closed = True
            raise


def _start_wandb(workdir: Path, config: Mapping[str, Any]) -> Any:
    """A run of Weights & Biases; one that is continued has the id that it had before (WORKDIR/wandb-id.txt)."""
    path = workdir / "wandb-id.txt"
    if not path.exists():
        name = os.urandom(4).hex()
        run = _wandb_run(workdir, name, config)
        optional.attempt(_WANDB, path.write_text, f"{name}\n")
        return run
    begun = path.read_bytes()[:100].decode("ascii", "replace").strip()
    if not re.fullmatch(r"[\w-]{1,64}", begun):
        logging.warning("%s: is damaged; Weights & Biases has another run from here on", path)
        path.unlink()
        return optional.attempt(_WANDB, _start_wandb, workdir, config)
    return optional.attempt(_WANDB, _wandb_run, workdir, begun, config)


def _wandb_run(workdir: Path, name: str, config: Mapping[str, Any]) -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb
    except ImportError:
        raise InputError("log.wandb=true: wandb is not installed; pip install wandb") from None
    try:
        return wandb.init(
            project="diffexp_jax",
            name=workdir.name,
            id=name,
            resume="allow",
            dir=str(workdir),
            config=dict(config),
            settings=wandb.Settings(console="off"),
        )
    except Exception as error:  # of many types: no login, no network
        raise InputError(
            f"log.wandb=true: {first_line(error)}; log in (wandb login) or set WANDB_MODE=offline"
        ) from None


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows of WORKDIR/metrics.jsonl by their iterations, the last of each; none where the file is missing.

    What is no row is left out: cut short by a kill, or damaged.
    """
    path, rows = workdir / "metrics.jsonl", {}
    if path.exists():
        with open(path, "rb") as file:
            while line := file.readline(_LONGEST):
                with contextlib.suppress(ValueError):
                    row = parse_json(line.decode("utf-8"), finite=False)
                    if len(line) < _LONGEST and _is_row(row):
                        rows[row["iteration"]] = row
    return [rows[it] for it in sorted(rows)]


def _is_row(row: Any) -> bool:
    """Whether a run writes such a row: an iteration from 0 on, and numbers by name."""
    if not isinstance(row, dict) or not all(type(value) in (int, float) for value in row.values()):
        return False
    iteration = row.get("iteration")
    return isinstance(iteration, int) and iteration >= 0


def _as_ranges(numbers: Iterable[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ranges)


def score_of(values: Mapping[str, Any], best: str) -> float | None:
    """What checkpoint.best ranks a checkpoint by, of a row of the metrics; None where the row does not have it.

    Raises:
      InputError: it is the mean of an evaluation, and the row has others.
    """
    evaluated = [name for name in values if name.startswith("eval/")]
    if evaluated and best.startswith("eval/"):
        one_of("checkpoint.best", best, evaluated)
    return values.get(best)
