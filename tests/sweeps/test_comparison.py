"""Comparisons over seeds, on curves and numbers whose results are known."""

import numpy as np
import pytest

from diffexp_jax.sweeps import comparison
from diffexp_jax.sweeps.comparison import Estimate, queries_to_reach

X = [0, 100, 200, 300]


@pytest.mark.parametrize(
    "y, level, expected",
    [
        ([0.0, 1.0, 2.0, 3.0], 1.5, 150.0),
        ([0.0, 1.0, 2.0, 3.0], 2.0, 200.0),
        ([0.0, 1.0, 2.0, 3.0], 3.0, 300.0),
        ([0.0, 1.0, 2.0, 3.0], 3.1, None),
        ([2.0, 1.0, 3.0, 4.0], 1.5, 0.0),  # it begins above the level
        ([0.0, 4.0, 1.0, 4.0], 2.0, 50.0),  # the first time counts
        ([0.0, -1.0, 1.0, 1.0], 1.0, 200.0),
        ([-2.0, -1.5, -1.0, -0.5], -1.25, 150.0),
    ],
)
def test_queries_to_reach(y, level, expected):
    assert queries_to_reach(X, y, level) == (None if expected is None else pytest.approx(expected))


def test_levels():
    assert comparison.final_level([1.0, 5.0, 3.0]) == 3.0
    assert comparison.gain_level([1.0, 5.0, 3.0]) == pytest.approx(2.8)
    assert comparison.gain_level([1.0, 3.0], share=0.5) == pytest.approx(2.0)


@pytest.mark.parametrize("n, expected", [(1, [9.0, 1.0, 2.0, 4.0, 6.0]), (2, [1.5, 5.0]), (5, [4.4]), (6, [])])
def test_block_means(n, expected):
    """What fills no block is left out at the beginning: a curve's end matters."""
    assert comparison.block_means([9.0, 1.0, 2.0, 4.0, 6.0], n) == pytest.approx(expected)


def test_mean_over_seeds():
    """Of 0 and 1 a draw's mean is 0, 0.5 or 1 in 1/4, 1/2 and 1/4 of the cases."""
    assert comparison.mean_over_seeds([0.0, 1.0]) == Estimate(0.5, 0.0, 1.0)
    assert comparison.mean_over_seeds([2.0]) == Estimate(2.0, None, None)
    assert comparison.mean_over_seeds([2.0, 2.0, 2.0]) == Estimate(2.0, 2.0, 2.0)
    assert comparison.mean_over_seeds([5.0, 1.0, 3.0]) == comparison.mean_over_seeds([5.0, 1.0, 3.0])


def test_the_interval_of_many_seeds_is_the_normal_one():
    x = np.random.default_rng(1).normal(size=400)
    mean, low, high = comparison.mean_over_seeds(x)
    half = 1.96 * x.std() / 20
    assert (mean - low, high - mean) == (pytest.approx(half, rel=0.05), pytest.approx(half, rel=0.05))


@pytest.mark.parametrize("n, covers", [(3, 0.75), (5, 0.83)])
def test_intervals_of_few_seeds_are_too_narrow(n, covers):
    """How often one holds the true mean, as docs/evidence/results/index.md says; of three it is their range."""
    runs = np.random.default_rng(0).normal(size=(2000, n))
    estimates = [comparison.mean_over_seeds(x) for x in runs]
    if n == 3:
        np.testing.assert_allclose([(x.low, x.high) for x in estimates], [(x.min(), x.max()) for x in runs])
    assert np.mean([x.low <= 0 <= x.high for x in estimates]) == pytest.approx(covers, abs=0.03)


def test_ratio_over_seeds():
    """Pairs stay together: seed by seed the ratio is 1/2, so it is in every draw."""
    ratio = comparison.ratio_over_seeds([50, 100, 400], [100, 200, 800])
    assert ratio == (pytest.approx(0.5), pytest.approx(0.5), pytest.approx(0.5))
    assert comparison.ratio_over_seeds([100, 300], [100, 100]) == Estimate(2.0, 1.0, 3.0)
    assert comparison.ratio_over_seeds([100, 300], [0, 0]) is None
    assert comparison.ratio_over_seeds([100], [200]) == Estimate(0.5, None, None)


def test_ratio_to_baseline():
    """Seed 0: 3 is reached at 150 of the baseline's 300. Seed 1: never, which counts as 300 of 300."""
    theirs = [(X, [0.0, 1.0, 2.0, 3.0]), (X, [0.0, 2.0, 4.0, 6.0])]
    ours = [(X, [0.0, 2.0, 4.0, 4.0]), (X, [0.0, 1.0, 2.0, 3.0])]
    found = comparison.ratio_to_baseline(ours, theirs, comparison.final_level)
    assert (found.ratio, found.reached, found.seeds) == (Estimate(0.75, 0.5, 1.0), 1, 2)
    same = comparison.ratio_to_baseline(theirs, theirs, comparison.gain_level)
    assert same == comparison.Ratio(Estimate(1.0, 1.0, 1.0), 2, 2)


def test_no_ratio_to_a_baseline_that_gains_nothing():
    flat = [(X, [1.0, 1.0, 0.5, 0.5])]
    assert comparison.ratio_to_baseline(flat, flat, comparison.final_level) == comparison.Ratio(None, 0, 0)
    rises = [(X, [0.0, 1.0, 2.0, 3.0])]
    both = comparison.ratio_to_baseline(flat + rises, flat + rises, comparison.final_level)
    assert both == comparison.Ratio(Estimate(1.0, None, None), 1, 1)


def test_gain_by_base_share():
    """The bin of 0 is of prompts that never succeed; a bin has its upper end; empty ones are left out."""
    base = np.array([0.0, 0.0, 0.1, 0.2, 0.3, 1.0])
    baseline = np.array([[0.0, 0.0, 0.5, 0.5, 0.5, 1.0], [0.0, 0.2, 0.5, 0.5, 0.7, 1.0]])
    arm = baseline + np.array([[0.4, 0.2, 0.1, 0.0, 0.2, 0.0], [0.0, 0.2, -0.1, 0.0, 0.0, 0.0]])
    bins = comparison.gain_by_base_share(base, baseline, arm)
    assert [(b.above, b.upto, b.prompts) for b in bins] == [(None, 0.0, 2), (0.0, 0.1, 1), (0.1, 0.3, 2), (0.6, 1.0, 1)]
    assert [b.base for b in bins] == pytest.approx([0.0, 0.1, 0.25, 1.0])
    assert [b.gain.mean for b in bins] == pytest.approx([0.2, 0.0, 0.05, 0.0])
    assert bins[0].gain == (pytest.approx(0.2), pytest.approx(0.1), pytest.approx(0.3))
    assert bins[0].baseline.mean == pytest.approx(0.05) and bins[0].arm.mean == pytest.approx(0.25)
