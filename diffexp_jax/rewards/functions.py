"""The user's own rewards, named by MODULE:FUNCTION: a function of JAX with a gradient, or plain Python."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from diffexp_jax import InputError
from diffexp_jax.rewards.host import host_reward
from diffexp_jax.rewards.preprocess import as_floats
from diffexp_jax.rewards.reward import Reward, no_tokens, of_pixels


def from_jax(location: str) -> Reward:
    """The reward of a pure function f(images in [0,1], [B,H,W,3]) -> [B], or a `Reward` (with parameters, or prompts).

    Raises:
      InputError: there is no such thing at MODULE:FUNCTION; later, while tracing, it returns another shape.
    """
    function = _find(location)
    if isinstance(function, Reward):
        return function

    def score_prepared(params, images: Float[Array, "B H W 3"], tokens) -> tuple[Float[Array, " B"], dict]:
        del params, tokens
        scores = jnp.asarray(function(images))
        if scores.shape != images.shape[:1]:
            raise InputError(
                f"reward jax:{location}: returned shape {list(scores.shape)} for {len(images)} images; wants "
                f"[{len(images)}]"
            )
        return scores.astype(jnp.float32), {}

    return of_pixels(
        {}, tokenize=no_tokens, pixels=lambda images: images, prepare=as_floats, score_prepared=score_prepared
    )


def from_python(location: str, *, timeout: float, workers: int) -> Reward:
    """The reward of f(images uint8 [N,H,W,3], prompts) -> N floats, see `host_reward`.

    Raises:
      InputError: there is no such function at MODULE:FUNCTION.
    """
    return host_reward(_find(location), f"python:{location}", timeout=timeout, workers=workers)


def _find(location: str) -> Callable[..., Any] | Reward:
    """What MODULE:FUNCTION names; modules of the current folder count."""
    module_name, _, name = location.partition(":")
    if not module_name or not name:
        raise InputError(f"reward {location!r}: wants MODULE:FUNCTION, as in python:my_rewards:redness")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a stranger's module may raise anything
        raise InputError(f"reward {location!r}: importing {module_name}: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found) and not isinstance(found, Reward):
        raise InputError(f"reward {location!r}: {module.__name__} has no function {name!r}")
    return found
