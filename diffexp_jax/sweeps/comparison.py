"""Runs compared over seeds: means with bootstrap intervals, queries to reach a level, gains by the base model's share.

Plain numpy. Values come in the order of the seeds; two arms of the same seed saw the same prompts and noise, so what
compares arms resamples pairs of runs.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

DRAWS = 10_000  # of the bootstrap
LEVEL = 95.0  # percent of the draws that an interval covers
SHARES = (0.0, 0.1, 0.3, 0.6, 1.0)  # upper ends of the bins of the base model's share

Values = Sequence[float] | Float[np.ndarray, "S"]  # one for each seed


class Estimate(NamedTuple):
    """A mean over seeds, and its interval; a single seed has none."""

    mean: float
    low: float | None
    high: float | None


class Reach(NamedTuple):
    """How much of x it took to reach a level."""

    x: float  # where it was not reached all of x, which is less than it would take
    reached: bool


class Ratio(NamedTuple):
    """How much of x an arm takes to reach levels of the baseline, relative to the baseline."""

    ratio: Estimate | None  # None where no baseline gains anything
    reached: int  # seeds whose run of the arm reached the level; the ratio is a lower bound if that is not all
    seeds: int  # whose baseline gains something


def resampled(n_seeds: int) -> Int[np.ndarray, "D S"]:
    """The seeds of every draw of the bootstrap, the same each time."""
    return np.random.default_rng(0).integers(0, n_seeds, (DRAWS, n_seeds))


def interval(draws: Float[np.ndarray, "D"], n_seeds: int) -> tuple[float | None, float | None]:
    """The percentile interval of a statistic's draws."""
    if n_seeds < 2:
        return None, None
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def mean_over_seeds(values: Values) -> Estimate:
    """The mean, and the percentile bootstrap's interval over seeds."""
    x = np.asarray(values, float)
    return Estimate(float(x.mean()), *interval(x[resampled(len(x))].mean(1), len(x)))


def ratio_over_seeds(ours: Values, theirs: Values) -> Estimate | None:
    """sum(ours) / sum(theirs) with its interval over pairs; None where theirs are all zero."""
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    if not b.sum() > 0:
        return None
    rows = resampled(len(a))
    below = b[rows].sum(1)
    draws = a[rows].sum(1)[below > 0] / below[below > 0]
    return Estimate(float(a.sum() / b.sum()), *interval(draws, len(a)))


# --------------------------------------------------------------------------------------------------------------- curves


def block_means(values: Sequence[float], n: int) -> list[float]:
    """Means of n values in a row; those at the beginning that fill no block are left out."""
    first = len(values) % n
    return np.asarray(values, float)[first:].reshape(-1, n).mean(1).tolist()


def queries_to_reach(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """The first x at which the curve, straight between its points, is at the level or above; None: it never is."""
    for i, value in enumerate(y):
        if value >= level:
            if i == 0:
                return float(x[0])
            share = (level - y[i - 1]) / (value - y[i - 1])
            return float(x[i - 1] + share * (x[i] - x[i - 1]))
    return None


def final_level(y: Sequence[float]) -> float:
    """What the curve ends at."""
    return y[-1]


def gain_level(y: Sequence[float], share: float = 0.9) -> float:
    """The level at which a curve has gained this share of what it gains from its first point to its last."""
    return y[0] + share * (y[-1] - y[0])


def reach(x: Sequence[float], y: Sequence[float], level: float) -> Reach:
    """`queries_to_reach`; a curve that never is there counts with all of its x (it is censored)."""
    found = queries_to_reach(x, y, level)
    return Reach(float(x[-1]) if found is None else found, found is not None)


def ratio_to_baseline(
    ours: Sequence[tuple[Sequence[float], Sequence[float]]],
    theirs: Sequence[tuple[Sequence[float], Sequence[float]]],
    level_of: Callable[[Sequence[float]], float],
) -> Ratio:
    """How much of x it takes to reach the baseline's level, relative to the baseline itself, over pairs of curves.

    Only pairs whose baseline gains something: where it ends no higher than it begins there is nothing to reach.

    Args:
      ours, theirs: the arm's and the baseline's curve (x, y) of each seed.
      level_of: a baseline's y -> the level that both of its pair are to reach.
    """
    levels = [level_of(y) for _, y in theirs]
    compared = [(a, b, level) for a, b, level in zip(ours, theirs, levels, strict=True) if level > b[1][0]]
    pairs = [(reach(*a, level), reach(*b, level)) for a, b, level in compared]
    ratio = ratio_over_seeds([a.x for a, _ in pairs], [b.x for _, b in pairs]) if pairs else None
    return Ratio(ratio, sum(a.reached for a, _ in pairs), len(pairs))


# --------------------------------------------------------------------------------------------------- gain by base share


class Bin(NamedTuple):
    """Prompts with which the base model succeeds about as often, and what became of them."""

    above: float | None  # the share is more than that; None: the first bin, of prompts that never succeed
    upto: float
    prompts: int
    base: float  # mean share of the base model
    baseline: Estimate
    arm: Estimate
    gain: Estimate  # arm minus baseline, over pairs


def gain_by_base_share(
    base: Float[np.ndarray, "P"], baseline: Float[np.ndarray, "S P"], arm: Float[np.ndarray, "S P"]
) -> list[Bin]:
    """An arm's gain over the baseline, by how often the base model succeeds with a prompt; empty bins are left out.

    Args:
      base: the base model's share of successes with each prompt.
      baseline, arm: the same of each seed's final models.
    """
    bins = []
    for above, upto, rows in prompts_by_base_share(base):
        theirs, ours = baseline[:, rows].mean(1), arm[:, rows].mean(1)
        estimates = [mean_over_seeds(x) for x in (theirs, ours, ours - theirs)]
        bins.append(Bin(above, upto, int(rows.sum()), float(base[rows].mean()), *estimates))
    return bins


def prompts_by_base_share(
    base: Float[np.ndarray, "P"],
) -> Iterator[tuple[float | None, float, Bool[np.ndarray, "P"]]]:
    """(above, upto, which prompts those are) of every bin that has any, see `Bin`."""
    for i, upto in enumerate(SHARES):
        above = SHARES[i - 1] if i else None
        rows = base == upto if above is None else (base > above) & (base <= upto)
        if rows.any():
            yield above, upto, rows
