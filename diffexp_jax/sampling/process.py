"""What a sampling process is, and the only place where a step's log-prob is made."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from diffexp_jax.errors import InputError


class Process(NamedTuple):
    """How a network's outputs turn noise into a latent, step by step. Made from a model's scheduler_config.json.

    `timesteps(n)` gives the n steps' timesteps [T] in training units (0..1000), noise first.
    `make_steps(t, w_t, eta=, noise=)` gives all that these steps need, as a NamedTuple of columns [T]. Four of them
    every process has: `t`, the network's timestep; `w_t`, the guidance scale; `sigma_t`, the std of the noise that the
    step adds; `dt`, the step's length, of 1 for the whole chain. `eta`, a number or one for each step, is the noise's
    strength (0 is none), `noise` the rule that it is added by (`flow.NOISES`; "sde" is what a process with one has).
    `transition(x_t, out, row)` gives the mean [B h w c] and the std [] of p(x_{t-1} | x_t), from the network's guided
    output and one row of the steps. What the network predicts is known here and nowhere else.
    `add_noise(x_0, eps, row)` gives x_t at the row's noise level, by the forward process.
    `target(x_0, eps, row)` gives what the network is trained to predict there [B h w c], from that x_t.
    `training_row(t)` is such a row for any timesteps, [] or one for each sample [B]: not of a run's steps, without
    guidance (w_t is 1). `n_train` is how many timesteps a model is trained at: t may be 1, 2, ... n_train - 1.
    `noise_level(t)` gives s [T] of x_t = c ((1 - s) x_0 + s eps): 1 is noise, 0 an image, the same for every process.
    """

    timesteps: Callable[[int], Int[np.ndarray, "T"]]
    make_steps: Callable[..., Any]
    transition: Callable[
        [Float[Array, "B h w c"], Float[Array, "B h w c"], Any], tuple[Float[Array, "B h w c"], Float[Array, ""]]
    ]
    add_noise: Callable[[Float[Array, "B h w c"], Float[Array, "B h w c"], Any], Float[Array, "B h w c"]]
    target: Callable[[Float[Array, "B h w c"], Float[Array, "B h w c"], Any], Float[Array, "B h w c"]]
    training_row: Callable[[Num[Array, "*B"]], Any]
    noise_level: Callable[[Num[np.ndarray, "T"]], Float[np.ndarray, "T"]]
    n_train: int


def check_n_steps(n_steps: int, n_train: int) -> None:
    """Raises InputError for no steps, or more than the noise schedule has."""
    if not 1 <= n_steps <= n_train:
        raise InputError(f"{n_steps} sampling steps; accepted: 1 to {n_train}, the steps of the model's noise schedule")


def gaussian_log_prob(
    x: Float[Array, "B h w c"], mean: Float[Array, "B h w c"], std: Float[Array, ""]
) -> Float[Array, "B"]:
    """log N(x; mean, std^2 I), averaged (not summed) over h, w, c: DDPO's clip range of 1e-4 assumes the mean.

    `x` and the std are given; the gradient goes through the mean. 0, without a gradient, where the std is 0.
    """
    is_noisy, std = std > 0, jnp.where(std > 0, std, 1.0)
    log_prob = -jnp.square(x - mean) / (2.0 * jnp.square(std)) - jnp.log(std) - 0.5 * jnp.log(2.0 * jnp.pi)
    return jnp.where(is_noisy, log_prob.mean(axis=(1, 2, 3)), 0.0)


def gaussian_kl(
    mean: Float[Array, "B h w c"], reference: Float[Array, "B h w c"], std: Float[Array, ""]
) -> Float[Array, "B"]:
    """KL(N(mean, std^2 I) || N(reference, std^2 I)) = |mean - reference|^2 / (2 std^2), averaged over h, w, c.

    The average, not the sum, as of the log-probs: of a latent of 4 x 64 x 64 numbers the sum is 16,384 times as much.
    0, without a gradient, where the std is 0: of a step without noise there is none.
    """
    is_noisy, std = std > 0, jnp.where(std > 0, std, 1.0)
    kl = (jnp.square(mean - reference) / (2.0 * jnp.square(std))).mean(axis=(1, 2, 3))
    return jnp.where(is_noisy, kl, 0.0)


def sample_noise(keys: jax.Array, shape: tuple[int, ...]) -> Float[Array, "B h w c"]:
    """Standard normal noise, one key per sample."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
