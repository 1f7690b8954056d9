"""RWR: an iteration against a plain loop in torch, and what its weights come to."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax.algorithms.denoising import folded, uniform_timesteps
from diffexp_jax.algorithms.rwr import RWR, denoising_loss
from tests.support import images_alone as alone

SLOW = pytest.mark.slow  # a program each


def test_denoising_loss_literal():
    """(2 x 4 + 0.5 x 1) / 2: squared errors of 4 and 1."""
    out, target = jnp.zeros((2, 1, 1, 2)), jnp.array([[[[2.0, -2.0]]], [[[1.0, -1.0]]]])
    assert float(denoising_loss(out, target, jnp.array([2.0, 0.5]))) == pytest.approx(4.25)


def by_hand(kind, found, *, weight, updates, epochs, guided, prior_weight):
    """mean over the images of an update of w |target - out|^2, and the same of the untuned model's, by descent."""
    process, lora = alone.PROCESSES[kind], dict(alone.LORA)
    for epoch in range(epochs):
        for rows in alone.shares(updates):

            def of_images(lora, x_0, weight, number, rows=rows, epoch=epoch):
                keys = folded(alone.update_keys(epoch), number)
                t = np.asarray(uniform_timesteps(folded(keys, 0), process))
                at = alone.drawn(kind, x_0, t, folded(keys, 1), rows)
                out = alone.output(lora, at, alone.nearest_guidance(process, t) if guided else None)
                errors = ((at.target - out) ** 2).mean((1, 2, 3))
                return sum(float(w) * error for w, error in zip(weight[rows], errors, strict=True)) / len(rows)

            def loss(lora):
                total = of_images(lora, found.x_0, weight, 0)
                if prior_weight:
                    total = total + prior_weight * of_images(lora, found.untuned, np.ones(alone.N), 1)
                return total

            lora = alone.descended(lora, loss)
    return lora


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("flow", dict(updates=2, inner_epochs=2, guided=True, prior_weight=0.5)),
        pytest.param("epsilon", dict(updates=2, inner_epochs=3, guided=True, prior_weight=0.0), marks=SLOW),
        pytest.param("v", dict(updates=1, inner_epochs=1, guided=False, prior_weight=0.5), marks=SLOW),
    ],
)
def test_an_iteration_is_the_plain_loops(kind, settings):
    algorithm = alone.algorithm_of("rwr", alone.PROCESSES[kind], temperature=0.1, **settings)
    found = alone.iteration(algorithm, alone.PROCESSES[kind])
    weight = np.zeros(alone.N)
    for prompt in range(3):  # softmax over the images of a prompt, times their number
        of_prompt = np.exp(found.rewards[alone.IDS == prompt].astype(np.float64) / 0.1)
        weight[alone.IDS == prompt] = of_prompt / of_prompt.mean()
    assert weight.max() > 1.5
    options = {"epochs" if name == "inner_epochs" else name: value for name, value in settings.items()}
    expected = by_hand(kind, found, weight=weight, **options)
    alone.assert_moved_as(found.state.lora, expected)
    assert found.metrics["weight/effective"] == pytest.approx(1 / np.square(weight).mean(), rel=1e-4)
    assert found.metrics["reward/mean"] == pytest.approx(found.rewards.mean(), rel=1e-6)
    assert int(found.state.iteration) == 1


def moved(**settings):
    algorithm = alone.algorithm_of("rwr", alone.PROCESSES["epsilon"], updates=1, inner_epochs=1, **settings)
    return alone.iteration(algorithm, alone.PROCESSES["epsilon"])


@SLOW
def test_equal_rewards_give_the_plain_denoising_gradient():
    found = moved(reward=lambda images: 3.0 + 0.0 * images.mean((1, 2, 3)))
    plain = dict(weight=np.ones(alone.N), updates=1, epochs=1, guided=True, prior_weight=0.0)
    alone.assert_moved_as(found.state.lora, by_hand("epsilon", found, **plain))


@SLOW
@pytest.mark.parametrize(
    "settings", [{"temperature": 1e-4}, {"weighting": "quantile", "quantile": 0.99}], ids=["cold", "quantile"]
)
def test_the_best_of_a_prompt_alone(settings):
    """At temperature 0 it is all that counts, as often as its prompt has images."""
    found = moved(**settings)
    weight = np.zeros(alone.N)
    for prompt in range(3):
        (of_prompt,) = np.where(alone.IDS == prompt)
        weight[of_prompt[found.rewards[of_prompt].argmax()]] = len(of_prompt)
    expected = by_hand("epsilon", found, weight=weight, updates=1, epochs=1, guided=True, prior_weight=0.0)
    alone.assert_moved_as(found.state.lora, expected)


def test_passes():
    assert RWR().passes(50, True) == {"to sample": 1.0, "with a gradient": 0.1}
    passes = {"to sample": 1.0, "to sample by the untuned model": 1.0, "with a gradient": 0.2}
    assert RWR(prior_weight=0.01).passes(50, True) == passes
    assert RWR().trains_guided and not RWR(guided=False).trains_guided
    assert RWR().compares_groups and not RWR(per_prompt=False).compares_groups  # then any images will do
