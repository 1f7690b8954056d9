"""metrics.jsonl: a line an iteration, always; TensorBoard on top where asked for."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsWriter:
    """Appends rows to WORKDIR/metrics.jsonl.

    A continued run first drops the rows after the iteration it continues from, and a last line that a kill cut short,
    so that the file reads as if nothing had happened.
    """

    def __init__(self, workdir: Path, *, start: int, tensorboard: bool = False):
        self._path = workdir / "metrics.jsonl"
        kept = [row for row in read_metrics(workdir) if row["iteration"] <= start]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(self._path)
        self._tensorboard = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

    def write(self, iteration: int, values: Mapping[str, Any]) -> None:
        row = {"iteration": iteration} | {k: v if isinstance(v, int) else float(v) for k, v in values.items()}
        with open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if self._tensorboard:
            for name, value in row.items():
                if name != "iteration" and math.isfinite(value):
                    self._tensorboard.add_scalar(name, value, iteration)
            self._tensorboard.flush()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows of WORKDIR/metrics.jsonl, in order; none where the file is missing. A line cut short is left out."""
    path, rows = workdir / "metrics.jsonl", []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows
