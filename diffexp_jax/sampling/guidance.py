"""The network under guidance: how a model takes its guidance scale, and how little of it a step needs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

T = TypeVar("T")


class Context(NamedTuple):
    """What the network is conditioned on, two trees of arrays [B, ...]: of the (reweighted) prompts, and of none."""

    cond: Any
    uncond: Any


# A run's steps as columns [T], and one row of them; see `process.Process`
Steps = Any
# Guidance scales that are known before a program is made of them
Scales = Sequence[float] | np.ndarray | jax.Array
# (x_t, step, context) -> the network's guided output
Denoise = Callable[[Float[Array, "B h w c"], Steps, Context], Float[Array, "B h w c"]]
# (frozen, lora, x_t, step, conditioning) -> the network's output for one conditioning, whatever the guidance
Evaluate = Callable[[Any, Any, Float[Array, "B h w c"], Steps, Any], Float[Array, "B h w c"]]
# (frozen, lora, x_t, step, context) -> the network's guided output
Guided = Callable[[Any, Any, Float[Array, "B h w c"], Steps, Context], Float[Array, "B h w c"]]


class Network(NamedTuple):
    """The model under guidance: network(frozen, lora, x_t, step, context) is its guided output [B h w c].

    `frozen` holds the arrays that are not trained; `lora` None is the untuned model.

    `guided` is right at every step that the network is for. `one_half` is right where w_t is 1 or 0, and less work;
    None: no step is of that kind, or all are, and `guided` is that already. A program holds all that there are.
    """

    guided: Guided
    one_half: Guided | None = None

    def __call__(
        self, frozen: Any, lora: Any, x_t: Float[Array, "B h w c"], step: Steps, context: Context
    ) -> Float[Array, "B h w c"]:
        """By as little as the step needs. `at` is for what is differentiated."""
        return self.at(step, lambda network: network.guided(frozen, lora, x_t, step, context))

    def at(self, step: Steps, work: Callable[["Network"], T]) -> T:
        """work(network), whose network does as little as this step needs, and asks no more which that is.

        Args:
          work: all that is done at the step, its gradient too: differentiated, a condition would keep what both of its
            branches need for their gradients.
        """
        if self.one_half is None:
            return work(self)
        half, whole = Network(self.one_half), Network(self.guided)
        return jax.lax.cond(is_unguided(step.w_t), lambda: work(half), lambda: work(whole))

    def map(self, change: Callable[[Guided], Guided]) -> "Network":
        """The network whose every way to a guided output is changed so."""
        return Network(change(self.guided), self.one_half and change(self.one_half))

    def reading(self, part: Callable[[Any], Any]) -> "Network":
        """The network whose frozen arrays are part(frozen)."""
        return self.map(lambda guided: lambda frozen, *args: guided(part(frozen), *args))


class Guidance(NamedTuple):
    """How a model takes its guidance scale.

    `network(evaluate, w_t)` is the Network of an `Evaluate`, for steps that have no other scales than these; None: any.
    `evaluations(w_t)` says how many conditionings the network is evaluated for at each of these steps [T].
    """

    network: Callable[[Evaluate, Scales | None], Network]
    evaluations: Callable[[Scales], Int[np.ndarray, "T"]]


# -------------------------------------------------------------------------------------------- classifier-free guidance


def classifier_free_guidance(
    cond: Float[Array, "B h w c"], uncond: Float[Array, "B h w c"], w_t: Float[Array, ""]
) -> Float[Array, "B h w c"]:
    """DiffExp Eq. 4: eps~ = w eps(x, t, c) + (1 - w) eps(x, t, null). 1 is no guidance, 0 unconditional."""
    return w_t * cond + (1.0 - w_t) * uncond


def two_halves(evaluate: Evaluate) -> Guided:
    """Eq. 4, both halves as one batch."""

    def guided(frozen, lora, x_t, step, context):
        both = jax.tree.map(lambda *halves: jnp.concatenate(halves), context.cond, context.uncond)
        cond, uncond = jnp.split(evaluate(frozen, lora, jnp.concatenate([x_t, x_t]), step, both), 2)
        return classifier_free_guidance(cond, uncond, step.w_t)

    return guided


def half_that_counts(evaluate: Evaluate) -> Guided:
    """Eq. 4 at steps whose w_t is 1 or 0, as DiffExp's first: the other half counts for nothing, and is not made."""

    def guided(frozen, lora, x_t, step, context):
        half = jax.tree.map(lambda cond, uncond: jnp.where(step.w_t == 0.0, uncond, cond), *context)
        return evaluate(frozen, lora, x_t, step, half)

    return guided


def is_unguided(w_t: Float[Array, "*T"]) -> Bool[Array, "*T"]:
    """Whether one half of the guidance is all that counts."""
    return (w_t == 0.0) | (w_t == 1.0)


def _classifier_free(evaluate: Evaluate, w_t: Scales | None) -> Network:
    unguided = None if w_t is None else is_unguided(np.asarray(w_t))
    if unguided is not None and unguided.all():
        return Network(half_that_counts(evaluate))
    some = unguided is None or unguided.any()
    return Network(two_halves(evaluate), half_that_counts(evaluate) if some else None)


CLASSIFIER_FREE = Guidance(_classifier_free, lambda w_t: 2 - is_unguided(np.asarray(w_t)).astype(int))


# --------------------------------------------------------------------------------------------------- embedded guidance


def embedded(evaluate: Evaluate) -> Guided:
    """Of a model that was distilled from its own guidance (FLUX): w_t is an input, which it reads off the step."""
    return lambda frozen, lora, x_t, step, context: evaluate(frozen, lora, x_t, step, context.cond)


EMBEDDED = Guidance(lambda evaluate, w_t: Network(embedded(evaluate)), lambda w_t: np.ones(np.shape(w_t), int))
