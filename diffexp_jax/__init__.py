"""Reward fine-tuning of text-to-image diffusion models in JAX, with the exploration method of DiffExp.

import diffexp_jax as dx

model = dx.load("emoji")
dx.grid(model.images(["a dog riding a bike"])).save("dog.png")

`api.py` has what is there by dx.NAME; it is imported at its first use.
"""

import importlib
from typing import Any

from diffexp_jax.version import VERSION as __version__

_API = ("Evaluator", "InputError", "Stopped", "config", "export_lora", "fine_tune", "grid", "load", "metrics")
__all__ = [*_API, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(importlib.import_module("diffexp_jax.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_API])
