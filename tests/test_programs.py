"""What the compiled programs of a run add to a method's own."""

from functools import partial

import numpy as np
import pytest

from diffexp_jax import parallel
from diffexp_jax.programs import group_metrics


def test_group_metrics():
    """Of three groups of three, one has equal rewards; a judge, a part of the sum, finds a success in two."""
    rewards = np.array([[0.1, 0.1, 0.1, 1.0, 1.0, 5.5, -3.0, 0.0, 3.0]], np.float32)
    judged = np.array([[0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]], np.float32)
    found = parallel.first(parallel.pmap(partial(group_metrics, group=3))(rewards, {"judge": judged}))
    assert float(found["reward/judge/best_in_group"]) == pytest.approx(2 / 3)
    assert float(found["reward/equal_groups"]) == pytest.approx(1 / 3)
    assert float(found["reward/best_in_group"]) == pytest.approx((0.1 + 5.5 + 3.0) / 3, rel=1e-6)
    spread = np.std([1.0, 1.0, 5.5]) + np.std([-3.0, 0.0, 3.0])
    assert float(found["reward/std_in_group"]) == pytest.approx(spread / 3, rel=1e-6)
