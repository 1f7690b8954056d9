"""What a run's report says besides its settings: versions, devices, each step's guidance, a prompt's units."""

import importlib.metadata
import platform
from functools import partial
from typing import Any

import jax
import numpy as np

from diffexp_jax import backend, exploration, parallel
from diffexp_jax.experiment import Experiment
from diffexp_jax.version import VERSION

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_DRAWS = 4


def describe(experiment: Experiment) -> dict[str, Any]:
    """What can be written as json; the machine's part is of this start, the rest is the same for the whole run."""
    return {
        "versions": versions(),
        "devices": devices(),
        "schedule": schedule(experiment),
        "prompt": prompt(experiment),
        "lora_prefix": experiment.sampler.pipeline.lora_prefix,
    }


def versions() -> dict[str, str]:
    """The versions of Python, of this package as it runs, and of the installed packages that compute."""
    found = {"python": platform.python_version(), "diffexp_jax": VERSION}
    return found | {name: importlib.metadata.version(name) for name in _PACKAGES}


def devices() -> dict[str, str]:
    """Which, how many, and on what kind of machine."""
    here = jax.devices()
    machine = f"{platform.system()} {platform.machine()}"
    kind = " ".join(dict.fromkeys([backend.platform(), here[0].device_kind]))  # a CPU has no other name
    return {"device": kind, "devices": str(len(here)), "machine": machine}


def schedule(experiment: Experiment) -> dict[str, list[float]]:
    """Of each step, noise first: what t_thresh of Eq. 7 is compared with, and the guidance while exploring [T]."""
    steps = experiment.sampler.steps(explore=True)
    return {"t": experiment.sampler.noise_left().tolist(), "w_t": np.asarray(steps.w_t).tolist()}


def prompt(experiment: Experiment) -> dict[str, Any]:
    """A prompt from the middle of the training set, cut into its units, and units with weights as Eq. 8 draws them."""
    row = len(experiment.train.texts) // 2
    text, units = experiment.train.texts[row], experiment.units[row]
    pieces = experiment.sampler.pipeline.units_of_text(text, units)
    low, high = weight_range = experiment.sampler.exploration.weight_range
    draws = []
    if units.any() and not low == high == 1.0:
        draw = jax.vmap(partial(exploration.sample_phrase_weights, weight_range=weight_range), in_axes=(0, None))
        key = parallel.stream(experiment.settings.seed, "about")
        for weights in np.asarray(jax.jit(lambda: draw(jax.random.split(key, _DRAWS), units))()):
            chosen = int(np.abs(weights - 1.0).argmax())
            draws.append((int(units[chosen]), float(weights[chosen])))
    return {"pieces": pieces, "draws": draws}
