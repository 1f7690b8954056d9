"""Checks a run's settings before anything is loaded: each mistake is one line that says what is accepted."""

import jax
import numpy as np

from diffexp_jax import InputError
from diffexp_jax.algorithms.alignprop import TRUNCATIONS
from diffexp_jax.algorithms.ddpo import OLD_LOG_PROBS
from diffexp_jax.diffusion import Steps
from diffexp_jax.models.precision import DTYPES, MATMUL_PRECISIONS
from diffexp_jax.prompts.units import UNITS

ALGORITHMS = ("alignprop", "ddpo")
REMAT = ("none", "step", "block")


def check_config(c) -> None:
    """Raises InputError for the first setting that cannot work; `c` is a config of configs/common.py."""
    _one_of("algorithm", c.algorithm, ALGORITHMS)
    _one_of("model.dtype", c.model.dtype, ("auto", *DTYPES))
    _one_of("model.matmul_precision", c.model.matmul_precision, MATMUL_PRECISIONS)
    _one_of("reward_dtype", c.reward_dtype, DTYPES)
    _one_of("eval.reward_dtype", c.eval.reward_dtype, DTYPES)
    _one_of("model.remat", c.model.remat, REMAT)
    _one_of("ddpo.old_log_prob", c.ddpo.old_log_prob, ("auto", *OLD_LOG_PROBS))
    _one_of("exploration.unit", c.exploration.unit, UNITS)
    _one_of("alignprop.truncation", c.alignprop.truncation, TRUNCATIONS)
    _within("iterations", c.iterations, 1)
    _within("model.vae_slice", c.model.vae_slice, 1)
    _within("sampling.steps", c.sampling.steps, 1, 1000)
    _within("sampling.eta", c.sampling.eta, 0, 1)
    _within("exploration.t_thresh", c.exploration.t_thresh, 0, 1000)
    _within("exploration.fraction", c.exploration.fraction, 0, 1)
    _within("lora.rank", c.lora.rank, 1)
    _within("alignprop.truncation_k", c.alignprop.truncation_k, 1, c.sampling.steps)
    _within("checkpoint.every", c.checkpoint.every, 1)
    _within("checkpoint.keep", c.checkpoint.keep, 1)
    _within("ddpo.updates", c.ddpo.updates, 1)
    _within("ddpo.inner_epochs", c.ddpo.inner_epochs, 1)
    _within("ddpo.stats_min_count", c.ddpo.stats_min_count, 1, c.ddpo.stats_buffer)
    _within("eval.samples_per_prompt", c.eval.samples_per_prompt, 1)
    _within("log.images", c.log.images, 0)
    _within("log.images_every", c.log.images_every, 0)
    _within("eval.every", c.eval.every, 0)
    weights = tuple(c.exploration.weight_range)
    if len(weights) != 2 or not all(isinstance(w, int | float) for w in weights) or weights[0] > weights[1]:
        raise InputError(f"exploration.weight_range={weights}: wants (low, high) with low <= high")
    if c.model.image_size is not None and (c.model.image_size < 8 or c.model.image_size % 8):
        raise InputError(f"model.image_size={c.model.image_size}: wants a multiple of 8 pixels")
    if c.algorithm == "ddpo" and c.sampling.eta == 0:
        raise InputError("sampling.eta=0: ddpo needs steps with noise (their log-probability); wants eta in (0, 1]")
    batch_split(c)


def check_noise(c, steps: Steps) -> None:
    """Raises InputError where DDPO would have to sample a step without noise: such a step has no log-probability."""
    if c.algorithm == "ddpo" and not np.all(np.asarray(steps.sigma_t) > 0):
        raise InputError(
            "scheduler_config.json: a step adds no noise, and ddpo needs some at every step; "
            "wants steps_offset=1 and set_alpha_to_one=false"
        )


def batch_split(c) -> tuple[int, int]:
    """(chunks per device, samples per chunk) of an iteration.

    Raises:
      InputError: the samples do not divide among devices, forward passes and (DDPO) updates.
    """
    devices, samples, per_forward = jax.device_count(), c.batch.samples, c.batch.samples_per_forward
    _within("batch.samples", samples, 1)
    _within("batch.samples_per_forward", per_forward, 1)
    if samples % devices:
        raise InputError(f"batch.samples={samples}: wants a multiple of the {devices} devices")
    updates = c.ddpo.updates if c.algorithm == "ddpo" else 1
    if samples % (devices * updates):
        raise InputError(f"batch.samples={samples}: wants a multiple of devices x ddpo.updates = {devices} x {updates}")
    share = samples // (devices * updates)  # what a device handles before the weights change
    chunk = min(share, per_forward)
    if share % chunk:
        raise InputError(
            f"batch.samples_per_forward={per_forward}: wants a divisor of the {share} samples that a device handles "
            f"per update ({samples} samples, {devices} devices, {updates} updates)"
        )
    return samples // devices // chunk, chunk


def _one_of(key: str, value, accepted) -> None:
    if value not in accepted:
        raise InputError(f"{key}={value!r}: accepted: {', '.join(accepted)}")


def _within(key: str, value, low, high=None) -> None:
    if value < low or (high is not None and value > high):
        raise InputError(f"{key}={value}: wants {f'at least {low}' if high is None else f'{low}..{high}'}")
