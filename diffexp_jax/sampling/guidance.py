"""The network under classifier-free guidance: both halves of it, or the one that counts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Context(NamedTuple):
    """What the network is conditioned on, two trees of arrays [B, ...]: of the (reweighted) prompts, and of none."""

    cond: Any
    uncond: Any


# A run's steps as columns [T], and one row of them; see `process.Process`
Steps = Any
# (x_t, step, context) -> the network's guided output
Denoise = Callable[[Float[Array, "B h w c"], Steps, Context], Float[Array, "B h w c"]]


def classifier_free_guidance(
    cond: Float[Array, "B h w c"], uncond: Float[Array, "B h w c"], w_t: Float[Array, ""]
) -> Float[Array, "B h w c"]:
    """DiffExp Eq. 4: eps~ = w eps(x, t, c) + (1 - w) eps(x, t, null). 1 is no guidance, 0 unconditional."""
    return w_t * cond + (1.0 - w_t) * uncond


def guided(network: Callable[..., Float[Array, "2B h w c"]]) -> Denoise:
    """Wraps network(x_t, t, conditioning) in classifier-free guidance; both halves run as one batch."""

    def denoise(x_t, step, context):
        both = jax.tree.map(lambda *halves: jnp.concatenate(halves), context.cond, context.uncond)
        cond, uncond = jnp.split(network(jnp.concatenate([x_t, x_t]), step.t, both), 2)
        return classifier_free_guidance(cond, uncond, step.w_t)

    return denoise


def unguided(network: Callable[..., Float[Array, "B h w c"]]) -> Denoise:
    """Wraps network(x_t, t, conditioning) for steps whose w_t is 1 or 0, as DiffExp's first: one half runs."""

    def denoise(x_t, step, context):
        half = jax.tree.map(lambda cond, uncond: jnp.where(step.w_t == 0.0, uncond, cond), *context)
        return network(x_t, step.t, half)

    return denoise


def is_unguided(w_t: Float[Array, "*T"]) -> Bool[Array, "*T"]:
    """Whether one half of the guidance is all that counts."""
    return (w_t == 0.0) | (w_t == 1.0)


def by_guidance(step: Steps, work: Callable[[Any], Any], guided: Any, unguided: Any | None) -> Any:
    """work(guided), or work(unguided) where the step's w_t is 1 or 0.

    Args:
      work: all that is done at a step, its gradient too: differentiated, a condition would keep what both of its
        branches need for their gradients.
      guided, unguided: the network with both halves of the guidance, and with the one that counts. A program holds
        both; None: no step of the run is of the second kind.
    """
    if unguided is None:
        return work(guided)
    return jax.lax.cond(is_unguided(step.w_t), lambda: work(unguided), lambda: work(guided))


# (frozen, lora) -> the network under guidance
MakeDenoise = Callable[[Any, Any], Denoise]


def by_step(guided: MakeDenoise, unguided: MakeDenoise | None, frozen: Any, lora: Any) -> Denoise:
    """The network that takes at each step the halves of the guidance that count, see `by_guidance`."""

    def denoise(x_t, step, context):
        return by_guidance(step, lambda make: make(frozen, lora)(x_t, step, context), guided, unguided)

    return denoise
