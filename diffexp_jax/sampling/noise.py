"""Which of a chain's steps add noise, and by which rule."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from diffexp_jax.sampling.flow import CLEAN_ENDS

ALL = (0, 1000)  # of the steps that there may be


class Noise(NamedTuple):
    """What the settings of sampling say of noise, but for its strength (eta). Steps count from 0, noise first.

    Where there is a `window`, an iteration adds noise at so many consecutive ones of `steps`, the others are
    deterministic: MixGRPO (Li et al. 2025, arXiv 2507.21802) and Flow-GRPO-Fast learn from these alone.
    """

    kind: str = "sde"  # one of flow.NOISES
    steps: tuple[int, int] = ALL  # (first, end)
    window: int = 0  # 0: all of these

    def possible(self, n_steps: int) -> range:
        """The steps of a chain that may add noise. Those that end at none (CLEAN_ENDS) leave out the last."""
        first, end = self.steps
        return range(first, max(first, min(end, n_steps - (self.kind in CLEAN_ENDS))))

    def n_noisy(self, n_steps: int) -> int:
        """How many steps of a chain add noise."""
        possible = len(self.possible(n_steps))
        return min(self.window or possible, possible)

    def starts(self, n_steps: int) -> range:
        """The steps that may be the first to add noise."""
        possible = self.possible(n_steps)
        return range(possible.start, possible.start + len(possible) - self.n_noisy(n_steps) + 1)

    def confined(self, n_steps: int) -> bool:
        """Whether the steps with noise may begin later than the chain."""
        return self.starts(n_steps) != range(1)

    def spread(self, n_steps: int, n: int) -> "Noise":
        """This rule for n steps in place of n_steps: the same share of the chain may add noise, and does."""
        first, end = (round(step * n / n_steps) for step in (self.steps[0], min(self.steps[1], n_steps)))
        return self._replace(steps=(first, end), window=self.window and max(round(self.window * n / n_steps), 1))

    def strengths(self, eta: float, n_steps: int, start: int | None = None) -> Float[np.ndarray, "T"]:
        """eta of each step; those with noise begin with step `start`, None: as early as they may."""
        start = self.starts(n_steps).start if start is None else start
        step = np.arange(n_steps)
        return np.where((start <= step) & (step < start + self.n_noisy(n_steps)), eta, 0.0)
