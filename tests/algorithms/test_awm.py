"""AWM: its log-likelihood and gradient by its authors' code, an iteration against a plain loop in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from diffexp_jax.algorithms.awm import AWM, log_likelihood
from diffexp_jax.algorithms.ddpo import clipped_ratio_loss
from diffexp_jax.algorithms.denoising import folded
from tests.support import images_alone as alone
from tests.support.images_alone import LEVEL, NOISE, OTHER, OUT, X_0

SLOW = pytest.mark.slow  # a program each
ADV = np.array([0.3, -1.0], np.float32)


@pytest.mark.parametrize(
    "power, of_out, of_other",
    [
        (0.25, [-4.9527023, -1.9018499], [-4.9914306, -1.4138219]),  # "ghuber"
        (0.5, 2 * np.array([-1.7112518, -0.5681685]), 2 * np.array([-1.7380574, -0.3145624])),  # "huber", over power
        (1.0, [-3.2537925, -0.80705], [-3.3565275, -0.24738]),  # "t"
    ],
)
def test_the_log_likelihood_is_its_authors(power, of_out, of_other):
    """What scripts/train_sd3_awm.py of scxue/advantage_weighted_matching computes of these numbers, in float64."""
    for out, expected in ((OUT, of_out), (OTHER, of_other)):
        np.testing.assert_allclose(log_likelihood(out, NOISE - X_0, LEVEL, power=power), expected, rtol=2e-5)


@pytest.mark.parametrize(
    "old, loss, gradient",
    [
        (
            OUT,
            0.35,
            [-0.0218833, 0.0118427, -0.0684818, -0.0653924, 0.1417689, 0.0177211, 0.069703, -0.053754],
        ),
        (
            OTHER,
            0.1509946,
            [-0.0227474, 0.0123104, -0.071186, -0.0679746, 0.0870228, 0.0108778, 0.0427862, -0.0329961],
        ),
    ],
)
def test_the_policys_gradient_is_its_authors(old, loss, gradient):
    """The same for the clipped ratio of log-likelihoods, of advantages 0.3 and -1."""

    def followed(out):
        log_prob, before = (log_likelihood(x, NOISE - X_0, LEVEL, power=0.25) for x in (out, old))
        return clipped_ratio_loss(log_prob, before, jnp.asarray(ADV), clip=1.0)

    value, found = jax.value_and_grad(followed)(OUT)
    assert float(value) == pytest.approx(loss, rel=2e-5)
    np.testing.assert_allclose(found.ravel(), gradient, rtol=5e-5, atol=1e-7)


EPSILON = dict(updates=2, inner_epochs=2, guided=False, power=0.25, kl_weight=0.1, average_weight=0.3)
FLOW = dict(updates=1, inner_epochs=1, guided=False, power=1.0, kl_weight=0.0, average_weight=0.0)


def by_hand(kind, found, adv, *, average, updates, epochs, guided, power, kl_weight, average_weight):
    """Each image at a timestep of either half of the sampler's first three of four, as in the authors' "discrete"."""
    process, lora = alone.PROCESSES[kind], dict(alone.LORA)
    timesteps = np.asarray(process.timesteps(alone.T))
    for epoch in range(epochs):
        for rows in alone.shares(updates):

            def loss(lora, rows=rows, epoch=epoch):
                total = 0.0
                for i, (low, high) in enumerate(((0, 1), (1, 3))):
                    keys = folded(alone.update_keys(epoch), i)
                    index = [int(jax.random.randint(key, (), low, high)) for key in folded(keys, 0)]
                    at = alone.drawn(kind, found.x_0, timesteps[index], folded(keys, 1), rows)
                    w = alone.nearest_guidance(process, timesteps[index]) if guided else None
                    outs = (alone.output(x, at, w) for x in (lora, alone.LORA, alone.UNTUNED, average))
                    out, old, untuned, of_average = outs
                    level = (at.noise / (at.signal + at.noise)).ravel()

                    def log_prob(x, at=at, level=level):
                        d = ((at.target - x) ** 2).mean((1, 2, 3))
                        return -((d + 1e-10) ** power - 1e-10**power) * level / power

                    a = torch.tensor(np.clip(adv[rows], -5, 5) / 5)
                    ratio = torch.exp(log_prob(out) - log_prob(old).detach())
                    total = total + torch.maximum(-a * ratio, -a * ratio.clamp(0.0, 2.0)).mean()
                    total = total + kl_weight * ((out - untuned) ** 2).mean()
                    total = total + average_weight * ((out - of_average) ** 2).mean()
                return total / 2

            lora = alone.descended(lora, loss)
    return lora


@pytest.mark.parametrize(
    "kind, settings",
    [
        pytest.param("epsilon", EPSILON, marks=SLOW),
        ("v", dict(updates=2, inner_epochs=1, guided=True, power=0.25, kl_weight=0.1, average_weight=0.5)),
        pytest.param("flow", FLOW, marks=SLOW),
    ],
)
def test_an_iteration_is_the_plain_loops(kind, settings):
    process = alone.PROCESSES[kind]
    algorithm = alone.algorithm_of("awm", process, timesteps=2, **settings)
    average = {"a": 0.6, "b": -0.3, "c": 0.1}  # of an iteration that is not the first
    state = algorithm.init(alone.LORA)
    if settings["average_weight"]:
        state = state.replace(extra={"average": {k: np.float32(x) for k, x in average.items()}})
    found = alone.iteration(algorithm, process, state)
    adv = np.zeros(alone.N)
    for prompt in range(3):
        adv[alone.IDS == prompt] = found.rewards[alone.IDS == prompt] - found.rewards[alone.IDS == prompt].mean()
    adv /= found.rewards.std() + 1e-4
    options = {"epochs" if name == "inner_epochs" else name: value for name, value in settings.items()}
    alone.assert_moved_as(found.state.lora, by_hand(kind, found, adv, average=average, **options), rel=1e-3)
    assert ("ratio/mean" in found.metrics) == (settings["updates"] > 1)
    if settings["average_weight"]:
        decay = 1e-3 * settings["updates"] * settings["inner_epochs"]
        for name, x in average.items():
            expected = decay * x + (1 - decay) * float(found.state.lora[name])
            assert float(found.state.extra["average"][name]) == pytest.approx(expected, rel=1e-6)


def test_passes():
    method = AWM(timesteps=5, average_weight=0.0)
    assert method.passes(20, True) == {"to sample": 1.0, "with a gradient": 0.25, "of the untuned model": 0.25}
    assert "for the old log-likelihoods" in AWM(updates=2).passes(20, True)
