"""What a run says of its progress on the terminal."""

from collections.abc import Iterator, Mapping

import numpy as np
from tqdm import tqdm

from diffexp_jax import parallel

_TIMED = 5  # iterations before the rest is estimated; the first one compiles


class Progress:
    """A bar over the iterations from `start` to `end`, which are what it yields; it moves when `show` is called."""

    def __init__(self, start: int, end: int):
        # tqdm's own estimate would take the first iteration, which compiles, for all
        shown = {"bar_format": "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]", "desc": "fine-tuning"}
        self._bar = tqdm(initial=start, total=end, disable=not parallel.is_first(), **shown)
        self._start, self._end, self._seconds = start, end, []

    def __iter__(self) -> Iterator[int]:
        with self._bar:
            yield from range(self._start, self._end)

    def show(self, iterations: int, values: Mapping[str, float]) -> None:
        """The metrics of the newest iteration, after so many; once, how long the rest will take."""
        self._seconds.append(values["time/sample"] + values["time/train"])
        usual = self._seconds[1:]
        each = f", {np.mean(usual):.1f} s an iteration" if usual else ""
        self._bar.set_postfix_str(f"reward {values['reward/mean']:.3f}{each}", refresh=False)
        self._bar.update(iterations - self._bar.n)
        if len(self._seconds) == _TIMED and iterations < self._end:
            self._bar.write(expected_time(usual, self._end - iterations))


def expected_time(seconds: list[float], iterations: int) -> str:
    """What the first iterations say of the rest."""
    each = float(np.mean(seconds))
    return (
        f"iterations take about {each:.1f} s on this machine: about {iterations * each / 60:.1f} minutes more for the "
        f"{iterations} that are left, besides evaluations"
    )
