"""The user's own rewards, named by MODULE:FUNCTION: a function of JAX with a gradient, or plain Python."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffexp_jax.errors import BadRewardError, InputError
from diffexp_jax.rewards import users
from diffexp_jax.rewards.host import host_reward
from diffexp_jax.rewards.preprocess import as_floats
from diffexp_jax.rewards.reward import Reward, no_tokens, of_pixels

_NO_TEXTS = (
    "; a program of JAX has no texts: what reads prompts is python:MODULE:FUNCTION, or a Reward that tokenizes them"
)


def from_jax(location: str) -> Reward:
    """The reward of a pure function f(images in [0,1], [B,H,W,3]) -> [B], or a `Reward` (with parameters, or prompts).

    The function may also return ([B], {key: [B]}): the parts "info/KEY" are the means of the second's numbers.

    Raises:
      InputError: there is no such thing at MODULE:FUNCTION, or it wants other arguments; later, while it is traced, it
        raises, or returns something else.
    """
    function, name = users.find(location), f"jax:{location}"
    if isinstance(function, Reward):
        return _told(function, name)
    users.check_function(function, name, {"f(images)": ["images"]}, _NO_TEXTS)

    def score_prepared(params, images: Float[Array, "B H W 3"], tokens) -> tuple[Float[Array, " B"], dict]:
        del params, tokens
        scores, info = users.apart(_called(name, function, images))
        scores = _scores(name, function, scores, len(images))
        parts = {key: jnp.asarray(x) for key, x in users.info_names(info).items() if _is_numbers(x)}
        return scores, {key: jnp.broadcast_to(x, scores.shape).astype(jnp.float32) for key, x in parts.items()}

    return of_pixels(
        {}, tokenize=no_tokens, pixels=lambda images: images, prepare=as_floats, score_prepared=score_prepared
    )


def from_python(location: str, *, timeout: float, workers: int) -> Reward:
    """The reward of f(images uint8 [N,H,W,3], prompts) -> N floats, see `host_reward`.

    Raises:
      InputError: there is no such function at MODULE:FUNCTION, or it wants other arguments.
    """
    function, name = users.find(location), f"python:{location}"
    if isinstance(function, Reward):
        raise InputError(f"reward {name}: is a Reward of JAX; wants jax:{location}")
    return host_reward(function, name, timeout=timeout, workers=workers)


def _called(name: str, function: Callable, *args: Any) -> Any:
    """What a function of JAX returns.

    Raises:
      BadRewardError: it raises, or ends the program.
    """
    try:
        return function(*args)
    except (KeyboardInterrupt, InputError):
        raise
    except BaseException as error:  # a stranger's function
        raise BadRewardError(f"reward {name}: {users.raised(error)}") from error


def _scores(name: str, function: Callable, scores: Any, n: int) -> Float[Array, " n"]:
    """What a function of JAX returned, as n numbers in float32."""
    try:
        found = None if scores is None or isinstance(scores, str) else jnp.asarray(scores)
    except Exception:  # of many types: ragged lists, dicts
        found = None
    where = users.defined(function)
    if found is None or not _real(found.dtype):
        raise BadRewardError(f"reward {name}: returned {users.form(scores)}; wants {n} numbers: [{n}]{where}")
    if found.shape != (n,):
        raise BadRewardError(f"reward {name}: returned shape {list(found.shape)} for {n} images; wants [{n}]{where}")
    return found.astype(jnp.float32)


def _real(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def _is_numbers(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | float | int) and _real(jnp.result_type(value))


def _told(reward: Reward, name: str) -> Reward:
    """Makes one line of each error that the reward's functions raise."""

    def told(function: Callable) -> Callable:
        return lambda *args: _called(name, function, *args)

    def scored(function: Callable) -> Callable:
        def call(params, pixels, tokens):
            returned = _called(name, function, params, pixels, tokens)
            if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)):
                form, where = users.form(returned), users.defined(function)
                raise BadRewardError(f"reward {name}: returned {form}; wants scores and a dict of their parts{where}")
            n = len(jax.tree.leaves((pixels, tokens))[0])
            return _scores(name, function, returned[0], n), returned[1]

        return call

    return reward._replace(
        tokenize=told(reward.tokenize),
        score=scored(reward.score),
        prepare=told(reward.prepare),
        score_prepared=scored(reward.score_prepared),
    )
