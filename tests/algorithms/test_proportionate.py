"""DDPO with proportionate credit (PCPO): the log-hinge, the weights of the steps, an iteration, and its settings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffexp_jax.algorithms.ddpo import DDPO, ddpo
from diffexp_jax.algorithms.proportionate import equal_steps, log_hinge_loss
from diffexp_jax.errors import InputError
from diffexp_jax.sampling import load_process
from tests.support import two_numbers
from tests.support.tiny import SCHEDULER


@pytest.mark.parametrize(
    "log_ratio, adv, loss, slope",
    [
        (0.0, 2.0, 0.2, -2.0),  # before the first update: the plain policy gradient
        (0.05, 2.0, 0.1, -2.0),
        (0.2, 2.0, 0.0, 0.0),  # moved far enough to where the advantage leads
        (-0.2, 2.0, 0.6, -2.0),  # the other way: linear, not by the ratio
        (-0.2, -2.0, 0.0, 0.0),
        (0.2, -2.0, 0.6, 2.0),
    ],
)
def test_log_hinge_literal(log_ratio, adv, loss, slope):
    new, old, adv = (jnp.full(3, x) for x in (log_ratio - 1.0, -1.0, adv))
    found, gradient = jax.value_and_grad(log_hinge_loss)(new, old, adv, clip=0.1)
    assert found == pytest.approx(loss, abs=1e-6)
    np.testing.assert_allclose(gradient, slope / 3, rtol=1e-5)


def eps_factors(process, steps):
    """|C_t| / sigma_t of DDIM (Song et al. 2021, Eq. 12) by torch's betas, where the network's output is the noise."""
    a, a_prev, std = alphas(steps)
    return np.abs(np.sqrt(1 - a_prev - std**2) - np.sqrt(a_prev) * np.sqrt(1 - a) / np.sqrt(a)) / std


def v_factors(process, steps):
    """The same where the output is v, so that x_0 = sqrt(a) x - sqrt(1-a) v and eps = sqrt(a) v + sqrt(1-a) x."""
    a, a_prev, std = alphas(steps)
    return np.abs(np.sqrt(1 - a_prev - std**2) * np.sqrt(a) - np.sqrt(a_prev) * np.sqrt(1 - a)) / std


def alphas(steps):
    """alpha_bar of t and of the step after, and DDIM's std at eta 1, from SD's betas."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    cumulative, t = np.cumprod(1 - betas), np.asarray(steps.t, int)
    a, a_prev = cumulative[t], cumulative[np.maximum(t - 1000 // len(t), 0)]
    return a, a_prev, np.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))


def flow_factors(process, steps):
    """Flow-GRPO's Eq. 9: the velocity moves the mean by (1 + g^2 (1 - s) / (2 s)) dt, the noise is g sqrt(dt)."""
    s = np.asarray(process.timesteps(len(steps.t)), np.float64) / 1000
    dt = s - np.append(s[1:], 0.0)
    g = np.sqrt(s / (1 - np.where(s < 1, s, s[1])))
    return (1 + g**2 * (1 - s) / (2 * s)) * dt / (g * np.sqrt(dt))


@pytest.mark.parametrize(
    "config, factors",
    [
        (SCHEDULER | {"prediction_type": "epsilon"}, eps_factors),
        (SCHEDULER | {"prediction_type": "v_prediction"}, v_factors),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, flow_factors),
    ],
)
def test_the_weights_make_steps_equal(config, factors):
    """Of all steps, by formulas of the papers: a step's weight times its factor is one number; 1 on average."""
    process, n = load_process(config), 50
    steps = process.make_steps(process.timesteps(n), np.full(n, 5.0, np.float32), eta=1.0)
    found = np.asarray(equal_steps(process, steps), np.float64)
    expected = 1 / factors(process, steps)
    assert expected.max() > 1.5 * expected.min()  # steps differ
    np.testing.assert_allclose(found, expected / expected.mean(), rtol=1e-3)


def test_an_iteration_is_the_plain_loop():
    """Two updates of one minibatch against the gradient of the loss as a whole."""
    settings = dict(n_prompts=4, n_updates=1, n_chunks=2, inner_epochs=2, clip=5e-3, advantage_clip=5.0, group=2)
    settings |= dict(stats_buffer=8, stats_min_count=2, advantage="loo", proportionate=True)
    samples, state, _ = two_numbers.iteration(ddpo(two_numbers.POLICY, optax.sgd(0.05), **settings))
    rewards, everything = samples[3], np.arange(two_numbers.N)
    adv = rewards - rewards.reshape(-1, 2)[:, ::-1].reshape(-1)
    weights = equal_steps(two_numbers.PROCESS, two_numbers.STEPS)[:, None]

    @jax.jit
    def followed(lora, old):
        def loss(lora):
            log_ratio = two_numbers.log_probs(lora, samples, everything) - old
            return jnp.maximum(0.0, 5e-3 * jnp.abs(weights * adv) - weights * adv * log_ratio).mean()

        return jax.tree.map(lambda x, g: x - 0.05 * g, lora, jax.grad(loss)(lora))

    old = two_numbers.log_probs(two_numbers.LORA, samples, everything)
    expected = followed(followed(two_numbers.LORA, old), old)
    for name, start in two_numbers.LORA.items():
        assert abs(float(expected[name] - start)) > 1e-4
        assert float(state.lora[name] - start) == pytest.approx(float(expected[name] - start), rel=5e-3)


def test_it_is_made_in_two_passes():
    assert DDPO(updates=1).in_one_pass(8, 10) and not DDPO(updates=1, proportionate=True).in_one_pass(8, 10)
    with pytest.raises(InputError, match="ddpo.gradient='onepass': wants ddpo.proportionate=False"):
        DDPO(updates=1, gradient="onepass", proportionate=True).check(10)
