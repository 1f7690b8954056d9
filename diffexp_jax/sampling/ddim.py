"""DDIM (Song et al. 2021) on the noise schedules of Stable Diffusion: the paper's process.

Latents are [B, h, w, c]; everything here is float32 whatever the network runs in. Timesteps t count 0..999, noise last.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffexp_jax.errors import InputError
from diffexp_jax.formats.config_keys import Keys, Many, checked
from diffexp_jax.limits import Number, whole
from diffexp_jax.sampling.process import Process, check_n_steps


class NoiseSchedule(NamedTuple):
    """What a checkpoint's scheduler_config.json says, as numbers."""

    alpha_bar: np.ndarray  # float64 [n_train], cumulative product of 1 - beta
    final_alpha_bar: float  # of the step after the last: 1.0 or alpha_bar[0] (set_alpha_to_one)
    prediction_type: str = "epsilon"  # what the network predicts: "epsilon" or "v_prediction"
    steps_offset: int = 1
    spacing: str = "leading"  # or "trailing", "linspace"


class Steps(NamedTuple):
    """A sampling run by DDIM, a row per step, noise first; see `process.Process`."""

    t: Int[Array, "T"]
    alpha_bar_t: Float[Array, "T"]
    alpha_bar_prev: Float[Array, "T"]
    sigma_t: Float[Array, "T"]  # std of the noise that the step adds
    w_t: Float[Array, "T"]  # classifier-free guidance scale
    dt: Float[Array, "T"]  # the step's length, as a share of all timesteps


_BETAS = {
    "scaled_linear": lambda start, end, n: np.linspace(start**0.5, end**0.5, n) ** 2,
    "linear": np.linspace,
}
PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
# Whose noise schedule is DDIM's, so that DDIM can sample what was trained for them. Flow matching's, EDM's and those of
# distilled models (LCM, TCD) are others.
_SAMPLERS = ("DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete")
_SAMPLERS += ("DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep", "UniPCMultistep")
_SAMPLERS += ("KDPM2Discrete", "KDPM2AncestralDiscrete")
SCHEDULERS = tuple(f"{name}Scheduler" for name in _SAMPLERS)
CLIPPING = ("DDIMScheduler", "DDPMScheduler")  # these clip x_0 unless their config says clip_sample=false
# What diffusers' StableDiffusionPipeline sets, whatever the file says: files of its first versions left it out.
CORRECTIONS = {"steps_offset": 1, "clip_sample": False}

_BETA = Number(0.0, 1.0, above=True)
KEYS = Keys(
    read={
        "num_train_timesteps": whole(1, 10**5),
        "beta_start": _BETA,
        "beta_end": _BETA,
        "beta_schedule": tuple(_BETAS),
        "trained_betas": Many(_BETA),
        "prediction_type": PREDICTION_TYPES,
        "rescale_betas_zero_snr": bool,
        "set_alpha_to_one": bool,
        "steps_offset": whole(0, 10**5),
        "timestep_spacing": SPACINGS,
    },
    only={
        "clip_sample": (False, None),
        "thresholding": (False, None),
        "use_flow_sigmas": (False, None),
        "timestep_type": ("discrete", None),  # else the network reads noise levels in place of timesteps
    },
    # What only shapes another sampler's own steps, or goes with a setting that is refused.
    ignored=frozenset(
        "clip_sample_range sample_max_value dynamic_thresholding_ratio variance_type skip_prk_steps use_karras_sigmas "
        "use_exponential_sigmas use_beta_sigmas interpolation_type sigma_min sigma_max final_sigmas_type solver_order "
        "algorithm_type solver_type lower_order_final euler_at_final use_lu_lambdas lambda_min_clipped predict_x0 "
        "disable_corrector solver_p flow_shift use_dynamic_shifting time_shift_type shift_terminal "
        "noise_sampler_seed".split()
    ),
)


def ddim(config: Mapping[str, Any]) -> Process:
    """The process of a diffusers scheduler config.

    Raises:
      InputError: as `noise_schedule`.
    """
    schedule = noise_schedule(config)
    return Process(
        timesteps=partial(timesteps, schedule),
        make_steps=partial(make_steps, schedule),
        transition=partial(ddim_step, prediction_type=schedule.prediction_type),
        add_noise=lambda x_0, eps, row: add_noise(x_0, eps, jnp.broadcast_to(row.alpha_bar_t, len(x_0))),
        target=partial(target, prediction_type=schedule.prediction_type),
        training_row=partial(training_row, schedule),
        noise_level=partial(noise_level, schedule),
        n_train=len(schedule.alpha_bar),
    )


def noise_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of a diffusers scheduler config, read as DDIM's, whose defaults fill what it leaves out.

    All that says what the network was trained for is honoured or refused. What only shapes another sampler's own steps
    (Karras sigmas, solver orders, interpolation) has no meaning here: sampling is always by DDIM.

    Raises:
      InputError: a schedule, prediction type or spacing that is not known here, or a value that is not accepted.
    """
    config = dict(config)
    if config.get("_class_name") in CLIPPING:  # whose default clips
        config.setdefault("clip_sample", True)
    known = checked(config, KEYS, "scheduler_config.json")
    if "trained_betas" in known:
        betas = np.asarray(known["trained_betas"], np.float64)
    else:
        beta = _BETAS[known.get("beta_schedule", "linear")]
        betas = beta(known.get("beta_start", 1e-4), known.get("beta_end", 0.02), known.get("num_train_timesteps", 1000))
    alpha_bar = np.cumprod(1.0 - betas)
    prediction_type = known.get("prediction_type", "epsilon")
    if known.get("rescale_betas_zero_snr"):
        if prediction_type == "epsilon":  # x_0 = (x_t - eps) / 0 at the first step
            raise InputError("scheduler_config.json: rescale_betas_zero_snr=true wants prediction_type='v_prediction'")
        alpha_bar = _zero_terminal_snr(alpha_bar)
    least = -1.0 if prediction_type == "v_prediction" else 0.0
    falling = len(alpha_bar) > 1 and alpha_bar[0] < 1.0 and np.all(np.diff(alpha_bar) < 0)
    if not falling or not np.float32(alpha_bar[-1]) > least:
        raise InputError(
            f"scheduler_config.json: alpha_bar goes from {alpha_bar[0]:.3g} to {alpha_bar[-1]:.3g} over "
            f"{len(alpha_bar)} timesteps; wants it below 1 and falling at each, and above 0 at the last unless "
            "prediction_type is v_prediction (beta_start, beta_end, trained_betas, num_train_timesteps)"
        )
    return NoiseSchedule(
        alpha_bar=alpha_bar,
        final_alpha_bar=1.0 if known.get("set_alpha_to_one", True) else float(alpha_bar[0]),
        prediction_type=prediction_type,
        steps_offset=known.get("steps_offset", 0),
        spacing=known.get("timestep_spacing", "leading"),
    )


def _zero_terminal_snr(alpha_bar: np.ndarray) -> np.ndarray:
    """Rescales so that the last step is pure noise (Lin et al. 2024, Algorithm 1)."""
    root = np.sqrt(alpha_bar)
    return np.square((root - root[-1]) * root[0] / (root[0] - root[-1]))


def timesteps(schedule: NoiseSchedule, n_steps: int) -> Int[np.ndarray, "T"]:
    """The n_steps timesteps of a sampling run, decreasing: 981, 961, ..., 1 for 50 steps with offset 1.

    Raises:
      InputError: more steps than the schedule has, or none.
    """
    n = len(schedule.alpha_bar)
    check_n_steps(n_steps, n)
    if schedule.spacing == "linspace":
        return np.round(np.linspace(0, n - 1, n_steps))[::-1].astype(np.int32)
    if schedule.spacing == "trailing":
        return np.round(np.arange(n, 0, -n / n_steps)).astype(np.int32)[:n_steps] - 1
    return (np.arange(n_steps)[::-1] * (n // n_steps) + schedule.steps_offset).clip(0, n - 1).astype(np.int32)


def noise_level(schedule: NoiseSchedule, t: Int[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
    """s of x_t = c ((1 - s) x_0 + s eps): sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)), with a = alpha_bar_t."""
    signal, noise = np.sqrt(schedule.alpha_bar[t]), np.sqrt(1.0 - schedule.alpha_bar[t])
    return noise / (signal + noise)


def make_steps(
    schedule: NoiseSchedule,
    t: Int[np.ndarray, "T"],
    w_t: Float[Array, "T"],
    *,
    eta: float | Float[np.ndarray, "T"],
    noise: str = "sde",
) -> Steps:
    """Everything that the steps of a run need (Song et al. 2021, Eq. 16): sigma_t = eta sqrt(var).

    Raises:
      InputError: an eta of more than 1, or a rule of flow matching for the noise.
    """
    if noise != "sde":
        raise InputError(f"sampling.noise={noise!r}: is for models of flow matching (SD3, FLUX); wants 'sde'")
    if np.any(np.asarray(eta) > 1.0):
        raise InputError(f"eta={np.max(eta):g}: the model's steps are DDIM's, wants 0..1")
    alpha_bar_t = schedule.alpha_bar[t]
    length = len(schedule.alpha_bar) // len(t)
    prev_t = t - length
    alpha_bar_prev = np.where(prev_t >= 0, schedule.alpha_bar[np.maximum(prev_t, 0)], schedule.final_alpha_bar)
    sigma_t = eta * np.sqrt((1.0 - alpha_bar_prev) / (1.0 - alpha_bar_t) * (1.0 - alpha_bar_t / alpha_bar_prev))
    dt = np.full(len(t), length / len(schedule.alpha_bar))
    columns = (jnp.asarray(c, jnp.float32) for c in (alpha_bar_t, alpha_bar_prev, sigma_t, w_t, dt))
    return Steps(jnp.asarray(t, jnp.int32), *columns)


def add_noise(
    x_0: Float[Array, "B h w c"], eps: Float[Array, "B h w c"], alpha_bar_t: Float[Array, "B"]
) -> Float[Array, "B h w c"]:
    """The forward process of DiffExp Eq. 1: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps."""
    a = alpha_bar_t[:, None, None, None]
    return jnp.sqrt(a) * x_0 + jnp.sqrt(1.0 - a) * eps


class TrainingRow(NamedTuple):
    """A timestep to train at; see `process.Process`."""

    t: Int[Array, "*B"]
    alpha_bar_t: Float[Array, "*B"]
    w_t: Float[Array, "*B"]


def training_row(schedule: NoiseSchedule, t: Int[Array, "*B"]) -> TrainingRow:
    """t counts 0..n_train - 1."""
    t = jnp.asarray(t, jnp.int32)
    return TrainingRow(t, jnp.asarray(schedule.alpha_bar, jnp.float32)[t], jnp.ones(t.shape))


def target(
    x_0: Float[Array, "B h w c"], eps: Float[Array, "B h w c"], row: TrainingRow, prediction_type: str = "epsilon"
) -> Float[Array, "B h w c"]:
    """eps itself, or v = sqrt(a) eps - sqrt(1-a) x_0 (Salimans & Ho 2022): the inverse of `predictions`."""
    if prediction_type == "v_prediction":
        a = jnp.reshape(row.alpha_bar_t, (-1, 1, 1, 1))
        return jnp.sqrt(a) * eps - jnp.sqrt(1.0 - a) * x_0
    return eps


def predictions(
    out: Float[Array, "B h w c"], x_t: Float[Array, "B h w c"], alpha_bar_t: Float[Array, ""], prediction_type: str
) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
    """(x_0, eps) from the network's output: eps itself, or v = sqrt(a) eps - sqrt(1-a) x_0 (Salimans & Ho 2022)."""
    signal, noise = jnp.sqrt(alpha_bar_t), jnp.sqrt(1.0 - alpha_bar_t)
    if prediction_type == "v_prediction":
        return signal * x_t - noise * out, signal * out + noise * x_t
    return (x_t - noise * out) / signal, out


def ddim_step(
    x_t: Float[Array, "B h w c"], out: Float[Array, "B h w c"], step: Steps, prediction_type: str = "epsilon"
) -> tuple[Float[Array, "B h w c"], Float[Array, ""]]:
    """Mean and std of p_theta(x_{t-1} | x_t, c), DiffExp Eq. 2-3 realised by DDIM (Song et al. 2021, Eq. 12).

    mean = sqrt(a_prev) x_0 + sqrt(1 - a_prev - std^2) eps. `step` is one row of Steps (scalars), `out` the guided
    output of the network.
    """
    x_0, eps = predictions(out, x_t, step.alpha_bar_t, prediction_type)
    direction = jnp.sqrt(jnp.maximum(1.0 - step.alpha_bar_prev - jnp.square(step.sigma_t), 0.0))
    return jnp.sqrt(step.alpha_bar_prev) * x_0 + direction * eps, step.sigma_t


def min_snr_weight(alpha_bar_t: Float[Array, "B"], gamma: float = 5.0) -> Float[Array, "B"]:
    """Min-SNR-gamma weight of the eps loss (Hang et al. 2023): min(SNR, gamma) / SNR."""
    snr = alpha_bar_t / (1.0 - alpha_bar_t)
    return jnp.minimum(snr, gamma) / snr
