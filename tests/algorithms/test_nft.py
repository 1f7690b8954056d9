"""DiffusionNFT: its loss by its authors' code, an iteration against a plain loop in torch, its two policies."""

import jax
import numpy as np
import pytest
import torch

from diffexp_jax.algorithms.denoising import folded, rising
from diffexp_jax.algorithms.nft import NFT, negative_aware_loss, probability
from tests.support import images_alone as alone
from tests.support.images_alone import LEVEL, NOISE, OUT, X_0
from tests.support.images_alone import OTHER as OLD

SLOW = pytest.mark.slow  # a program each
ADV = np.array([1.5, -7.0], np.float32)


@pytest.mark.parametrize(
    "strength, losses, gradient",
    [
        (
            1.0,
            [2.152786, 0.4951421],
            [-0.8004848, 0.0119972, -0.4358906, -0.9387721, -0.6098191, -0.2067183, 0.878553, 0.3049096],
        ),
        (
            0.1,
            [20.864707, 4.5464286],
            [0.0421549, 0.1468544, -0.7015644, -0.4594263, 0.4170295, -0.0822448, 1.4184809, -0.0822448],
        ),
    ],
)
def test_the_loss_is_its_authors(strength, losses, gradient):
    """Values and gradient that scripts/train_nft_sd3.py of NVlabs/DiffusionNFT computes in float64 of these numbers."""
    r = probability(ADV, 5.0)
    np.testing.assert_allclose(r, [0.65, 0.0], rtol=1e-6)

    def loss(out):
        return negative_aware_loss(out, OLD, NOISE - X_0, r, LEVEL, strength=strength)

    np.testing.assert_allclose(loss(OUT), losses, rtol=2e-6)
    found = jax.grad(lambda out: 5.0 * loss(out).mean())(OUT)
    np.testing.assert_allclose(found.ravel(), gradient, rtol=2e-5, atol=1e-6)


def test_an_average_image_teaches_nothing_to_the_policy_that_sampled():
    """r = 1/2 and out = old: what draws towards the image and what pushes away from it are equal."""

    def loss(out, r):
        return negative_aware_loss(out, OLD, NOISE - X_0, np.full(2, r, np.float32), LEVEL, strength=1.0).sum()

    np.testing.assert_array_equal(jax.grad(loss)(OLD, 0.5), np.zeros_like(OLD))
    good, bad = (jax.grad(loss)(OLD, r) for r in (1.0, 0.0))
    np.testing.assert_allclose(good, -bad, rtol=1e-6)
    assert float((good * (NOISE - X_0 - OLD)).sum()) < 0  # against its gradient out goes to the target


V = dict(strength=0.5, weighting="x_0", kl_weight=0.1, updates=1, inner_epochs=1, guided=False)
FLOW = dict(strength=0.1, weighting="x_0", kl_weight=0.5, updates=1, inner_epochs=1, guided=False)
GUIDED = dict(strength=0.3, weighting="output", kl_weight=0.0, updates=1, inner_epochs=2, guided=True)


def by_hand(kind, found, adv, *, extra, strength, weighting, kl_weight, updates, epochs, guided):
    """The loop of the authors' code: each image at three of the four timesteps, in an order of its own."""
    process, lora = alone.PROCESSES[kind], dict(alone.LORA)
    timesteps = np.asarray(process.timesteps(alone.T))
    for epoch in range(epochs):
        keys = alone.update_keys(epoch)
        order = np.stack([jax.random.permutation(key, alone.T) for key in folded(keys, 0)])
        for rows in alone.shares(updates):

            def loss(lora, rows=rows, order=order, keys=keys):
                total = 0.0
                for i in range(3):
                    t = timesteps[order[:, i]]
                    at = alone.drawn(kind, found.x_0, t, folded(keys, 1 + i), rows)
                    w = alone.nearest_guidance(process, t) if guided else None
                    out, old, untuned = (alone.output(x, at, w) for x in (lora, extra, alone.UNTUNED))
                    to_x_0 = {"epsilon": at.noise / at.signal, "v": at.noise, "flow": at.noise}[kind]
                    scale = to_x_0 if weighting == "x_0" else torch.ones_like(to_x_0)
                    plus, minus = strength * out + (1 - strength) * old, (1 + strength) * old - strength * out
                    r = torch.tensor(np.clip(adv[rows] / 5, -1, 1) / 2 + 0.5)
                    for predicted, share in ((plus, r), (minus, 1 - r)):
                        error = scale * (at.target - predicted)
                        size = error.detach().abs().mean((1, 2, 3), keepdim=True)
                        total = total + 5 * (share * (error**2 / size).mean((1, 2, 3)) / strength).mean()
                    total = total + kl_weight * ((out - untuned) ** 2).mean()
                return total / 3

            lora = alone.descended(lora, loss)
    return lora


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("epsilon", dict(strength=1.0, weighting="x_0", kl_weight=0.5, updates=2, inner_epochs=1, guided=False)),
        pytest.param("epsilon", GUIDED, marks=SLOW),
        pytest.param("v", V, marks=SLOW),
        pytest.param("flow", FLOW, marks=SLOW),
    ],
)
def test_an_iteration_is_the_plain_loops(kind, settings):
    process = alone.PROCESSES[kind]
    algorithm = alone.algorithm_of("nft", process, n_chunks=4, **settings)
    extra = {"a": 0.6, "b": -0.3, "c": 0.1}  # of an iteration that is not the first
    state = algorithm.init(alone.LORA).replace(extra={"old": {k: np.float32(x) for k, x in extra.items()}})
    found = alone.iteration(algorithm, process, state)
    adv = np.zeros(alone.N)
    for prompt in range(3):
        adv[alone.IDS == prompt] = found.rewards[alone.IDS == prompt] - found.rewards[alone.IDS == prompt].mean()
    adv /= found.rewards.std() + 1e-4
    options = {"epochs" if name == "inner_epochs" else name: value for name, value in settings.items()}
    alone.assert_moved_as(found.state.lora, by_hand(kind, found, adv, extra=extra, **options), rel=1e-3)
    decay = 1e-3 * settings["updates"] * settings["inner_epochs"]
    for name, x in extra.items():
        expected = decay * x + (1 - decay) * float(found.state.lora[name])
        assert float(found.state.extra["old"][name]) == pytest.approx(expected, rel=1e-6)


@SLOW
def test_the_old_policy_samples():
    """With another old policy there are other images; the LoRA itself makes no difference to them."""
    process = alone.PROCESSES["epsilon"]
    algorithm = alone.algorithm_of("nft", process, kl_weight=0.0)
    state = algorithm.init(alone.LORA)
    other = jax.tree.map(lambda x: x + 0.5, alone.LORA)
    first = alone.iteration(algorithm, process, state)
    same = alone.iteration(algorithm, process, state.replace(lora=other))
    changed = alone.iteration(algorithm, process, state.replace(extra={"old": other}))
    np.testing.assert_array_equal(first.x_0, same.x_0)
    assert np.abs(first.x_0 - changed.x_0).max() > 0.01


@SLOW
def test_equal_rewards_teach_nothing():
    process = alone.PROCESSES["flow"]
    found = alone.iteration(
        alone.algorithm_of("nft", process, reward=lambda images: 2.0 + 0.0 * images.mean((1, 2, 3)), kl_weight=0.0),
        process,
    )
    assert float(found.metrics["grad_norm"]) == 0.0 and float(found.metrics["distance/old"]) == 0.0


@pytest.mark.parametrize(
    "numbers, expected",
    [((0, 1e-3, 0.5), [0.0, 0.001, 0.1, 0.5, 0.5]), ((75, 7.5e-3, 0.999), [0.0, 0.0, 0.1875, 0.999, 0.999])],
)
def test_the_old_policys_decay_is_published(numbers, expected):
    """`return_decay` of types 1 and 2."""
    decay = dict(zip(("start", "rate", "most"), numbers, strict=True))
    np.testing.assert_allclose([rising(np.int32(n), **decay) for n in (0, 1, 100, 500, 5000)], expected, rtol=1e-6)


def test_passes():
    assert NFT(timestep_fraction=0.5).passes(20, True) == {
        "to sample": 1.0,
        "with a gradient": 0.5,
        "of the policy that sampled": 0.5,
        "of the untuned model": 0.5,
    }
    assert "of the untuned model" not in NFT(kl_weight=0.0).passes(20, True)
    assert [NFT().n_timesteps(n) for n in (1, 10, 25)] == [1, 9, 24]
