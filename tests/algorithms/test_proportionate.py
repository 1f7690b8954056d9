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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_weights_make_steps_equal(prediction_type):
    """By DDIM's numbers: t = 981, 501 and 1 of 50 steps; and 1 on average."""
    process = load_process(SCHEDULER | {"prediction_type": prediction_type})
    steps = process.make_steps(process.timesteps(50), np.full(50, 5.0, np.float32), eta=1.0)
    found = equal_steps(process, steps)
    assert float(found.mean()) == pytest.approx(1.0, rel=1e-5)
    factors = []  # of a log-prob's gradient in the network's output
    for a, a_prev, std in ((0.0057755001, 0.0072817271, 0.45446327), (0.99829603, 0.99915000, 0.020648320)):
        direction = np.sqrt(1 - a_prev - std**2)
        of_eps = direction - np.sqrt(a_prev) * np.sqrt(1 - a) / np.sqrt(a)
        of_v = direction * np.sqrt(a) - np.sqrt(a_prev) * np.sqrt(1 - a)
        factors.append(abs(of_eps if prediction_type == "epsilon" else of_v) / std)
    assert float(found[-1] / found[0]) == pytest.approx(factors[0] / factors[1], rel=2e-2)


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
