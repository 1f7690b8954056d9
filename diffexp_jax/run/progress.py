"""What a run says of its progress on the terminal."""

from collections.abc import Iterator, Mapping

import numpy as np
from tqdm import tqdm

from diffexp_jax import parallel

_TIMED = 5  # iterations before the rest is estimated; the first one compiles


class Progress:
    """A bar over the iterations from `start` to `end`, which are what it yields."""

    def __init__(self, start: int, end: int):
        shown = {"initial": start, "total": end, "unit": "it", "desc": "fine-tuning"}
        self._bar = tqdm(range(start, end), disable=not parallel.is_first(), **shown)
        self._end, self._seconds = end, []

    def __iter__(self) -> Iterator[int]:
        return iter(self._bar)

    def show(self, iterations: int, values: Mapping[str, float]) -> None:
        """The metrics of the newest iteration, after so many; once, how long the rest will take."""
        self._bar.set_postfix_str(f"reward {values['reward/mean']:.3f}")
        self._seconds.append(values["time/sample"] + values["time/train"])
        if len(self._seconds) == _TIMED and iterations < self._end:
            self._bar.write(expected_time(self._seconds[1:], self._end - iterations))


def expected_time(seconds: list[float], iterations: int) -> str:
    """What the first iterations say of the rest."""
    each = float(np.mean(seconds))
    return (
        f"iterations take about {each:.1f} s on this machine: about {iterations * each / 60:.1f} minutes more for the "
        f"{iterations} that are left, besides evaluations"
    )
