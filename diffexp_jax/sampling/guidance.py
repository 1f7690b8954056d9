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
    None: no step is of that kind, or all are, and `guided` is that already. A program holds those of both that there
    are. `prompt_alone` is the output for the prompts without guidance, at any step; None: `guided` is that where w_t is
    1, and no more work.
    """

    guided: Guided
    one_half: Guided | None = None
    prompt_alone: Guided | None = None

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
        return Network(*(guided and change(guided) for guided in self))

    def at_any(self, *, guided: bool) -> "Network":
        """The network for steps of any w_t, also of one for each sample [B]; or for the prompts alone, whose w_t is 1.

        What is not of a run's steps, as of noise levels drawn at random, wants one of these.
        """
        return Network(self.guided if guided else self.prompt_alone or self.guided)

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


def over(x: Array, like: Array) -> Array:
    """A step's number beside an array [B, ...] of samples: [] as it is, [B] -> [B, 1, ...]."""
    return x.reshape(-1, *[1] * (like.ndim - 1)) if jnp.ndim(x) else x


def classifier_free_guidance(
    cond: Float[Array, "B h w c"], uncond: Float[Array, "B h w c"], w_t: Float[Array, "*B"]
) -> Float[Array, "B h w c"]:
    """DiffExp Eq. 4: eps~ = w eps(x, t, c) + (1 - w) eps(x, t, null). 1 is no guidance, 0 unconditional.

    There is one w for all samples, or one for each.
    """
    w_t = over(w_t, cond)
    return w_t * cond + (1.0 - w_t) * uncond


def two_halves(evaluate: Evaluate) -> Guided:
    """Eq. 4, both halves as one batch."""

    def guided(frozen, lora, x_t, step, context):
        both = jax.tree.map(lambda *halves: jnp.concatenate(halves), context.cond, context.uncond)
        of_both = jax.tree.map(lambda x: jnp.concatenate([x, x]) if jnp.ndim(x) else x, step)
        cond, uncond = jnp.split(evaluate(frozen, lora, jnp.concatenate([x_t, x_t]), of_both, both), 2)
        return classifier_free_guidance(cond, uncond, step.w_t)

    return guided


def half_that_counts(evaluate: Evaluate) -> Guided:
    """Eq. 4 at steps whose w_t is 1 or 0, as DiffExp's first: the other half counts for nothing, and is not made."""

    def guided(frozen, lora, x_t, step, context):
        half = jax.tree.map(lambda cond, uncond: jnp.where(over(step.w_t == 0.0, cond), uncond, cond), *context)
        return evaluate(frozen, lora, x_t, step, half)

    return guided


def for_prompts_alone(evaluate: Evaluate) -> Guided:
    """No guidance but what the network makes of the step itself."""
    return lambda frozen, lora, x_t, step, context: evaluate(frozen, lora, x_t, step, context.cond)


def is_unguided(w_t: Float[Array, "*T"]) -> Bool[Array, "*T"]:
    """Whether one half of the guidance is all that counts."""
    return (w_t == 0.0) | (w_t == 1.0)


def _classifier_free(evaluate: Evaluate, w_t: Scales | None) -> Network:
    unguided, alone = None if w_t is None else is_unguided(np.asarray(w_t)), for_prompts_alone(evaluate)
    if unguided is not None and unguided.all():
        return Network(half_that_counts(evaluate), prompt_alone=alone)
    some = unguided is None or unguided.any()
    return Network(two_halves(evaluate), half_that_counts(evaluate) if some else None, alone)


CLASSIFIER_FREE = Guidance(_classifier_free, lambda w_t: 2 - is_unguided(np.asarray(w_t)).astype(int))


# --------------------------------------------------------------------------------------------------- embedded guidance


# Of a model that was distilled from its own guidance (FLUX): w_t is an input, which it reads off the step
EMBEDDED = Guidance(lambda evaluate, w_t: Network(for_prompts_alone(evaluate)), lambda w_t: np.ones(np.shape(w_t), int))
