"""How much a prompt's images differ, on features whose numbers are known."""

import numpy as np
import pytest

from diffexp_jax.rewards import diversity


def test_mean_pairwise_distance():
    """Of three vectors at 0, 90 and 180 degrees the pairs are 1, 1 and 2 apart, whatever their lengths."""
    assert diversity.mean_pairwise_distance(np.array([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])) == pytest.approx(4 / 3)
    assert diversity.mean_pairwise_distance(np.ones((4, 3))) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    "features, expected",
    [
        (np.ones((4, 3)), 1.0),
        (np.eye(4), 4.0),
        (np.array([[1.0, 0.0], [5.0, 0.0], [0.0, 1.0], [0.0, 7.0]]), 2.0),
        (np.array([[1.0, 0.0]]), 1.0),
        # K / 2 has the eigenvalues 0.8 and 0.2
        (np.array([[1.0, 0.0], [0.6, 0.8]]), 0.8**-0.8 * 0.2**-0.2),
    ],
)
def test_vendi_score(features, expected):
    assert diversity.vendi_score(features) == pytest.approx(expected)


def test_of_each_prompt():
    """Two images of each of two prompts: alike, and at right angles."""
    found = diversity.of_prompts(np.array([[1.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), 2)
    assert found["diversity/distance"] == pytest.approx([0.0, 1.0], abs=1e-12)
    assert found["diversity/vendi"] == pytest.approx([1.0, 2.0])


def test_where_there_is_nothing_to_compare():
    assert diversity.measures(None, 4) == {} and diversity.measures(("a", abs), 1) == {}
    assert diversity.measures(("a", abs), 2) == {diversity.FEATURES: abs}
