"""Checks a run's settings before anything is loaded: each mistake is one line that says what is accepted."""

from typing import Any

import jax
import numpy as np

from diffexp_jax import InputError
from diffexp_jax.algorithms import METHODS
from diffexp_jax.limits import one_of, within
from diffexp_jax.models.precision import DTYPES, MATMUL_PRECISIONS
from diffexp_jax.prompts.units import UNITS
from diffexp_jax.sampling import Steps

REMAT = ("none", "step", "block")


def check_config(c) -> None:
    """Raises InputError for the first setting that cannot work; `c` is a config of configs/common.py."""
    one_of("algorithm", c.algorithm, METHODS)
    one_of("model.dtype", c.model.dtype, ("auto", *DTYPES))
    one_of("model.matmul_precision", c.model.matmul_precision, MATMUL_PRECISIONS)
    one_of("reward_dtype", c.reward_dtype, DTYPES)
    one_of("eval.reward_dtype", c.eval.reward_dtype, DTYPES)
    one_of("model.remat", c.model.remat, REMAT)
    one_of("exploration.unit", c.exploration.unit, UNITS)
    within("iterations", c.iterations, 1)
    within("model.vae_slice", c.model.vae_slice, 1)
    within("sampling.steps", c.sampling.steps, 1, 1000)
    within("sampling.eta", c.sampling.eta, 0, 1)
    within("exploration.t_thresh", c.exploration.t_thresh, 0, 1000)
    within("exploration.fraction", c.exploration.fraction, 0, 1)
    within("lora.rank", c.lora.rank, 1)
    within("checkpoint.every", c.checkpoint.every, 1)
    within("checkpoint.keep", c.checkpoint.keep, 1)
    within("eval.samples_per_prompt", c.eval.samples_per_prompt, 1)
    within("log.images", c.log.images, 0)
    within("log.images_every", c.log.images_every, 0)
    within("eval.every", c.eval.every, 0)
    weights = tuple(c.exploration.weight_range)
    if len(weights) != 2 or not all(isinstance(w, int | float) for w in weights) or weights[0] > weights[1]:
        raise InputError(f"exploration.weight_range={weights}: wants (low, high) with low <= high")
    if c.model.image_size is not None and (c.model.image_size < 8 or c.model.image_size % 8):
        raise InputError(f"model.image_size={c.model.image_size}: wants a multiple of 8 pixels")
    method = METHODS[c.algorithm]
    method.check(method_settings(c), c.sampling.steps)
    if method.needs.step_noise and c.sampling.eta == 0:
        raise InputError(
            f"sampling.eta=0: {method.name} needs steps with noise (their log-probability); wants eta in (0, 1]"
        )
    batch_split(c)


def method_settings(c) -> dict[str, Any]:
    """The section of the configured algorithm."""
    return c[c.algorithm].to_dict()


def check_noise(c, steps: Steps) -> None:
    """Raises InputError where a step adds no noise, hence has no log-probability, and the method needs it."""
    if METHODS[c.algorithm].needs.step_noise and not np.all(np.asarray(steps.sigma_t) > 0):
        raise InputError(
            "scheduler_config.json: a step adds no noise, and "
            f"{c.algorithm} needs some at every step; "
            "wants steps_offset=1 and set_alpha_to_one=false"
        )


def batch_split(c) -> tuple[int, int]:
    """(chunks per device, samples per chunk) of an iteration.

    Raises:
      InputError: the samples do not divide among devices, forward passes and updates.
    """
    devices, samples, per_forward = jax.device_count(), c.batch.samples, c.batch.samples_per_forward
    within("batch.samples", samples, 1)
    within("batch.samples_per_forward", per_forward, 1)
    if samples % devices:
        raise InputError(f"batch.samples={samples}: wants a multiple of the {devices} devices")
    updates = METHODS[c.algorithm].updates(method_settings(c))
    if samples % (devices * updates):
        raise InputError(f"batch.samples={samples}: wants a multiple of devices x updates = {devices} x {updates}")
    share = samples // (devices * updates)  # what a device handles before the weights change
    chunk = min(share, per_forward)
    if share % chunk:
        raise InputError(
            f"batch.samples_per_forward={per_forward}: wants a divisor of the {share} samples that a device handles "
            f"per update ({samples} samples, {devices} devices, {updates} updates)"
        )
    return samples // devices // chunk, chunk
