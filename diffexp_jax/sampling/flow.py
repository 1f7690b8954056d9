"""Flow matching with stochastic steps: those of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) and of others.

The latent at noise level s (1: noise, 0: image) is x_s = (1 - s) x_0 + s eps, and the network predicts the velocity
v = eps - x_0. Everything here is float32 whatever the network runs in.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from diffexp_jax.errors import InputError
from diffexp_jax.formats.config_keys import Keys, checked
from diffexp_jax.limits import Number, whole
from diffexp_jax.sampling.process import Process, check_n_steps

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_OFF = (False, None)
KEYS = Keys(
    read={
        "num_train_timesteps": whole(1, 10**5),
        "shift": Number(0.0, 1e3, above=True),
        # the shift by the image's size
        "use_dynamic_shifting": bool,
        "time_shift_type": ("exponential", "linear"),
        "base_shift": Number(-100.0, 100.0),
        "max_shift": Number(-100.0, 100.0),
        "base_image_seq_len": whole(1, 2**24),
        "max_image_seq_len": whole(1, 2**24),
    },
    # what changes the noise levels, and is not done here
    only={
        "invert_sigmas": _OFF,
        "use_karras_sigmas": _OFF,
        "use_exponential_sigmas": _OFF,
        "use_beta_sigmas": _OFF,
        "shift_terminal": _OFF,
        "stochastic_sampling": _OFF,
    },
)


class Steps(NamedTuple):
    """A sampling run, a row per step, noise first; see `process.Process`."""

    t: Float[Array, "T"]  # 1000 times the noise level
    level: Float[Array, "T"]  # s, the noise level of x_t
    dt: Float[Array, "T"]  # by how much the step lowers the noise level
    drift: Float[Array, "T"]  # how strongly the step corrects for the noise that it adds
    sigma_t: Float[Array, "T"]  # std of that noise
    w_t: Float[Array, "T"]  # classifier-free guidance scale


def flow_matching(config: Mapping[str, Any], *, tokens: int | None = None, to_1_over_n: bool = False) -> Process:
    """The process of a FlowMatchEulerDiscreteScheduler's config.

    Args:
      tokens: of an image, as the network reads it: what a dynamic shift depends on.
      to_1_over_n: whether n levels are evenly spaced from 1 to 1/n before they are shifted, as FLUX's pipeline has
        them; else as the scheduler has them by itself.

    Raises:
      InputError: a setting that is not implemented, or a dynamic shift where `tokens` is None.
    """
    known = checked(config, KEYS, "scheduler_config.json")
    n_train, shift, smallest = known.get("num_train_timesteps", 1000), known.get("shift", 1.0), None
    if known.get("use_dynamic_shifting"):
        if tokens is None:
            raise InputError("scheduler_config.json: use_dynamic_shifting=true is not supported in such a pipeline")
        shift, smallest = dynamic_shift(known, tokens), 1.0 / n_train
    return Process(
        timesteps=partial(timesteps, n_train=n_train, shift=shift, smallest=smallest, to_1_over_n=to_1_over_n),
        make_steps=partial(make_steps, n_train=n_train),
        transition=transition,
        add_noise=add_noise,
        target=lambda x_0, eps, row: eps - x_0,
        training_row=partial(training_row, n_train=n_train),
        noise_level=lambda t: np.asarray(t, np.float64) / n_train,
        n_train=n_train,
    )


def dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """The shift for images of so many tokens: exp(mu), mu linear in them; or mu, where time_shift_type is "linear"."""
    low, high = (config.get(f"{end}_image_seq_len", n) for end, n in (("base", 256), ("max", 4096)))
    at_low, at_high = (config.get(f"{end}_shift", mu) for end, mu in (("base", 0.5), ("max", 1.15)))
    mu = at_low + (at_high - at_low) / (high - low) * (tokens - low)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def shifted(level: Float[np.ndarray, "T"] | float, shift: float) -> Float[np.ndarray, "T"] | float:
    """Noise levels moved towards 1, for images larger than the model's first ones (Esser et al. 2024, Eq. 23)."""
    return shift * level / (1.0 + (shift - 1.0) * level)


def timesteps(
    n_steps: int, *, n_train: int, shift: float, smallest: float | None = None, to_1_over_n: bool = False
) -> Float[np.ndarray, "T"]:
    """The timesteps of diffusers: evenly spaced from 1 to the smallest level, then shifted.

    Args:
      smallest: that level; None: as shifted (so it is shifted twice).
      to_1_over_n: the smallest level is 1/n.

    Raises:
      InputError: more steps than the schedule has, or none.
    """
    check_n_steps(n_steps, n_train)
    if to_1_over_n:
        smallest = 1.0 / n_steps
    elif smallest is None:
        smallest = shifted(1.0 / n_train, shift)
    return (n_train * shifted(np.linspace(1.0, smallest, n_steps), shift)).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------- noise

# Each gives (drift, std) of steps from level s to `after` [T], see `transition`; eta [T] is the noise's strength.


def sde(s, after, eta):
    """Flow-GRPO's Eq. 9: g = eta sqrt(s / (1 - s)), with the second level in place of the first where that is 1.

    drift = g^2 / (2 s), std = g sqrt(s - s').
    """
    below_1 = np.where(s < 1.0, s, after[0] if len(s) > 1 else 0.5)
    g = eta * np.sqrt(s / (1.0 - below_1))
    return np.square(g) / (2.0 * s), g * np.sqrt(s - after)


def dance(s, after, eta):
    """DanceGRPO (Xue et al. 2025, arXiv 2505.07818): drift = eta^2 / (2 s), std = eta sqrt(s - s')."""
    return np.square(eta) / (2.0 * s), eta * np.sqrt(s - after)


def cps(s, after, eta):
    """Coefficients-preserving sampling (Wang and Yu 2025, arXiv 2509.05952): std = s' sin(eta pi / 2)."""
    return _preserving(s, after, after * np.sin(eta * np.pi / 2.0))


def precise(s, after, eta):
    """Precise (arXiv 2605.23522): std = s' sqrt(1 - (s' (1 - s) / (s (1 - s')))^(eta^2)), also at s = 1."""
    kept = np.power(after * (1.0 - s) / (s * (1.0 - after)), np.square(eta))
    return _preserving(s, after, after * np.sqrt(1.0 - kept))


def _preserving(s, after, std):
    """What leaves noise of s' in all: what is not new is the old noise's, sqrt(s'^2 - std^2) of it."""
    return (after - np.sqrt(np.square(after) - np.square(std))) / (s - after), std


NOISES: dict[str, Callable] = {"sde": sde, "dance": dance, "cps": cps, "precise": precise}
CLEAN_ENDS = ("cps", "precise")  # they add no noise in a step that ends at none


def make_steps(
    t: Float[np.ndarray, "T"],
    w_t: Float[Array, "T"],
    *,
    eta: float | Float[np.ndarray, "T"],
    noise: str = "sde",
    n_train: int,
) -> Steps:
    """Everything that the steps of a run need.

    Raises:
      InputError: an eta of more than 1, for "cps".
    """
    eta = np.broadcast_to(eta, np.shape(t))
    if noise == "cps" and np.any(eta > 1.0):
        raise InputError(f"eta={eta.max():g}: sampling.noise='cps' wants 0..1")
    level = np.asarray(t, np.float64) / n_train
    after = np.append(level[1:], 0.0)
    drift, std = NOISES[noise](level, after, eta)
    return Steps(*(jnp.asarray(column, jnp.float32) for column in (t, level, level - after, drift, std, w_t)))


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
    """Mean and std of a step of the flow; without noise the Euler step x + v ds, ds = s' - s.

    mean = x_s + [v + drift (x_s + (1 - s) v)] ds, whose inner bracket is the noise eps that v says. `step` is one row
    of Steps, `out` the guided velocity.
    """
    towards = out + step.drift * (x_t + (1.0 - step.level) * out)
    return x_t - towards * step.dt, step.sigma_t
