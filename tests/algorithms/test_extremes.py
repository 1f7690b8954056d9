"""K of a group's G samples: which they are, that DDPO learns from these alone, and the setting."""

import itertools

import jax
import numpy as np
import optax
import pytest

from diffexp_jax.algorithms import extremes
from diffexp_jax.algorithms.ddpo import DDPO, ddpo
from diffexp_jax.errors import InputError
from diffexp_jax.settings import checked
from tests.support import two_numbers

most_varied = jax.jit(extremes.most_varied, static_argnums=1)


@pytest.mark.parametrize(
    "rewards, k, expected",
    [
        ([0.0, 1.0, 2.0, 9.0], 2, [0, 3]),  # of two, the lowest and the highest
        ([2.0, 0.0, 9.0, 1.0], 3, [1, 2, 3]),  # 0, 1 and 9: variance 16.2; 0, 2 and 9: 14.9
        ([5.0, 5.0, 5.0, 1.0], 2, [2, 3]),  # of equal ones the last
        ([1.0, 0.0, 0.0, 0.0], 3, [0, 2, 3]),
    ],
)
def test_most_varied_literal(rewards, k, expected):
    np.testing.assert_array_equal(most_varied(np.array([rewards], np.float32), k), [expected])


def test_no_other_choice_varies_more():
    """All choices of 1 to 6 of six, in ten groups."""
    rewards = np.random.default_rng(0).standard_normal((10, 6)).astype(np.float32)
    for k in range(1, 7):
        found = np.take_along_axis(rewards, np.asarray(most_varied(rewards, k)), axis=1).var(1)
        every = np.stack([rewards[:, choice].var(1) for choice in itertools.combinations(range(6), k)])
        np.testing.assert_allclose(found, every.max(0), rtol=1e-5, atol=1e-7)


def test_rows_and_chunks_literal():
    """Two groups of four on a device; what is kept is split alike for each update."""
    rewards = np.array([0.0, 3.0, 1.0, 2.0, 4.0, 4.5, 9.0, 4.2], np.float32)
    rows_kept = jax.jit(extremes.rows_kept, static_argnums=(1, 2))
    np.testing.assert_array_equal(rows_kept(rewards, 4, 2), [0, 1, 4, 6])
    assert [extremes.chunks_of(12, updates, most) for updates, most in ((1, 4), (1, 12), (2, 4), (3, 8))] == [
        3,
        1,
        4,
        3,
    ]
    assert [extremes.number_kept(group, 0.25) for group in (2, 4, 8, 24)] == [2, 2, 2, 6]


@pytest.mark.parametrize("advantage", ["loo", pytest.param("prompt", marks=pytest.mark.slow)])
def test_an_iteration_is_the_plain_loop(monkeypatch, advantage):
    """Three of each prompt's four samples, those that an exhaustive search finds, in one update of one pass each."""
    monkeypatch.setattr(two_numbers, "GROUP", 4)
    settings = dict(n_prompts=4, n_updates=1, n_chunks=4, inner_epochs=1, clip=1e-4, advantage_clip=5.0, group=4)
    settings |= dict(stats_buffer=8, stats_min_count=2, advantage=advantage, keep=3)
    samples, state, metrics = two_numbers.iteration(ddpo(two_numbers.POLICY, optax.sgd(0.05), **settings))
    rewards, rows, adv = samples[3], [], []
    for start in (0, 4):
        choices = [np.array(choice) + start for choice in itertools.combinations(range(4), 3)]
        chosen = max(choices, key=lambda rows: rewards[rows].var())
        kept, group = rewards[chosen], rewards[start : start + 4]
        others = (kept.sum() - kept) / 2
        rows.append(chosen)
        adv.append(kept - others if advantage == "loo" else (kept - group.mean()) / (group.std() + 1e-6))
    rows, adv = np.concatenate(rows), np.concatenate(adv)

    @jax.jit
    def followed(lora):
        return jax.grad(lambda lora: -(adv * two_numbers.log_probs(lora, samples, rows)).mean())(lora)

    expected = followed(two_numbers.LORA)
    for name, start in two_numbers.LORA.items():
        assert float(state.lora[name] - start) == pytest.approx(-0.05 * float(expected[name]), rel=1e-3)
    assert float(metrics["reward/mean"]) == pytest.approx(rewards.mean(), rel=1e-6)  # of all that were scored


def test_settings(make_config):
    kept = {"ddpo.keep": 0.5, "ddpo.updates": 1}
    with pytest.raises(InputError, match="batch.group=1: ddpo compares samples of a prompt; wants at least 2"):
        checked(make_config("ddpo", kept))
    with pytest.raises(InputError, match=r"ddpo.gradient='onepass': wants ddpo.keep=1.0"):
        checked(make_config("ddpo", kept | {"batch.group": 4, "ddpo.gradient": "onepass"}))
    with pytest.raises(InputError, match="ddpo.keep=0.0: wants more than 0"):
        checked(make_config("ddpo", {"ddpo.keep": 0.0}))
    method = checked(make_config("ddpo", kept | {"batch.group": 4, "ddpo.kl_weight": 0.1})).method
    assert not method.in_one_pass(8, 1000) and DDPO(updates=1).in_one_pass(8, 1000)
    assert method.passes(10, True) == {"to sample": 1.0, "with a gradient": 0.4, "of the untuned model": 0.4}
