"""Checks a run's settings before anything is loaded: each mistake is one line that says what is accepted."""

from typing import Any

from ml_collections import ConfigDict

from diffexp_jax import InputError
from diffexp_jax.algorithms import METHODS
from diffexp_jax.limits import one_of, within
from diffexp_jax.models.precision import DTYPES, MATMUL_PRECISIONS
from diffexp_jax.parallel import Split, split_batch
from diffexp_jax.prompts.units import UNITS

CHOICES = {
    "model.dtype": ("auto", *DTYPES),
    "model.matmul_precision": MATMUL_PRECISIONS,
    "model.remat": ("none", "step", "block"),
    "reward_dtype": DTYPES,
    "eval.reward_dtype": DTYPES,
    "exploration.unit": UNITS,
}
RANGES = {
    "iterations": (1,),
    "model.vae_slice": (1,),
    "sampling.steps": (1, 1000),
    "sampling.eta": (0, 1),
    "exploration.t_thresh": (0, 1000),
    "exploration.fraction": (0, 1),
    "lora.rank": (1,),
    "batch.group": (1,),
    "checkpoint.every": (1,),
    "checkpoint.keep": (1,),
    "eval.samples_per_prompt": (1,),
    "eval.every": (0,),
    "log.images": (0,),
    "log.images_every": (0,),
}


def check_config(config: ConfigDict) -> None:
    """Raises InputError for the first setting that cannot work, before anything is loaded."""

    def value(key):
        section, _, name = key.rpartition(".")
        return config[section][name] if section else config[name]

    one_of("algorithm", config.algorithm, METHODS)
    for key, accepted in CHOICES.items():
        one_of(key, value(key), accepted)
    for key, limits in RANGES.items():
        within(key, value(key), *limits)
    weights, size = tuple(config.exploration.weight_range), config.model.image_size
    if len(weights) != 2 or not all(isinstance(w, int | float) for w in weights) or weights[0] > weights[1]:
        raise InputError(f"exploration.weight_range={weights}: wants (low, high) with low <= high")
    if size is not None and (size < 8 or size % 8):
        raise InputError(f"model.image_size={size}: wants a multiple of 8 pixels")
    method = METHODS[config.algorithm]
    method.check(method_settings(config), config.sampling.steps)
    if method.needs.step_noise and config.sampling.eta == 0:
        raise InputError(
            f"sampling.eta=0: {method.name} needs steps with noise (their log-probability); wants eta in (0, 1]"
        )
    if method.needs.groups and config.batch.group < 2:
        group = config.batch.group
        raise InputError(f"batch.group={group}: {method.name} compares samples of a prompt; wants at least 2")
    batch_split(config)


def method_settings(config: ConfigDict) -> dict[str, Any]:
    """The method's defaults, and what the config's section of its name says instead.

    Raises:
      InputError: the section has a key that the method does not know.
    """
    method, section = METHODS[config.algorithm], config.get(config.algorithm, {})
    for key in section:
        one_of(f"{method.name}: the key", key, method.defaults)
    return {key: section.get(key, default) for key, default in method.defaults.items()}


def batch_split(config: ConfigDict) -> Split:
    """How the configured batch is shared out.

    Raises:
      InputError: it does not divide.
    """
    b, updates = config.batch, METHODS[config.algorithm].updates(method_settings(config))
    if b.samples % b.group:
        raise InputError(f"batch.samples={b.samples}: wants a multiple of batch.group={b.group}")
    return split_batch(b.samples, per_forward=b.samples_per_forward, updates=updates)
