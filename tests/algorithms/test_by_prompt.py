"""Advantages and weights of a prompt's images, on literal numbers and against the plain loops that authors publish."""

import numpy as np
import pytest

from diffexp_jax import parallel
from diffexp_jax.algorithms import by_prompt
from diffexp_jax.algorithms.rwr import effective_share, weights

REWARDS = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], np.float32)
IDS = np.array([0, 1, 0, 2, 1, 0])  # "a", "b", "a", "c", "b", "a"
SAME = by_prompt.of_one_prompt(IDS, IDS)
PLAIN = dict(weighting="exponential", temperature=5.0, quantile=0.9, per_prompt=True, standardised=False)


@pytest.mark.parametrize(
    "global_std, expected",
    [
        # what DiffusionNFT's PerPromptStatTracker says of its own example
        (True, [-1.36618, -0.878259, -0.195169, 0.0, 0.878259, 1.561349]),
        (False, [-1.135494, -0.999933, -0.162214, 0.0, 0.999933, 1.297707]),
    ],
)
def test_advantages_are_the_authors(global_std, expected):
    found = by_prompt.advantages(REWARDS, SAME, REWARDS, global_std=global_std)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_share_of_the_samples_is_compared_with_all():
    whole = by_prompt.advantages(REWARDS, SAME, REWARDS, global_std=True)
    own = by_prompt.advantages(REWARDS[2:4], by_prompt.of_one_prompt(IDS[2:4], IDS), REWARDS, global_std=True)
    np.testing.assert_array_equal(own, whole[2:4])


@pytest.mark.parametrize("temperature", [1e-3, 0.2, 5.0, 1e6])
@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_exponential_weights_are_a_softmax_of_each_prompt(temperature, shift):
    """As jannerm/ddpo's: softmax(r / temperature) times the number of images; no reward overflows."""
    found = by_prompt.exponential_weights(REWARDS + shift, SAME, REWARDS + shift, temperature=temperature)
    for prompt in range(3):
        of_prompt = REWARDS[prompt == IDS].astype(np.float64) / temperature
        softmax = np.exp(of_prompt - of_prompt.max())
        expected = softmax / softmax.sum() * len(of_prompt)
        np.testing.assert_allclose(np.asarray(found)[prompt == IDS], expected, rtol=1e-4, atol=1e-30)


def test_exponential_weights_literal():
    """What jannerm/ddpo's make_weights says of its temperature of 1/5, which is an inverse one."""
    found = weights(REWARDS, SAME, REWARDS, **PLAIN)
    np.testing.assert_allclose(found, [0.575804, 0.708687, 0.858999, 1.0, 1.291313, 1.565197], rtol=2e-6)
    found = weights(REWARDS, SAME, REWARDS, **PLAIN | {"per_prompt": False})  # among all six
    np.testing.assert_allclose(found, [0.572564, 0.699332, 0.854166, 1.043281, 1.274266, 1.556392], rtol=2e-6)


def test_standardised_weights_do_not_depend_on_the_rewards_unit():
    settings = PLAIN | {"standardised": True, "temperature": 1.0}
    one, other = (np.asarray(weights(scale * REWARDS, SAME, scale * REWARDS, **settings)) for scale in (10.0, 1e3))
    np.testing.assert_allclose(one, other, rtol=1e-3)
    assert one.max() > 2


@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.5, 0.75, 0.9, 0.99])
def test_a_quantile_is_numpys(quantile):
    rng = np.random.default_rng(0)
    rewards, ids = rng.integers(0, 8, 60).astype(np.float32), rng.integers(0, 4, 60)  # with equal ones
    found = np.asarray(by_prompt.best_alone(rewards, by_prompt.of_one_prompt(ids, ids), rewards, quantile=quantile))
    for prompt in range(4):
        of_prompt = rewards[ids == prompt]
        kept = of_prompt >= np.quantile(of_prompt, quantile)
        np.testing.assert_allclose(found[ids == prompt], kept / kept.mean(), rtol=1e-6)


def test_effective_share_literal():
    share = parallel.pmap(effective_share)
    for weight, expected in (([1.0, 1.0, 1.0, 1.0], 1.0), ([4.0, 0.0, 0.0, 0.0], 0.25), ([2.0, 0.0, 2.0, 0.0], 0.5)):
        assert float(share(parallel.shard(np.array(weight, np.float32), 4))[0]) == pytest.approx(expected)
