"""DiffExp's two equations with literal numbers, and the random draw of what is weighted."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax import parallel
from diffexp_jax.experiment import Experiment
from diffexp_jax.exploration import (
    exploring_iterations,
    guidance_schedule,
    has_weights,
    reweight_prompt,
    sample_phrase_weights,
)
from diffexp_jax.settings import checked

T = jnp.array([981, 901, 900, 881, 1])


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "t_thresh, expected",
    [
        (900.0, [1.0, 1.0, 7.5, 7.5, 7.5]),  # "t > t_thresh": the threshold itself has the high scale
        (900.5, [1.0, 1.0, 7.5, 7.5, 7.5]),
        (1000.0, [7.5] * 5),
        (0.0, [1.0] * 5),
    ],
)
def test_guidance_schedule_literal(jit, t_thresh, expected):
    schedule = jax.jit(guidance_schedule) if jit else guidance_schedule
    w = schedule(T, w_low=1.0, w_high=7.5, t_thresh=t_thresh)
    assert w.dtype == jnp.float32
    np.testing.assert_array_equal(w, expected)


@pytest.mark.parametrize("active, expected", [(True, [0.0, 0.0, 5.0, 5.0, 5.0]), (False, [5.0] * 5)])
def test_guidance_schedule_active(active, expected):
    """As a Python bool and traced; inactive is plain guidance bit for bit."""
    kwargs = dict(w_low=0.0, w_high=5.0, t_thresh=900.0)
    np.testing.assert_array_equal(guidance_schedule(T, **kwargs, active=active), expected)
    traced = jax.jit(lambda a: guidance_schedule(T, **kwargs, active=a))
    np.testing.assert_array_equal(traced(jnp.array(active)), expected)


COND = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
NULL = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 8.0]])


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "weights, expected",
    [
        ([1.0, 1.0, 1.0], [[1, 2], [3, 4], [5, 6]]),
        ([1.0, 1.5, 1.0], [[1, 2], [4, 6], [5, 6]]),
        ([0.0, 1.0, 2.0], [[1, 0], [3, 4], [10, 4]]),  # 0 is the empty prompt's embedding
        ([-1.0, 0.5, 1.0], [[1, -2], [2, 2], [5, 6]]),
    ],
)
def test_reweight_prompt_literal(jit, weights, expected):
    reweight = jax.jit(reweight_prompt) if jit else reweight_prompt
    np.testing.assert_allclose(reweight(COND, NULL, jnp.array(weights)), expected, rtol=1e-6)


def test_reweight_prompt_with_weight_1_is_bit_identical():
    """null + 1 (c - null) is not c in floating point: here it would be 0."""
    cond, null = jnp.array([[1e-3, 1.0]]), jnp.array([[1e6, -3.0]])
    assert (null + (cond - null))[0, 0] != cond[0, 0]
    np.testing.assert_array_equal(reweight_prompt(cond, null, jnp.ones(1)), cond)
    np.testing.assert_array_equal(jax.jit(reweight_prompt)(cond, null, jnp.ones(1)), cond)


def test_reweight_prompt_over_a_batch():
    weights = jnp.array([[1.0, 1.5, 1.0], [2.0, 1.0, 1.0]])
    batch = jax.vmap(reweight_prompt, in_axes=(0, None, 0))(jnp.stack([COND, COND + 1]), NULL, weights)
    np.testing.assert_array_equal(batch[0], reweight_prompt(COND, NULL, weights[0]))
    np.testing.assert_array_equal(batch[1], reweight_prompt(COND + 1, NULL, weights[1]))


# "<start> an octo|pus riding a bike <end> <pad>": words, the second of two tokens
UNITS = jnp.array([0, 1, 2, 2, 3, 4, 5, 0, 0])
RANGE = (1.0, 1.5)


@pytest.fixture(scope="module")
def draws():
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(lambda key: sample_phrase_weights(key, UNITS, weight_range=RANGE)))
    return np.asarray(draw(keys))


def test_one_unit_is_weighted_as_a_whole_and_special_tokens_never(draws):
    weighted = draws != 1.0  # an exact 1.0 has probability 1e-7
    units = {tuple(row) for row in weighted[weighted.any(1)]}
    assert units == {tuple(np.asarray(UNITS) == unit) for unit in range(1, 6)}
    np.testing.assert_array_equal(draws[:, 2], draws[:, 3])
    np.testing.assert_array_equal(draws[:, np.asarray(UNITS) == 0], 1.0)


def test_units_are_uniform(draws):
    first_token_of_unit = [1, 2, 4, 5, 6]
    shares = (draws[:, first_token_of_unit] != 1.0).mean(0)
    np.testing.assert_allclose(shares, 0.2, atol=0.015)  # five standard deviations


def test_weights_are_uniform_in_the_range_and_independent_of_the_unit(draws):
    weight = draws.max(1)
    assert RANGE[0] <= weight.min() < RANGE[0] + 0.001 and RANGE[1] - 0.001 < weight.max() < RANGE[1]
    np.testing.assert_allclose(np.histogram(weight, bins=10, range=RANGE)[0] / len(weight), 0.1, atol=0.011)
    for token in (1, 2, 4, 5, 6):
        assert weight[draws[:, token] != 1.0].mean() == pytest.approx(1.25, abs=0.012)


def test_draw_is_the_same_with_jit_and_vmap():
    keys = jax.random.split(jax.random.key(1), 5)
    units = jnp.stack([UNITS, UNITS, jnp.zeros_like(UNITS), UNITS[::-1], (UNITS == 2).astype(jnp.int32)])
    one = [sample_phrase_weights(key, u, weight_range=RANGE) for key, u in zip(keys, units, strict=True)]
    both = jax.jit(jax.vmap(lambda key, u: sample_phrase_weights(key, u, weight_range=RANGE)))(keys, units)
    np.testing.assert_array_equal(jnp.stack(one), both)
    np.testing.assert_array_equal(both[2], 1.0)  # no units, no weights
    assert both[4, 2] == both[4, 3] > 1.0  # a single unit is always the chosen one


@pytest.mark.parametrize("weight_range", [(0.5, 0.5), (2.0, 2.0)])
def test_an_empty_range_is_a_fixed_weight(weight_range):
    weights = sample_phrase_weights(jax.random.key(0), UNITS, weight_range=weight_range)
    assert set(np.unique(weights).tolist()) == {1.0, weight_range[0]}


def test_range_of_ones_changes_nothing():
    weights = sample_phrase_weights(jax.random.key(0), UNITS, weight_range=(1.0, 1.0))
    np.testing.assert_array_equal(weights, 1.0)


@pytest.mark.parametrize("fraction, expected", [(0.75, 3), (0.5, 2), (0.0, 0), (1.0, 4)])
def test_exploring_iterations(fraction, expected):
    assert exploring_iterations(4, fraction=fraction) == expected


# ---------------------------------------------------------------------------------------------------------------- scope


@pytest.fixture(scope="module")
def scopes(make_config):
    """{scope: [(prompt ids, units, Eq. 8's weights of 16 images) of two iterations]} of the five training prompts."""
    config = make_config("ddpo", {"eval.every": 0, "batch.samples": 16}).unlock()
    experiment, drawn = Experiment.build(checked(config)), {}
    for name in ("image", "prompt", "half of image", "half of prompt"):
        e = replace(experiment.sampler.exploration, scope=name.split()[-1], share=0.5 if "half" in name else 1.0)
        this = experiment._replace(sampler=experiment.sampler._replace(exploration=e))
        seen = []

        def explore(cond, null, units, keys, seen=seen):
            draw = jax.vmap(lambda key, u: sample_phrase_weights(key, u, weight_range=RANGE))
            seen.append((units[0], draw(keys[0], units[0])))
            return cond

        ids = [np.asarray(this.draw_batch(it, explore).prompt_id[0]) for it in (0, 1)]
        drawn[name] = [(i, *map(np.asarray, pair)) for i, pair in zip(ids, seen, strict=True)]
    return drawn


def test_a_draw_for_each_image(scopes):
    """The default, by the image's index alone."""
    keys = parallel.sample_keys(parallel.stream(0, "weights", 1), 16)
    for index, (_, units, weights) in zip(keys, zip(*scopes["image"][1], strict=True), strict=True):
        np.testing.assert_array_equal(weights, sample_phrase_weights(index, units, weight_range=RANGE))
    assert len({weights.max() for weights in scopes["image"][1][2]}) == 16


def test_a_draw_for_each_prompt(scopes):
    """Its images of an iteration share it; other prompts and iterations have others."""
    for ids, units, weights in scopes["prompt"]:
        assert len(ids) == 16 > len(set(ids)) > 2
        for prompt in set(ids):
            key = jax.random.fold_in(parallel.stream(0, "weights", 1), int(prompt))
            np.testing.assert_array_equal(np.ptp(weights[ids == prompt], axis=0), 0.0)
            if ids is scopes["prompt"][1][0]:
                expected = sample_phrase_weights(key, units[ids == prompt][0], weight_range=RANGE)
                np.testing.assert_array_equal(weights[ids == prompt][0], expected)
    drawn = [{i: weights[ids == i].max() for i in set(ids)} for ids, _, weights in scopes["prompt"]]
    assert len(set(drawn[0].values())) == len(drawn[0])
    assert all(drawn[0][prompt] != drawn[1][prompt] for prompt in drawn[0].keys() & drawn[1].keys())


@pytest.mark.parametrize(
    "share, expected",
    [
        (1.0, [1, 1, 1, 1, 1, 1, 1, 1]),
        (0.75, [0, 1, 1, 1, 0, 1, 1, 1]),  # three of each group of four
        (0.5, [0, 1, 0, 1, 0, 1, 0, 1]),
        (0.3, [0, 0, 0, 1, 0, 0, 1, 0]),
        (0.0, [0, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_a_share_of_the_samples_has_weights(share, expected):
    np.testing.assert_array_equal(has_weights(8, share=share), np.array(expected, bool))
    assert has_weights(300, share=share).sum() == round(300 * share)


def test_images_without_weights_have_the_prompt_as_it_is(scopes):
    """Half of them; the others have the weights that they have where all are weighted."""
    for scope in ("image", "prompt"):
        (_, units, half), (_, _, everything) = scopes[f"half of {scope}"][1], scopes[scope][1]
        np.testing.assert_array_equal(units[::2], 0)
        np.testing.assert_array_equal(half[::2], 1.0)
        np.testing.assert_array_equal(half[1::2], everything[1::2])


def test_three_quarters_of_an_odd_number():
    """0.75 * 10 = 7.5: iterations 0..7 explore."""
    assert exploring_iterations(10, fraction=0.75) == 8


@pytest.mark.parametrize(
    "n, fraction, expected", [(100, 0.07, 7), (100, 0.29, 29), (10, 0.7, 7), (7, 0.75, 6), (1, 0.75, 1), (30, 0.1, 3)]
)
def test_a_share_is_rounded_up_only_where_it_is_no_whole_number(n, fraction, expected):
    """0.07 * 100 is 7.000000000000001 in floating point."""
    assert exploring_iterations(n, fraction=fraction) == expected
