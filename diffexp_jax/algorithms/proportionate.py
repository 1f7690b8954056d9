"""Proportionate credit: every step of a chain counts alike (PCPO, Lee and Ye 2025, arXiv 2509.25774)."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffexp_jax.sampling import Process, Steps, noisy_rows


def log_hinge_loss(
    log_prob: Float[Array, "B"], old_log_prob: Float[Array, "B"], adv: Float[Array, "B"], *, clip: float
) -> Float[Array, ""]:
    """mean of max(0, clip |A| - A log rho), rho = p / p_old (PCPO, Lee and Ye 2025, arXiv 2509.25774).

    The gradient is that of -A log p, until log rho has moved by `clip` to where the advantage leads.
    """
    chex.assert_equal_shape((log_prob, old_log_prob, adv))
    return jnp.maximum(0.0, clip * jnp.abs(adv) - adv * (log_prob - old_log_prob)).mean()


def equal_steps(process: Process, steps: Steps) -> Float[Array, "T"]:
    """Weights of mean 1 by which every step's network output counts alike (PCPO): w_t = sigma_t / C_t, scaled.

    C_t is the slope of the step's mean in the network's output: a log-prob's gradient in the output is C_t / sigma_t
    times a standard normal number. The mean of 1 is ours.
    """

    def slope(row):
        zero = jnp.zeros((1, 1, 1, 1))
        (at_1, std), (at_0, _) = process.transition(zero, zero + 1.0, row), process.transition(zero, zero, row)
        return jnp.abs(at_1 - at_0).mean() / std

    weights = 1.0 / jax.vmap(slope)(steps)
    return weights / weights.mean()


def weights_of_steps(
    process: Process, steps: Steps, n_trained: int | None, confined: bool, proportionate: bool | None
) -> Float[Array, "T"]:
    """Of the steps that are learnt from, see `policy_gradient.sample`: `equal_steps`, or ones."""
    rows = noisy_rows(steps, steps, n_trained) if confined else steps
    return (equal_steps(process, rows) if proportionate else jnp.ones(len(rows.t)))[:n_trained]
