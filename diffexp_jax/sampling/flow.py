"""Flow matching with the stochastic steps of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470).

The latent at noise level s (1: noise, 0: image) is x_s = (1 - s) x_0 + s eps, and the network predicts the velocity
v = eps - x_0. Everything here is float32 whatever the network runs in.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from diffexp_jax.formats.config_keys import Keys, checked
from diffexp_jax.limits import Number, whole
from diffexp_jax.sampling.process import Process, check_n_steps

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_OFF = (False, None)
KEYS = Keys(
    read={"num_train_timesteps": whole(1, 10**5), "shift": Number(0.0, 1e3, above=True)},
    # what changes the noise levels, and is not done here
    only={
        "use_dynamic_shifting": _OFF,
        "invert_sigmas": _OFF,
        "use_karras_sigmas": _OFF,
        "use_exponential_sigmas": _OFF,
        "use_beta_sigmas": _OFF,
        "shift_terminal": _OFF,
        "stochastic_sampling": _OFF,
    },
    ignored=frozenset("base_shift max_shift base_image_seq_len max_image_seq_len time_shift_type".split()),
)


class Steps(NamedTuple):
    """A sampling run, a row per step, noise first; see `process.Process`."""

    t: Float[Array, "T"]  # 1000 times the noise level
    level: Float[Array, "T"]  # s, the noise level of x_t
    change: Float[Array, "T"]  # of the noise level, negative
    drift: Float[Array, "T"]  # how strongly the step corrects for the noise that it adds
    sigma_t: Float[Array, "T"]  # std of that noise
    w_t: Float[Array, "T"]  # classifier-free guidance scale


def flow_matching(config: Mapping[str, Any]) -> Process:
    """The process of a FlowMatchEulerDiscreteScheduler's config.

    Raises:
      InputError: a setting that is not implemented.
    """
    known = checked(config, KEYS, "scheduler_config.json")
    n_train, shift = known.get("num_train_timesteps", 1000), known.get("shift", 1.0)
    return Process(
        timesteps=partial(timesteps, n_train=n_train, shift=shift),
        make_steps=partial(make_steps, n_train=n_train),
        transition=transition,
        add_noise=add_noise,
        target=lambda x_0, eps, row: eps - x_0,
        training_row=partial(training_row, n_train=n_train),
        n_train=n_train,
    )


def shifted(level: Float[np.ndarray, "T"] | float, shift: float) -> Float[np.ndarray, "T"] | float:
    """Noise levels moved towards 1, for images larger than the model's first ones (Esser et al. 2024, Eq. 23)."""
    return shift * level / (1.0 + (shift - 1.0) * level)


def timesteps(n_steps: int, *, n_train: int, shift: float) -> Float[np.ndarray, "T"]:
    """The timesteps of diffusers: evenly spaced from 1 to the smallest shifted level, then shifted (again).

    Raises:
      InputError: more steps than the schedule has, or none.
    """
    check_n_steps(n_steps, n_train)
    smallest = shifted(1.0 / n_train, shift)
    return (n_train * shifted(np.linspace(1.0, smallest, n_steps), shift)).astype(np.float32)


def make_steps(t: Float[np.ndarray, "T"], w_t: Float[Array, "T"], *, eta: float, n_train: int) -> Steps:
    """Everything that the steps of a run need.

    The noise of Flow-GRPO's Eq. 9: g(s) = eta sqrt(s / (1 - s)), with the second level in place of the first where that
    is 1; a step from s to s' adds noise of std g sqrt(s - s').
    """
    level = np.asarray(t, np.float64) / n_train
    change = np.append(level[1:], 0.0) - level
    below_1 = np.where(level < 1.0, level, level[1] if len(level) > 1 else 0.5)
    g = eta * np.sqrt(level / (1.0 - below_1))
    columns = (t, level, change, np.square(g) / (2.0 * level), g * np.sqrt(-change), w_t)
    return Steps(*(jnp.asarray(column, jnp.float32) for column in columns))


class TrainingRow(NamedTuple):
    """A noise level to train at; see `process.Process`."""

    t: Float[Array, "*B"]
    level: Float[Array, "*B"]
    w_t: Float[Array, "*B"]


def training_row(t: Num[Array, "*B"], *, n_train: int) -> TrainingRow:
    """t is n_train times the noise level, in (0, n_train]; it is not shifted (`shifted`)."""
    t = jnp.asarray(t, jnp.float32)
    return TrainingRow(t, t / n_train, jnp.ones(t.shape))


def add_noise(
    x_0: Float[Array, "B h w c"], eps: Float[Array, "B h w c"], row: Steps | TrainingRow
) -> Float[Array, "B h w c"]:
    """x_s = (1 - s) x_0 + s eps."""
    level = jnp.reshape(row.level, (-1, 1, 1, 1))
    return (1.0 - level) * x_0 + level * eps


def transition(
    x_t: Float[Array, "B h w c"], out: Float[Array, "B h w c"], step: Steps
) -> tuple[Float[Array, "B h w c"], Float[Array, ""]]:
    """Mean and std of Flow-GRPO's Eq. 9; with eta 0 the Euler step x + v ds of the flow.

    mean = x_s + [v + g^2 / (2 s) (x_s + (1 - s) v)] ds. `step` is one row of Steps, `out` the guided velocity.
    """
    towards = out + step.drift * (x_t + (1.0 - step.level) * out)
    return x_t + towards * step.change, step.sigma_t
