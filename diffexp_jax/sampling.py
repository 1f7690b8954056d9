"""Sampling as one `lax.scan` over the steps; the differentiable variant is the same function."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from diffexp_jax.process import Process, gaussian_log_prob, sample_noise


class Context(NamedTuple):
    """What the network is conditioned on, two trees of arrays [B, ...]: of the (reweighted) prompts, and of none."""

    cond: Any
    uncond: Any


# A run's steps as columns [T], and one row of them; see `process.Process`
Steps = Any
# (x_t, step, context) -> the network's guided output
Denoise = Callable[[Float[Array, "B h w c"], Steps, Context], Float[Array, "B h w c"]]


class Trajectory(NamedTuple):
    """A sampled chain and all that produced it, so that it can be scored under the very policy that sampled.

    The x_{t-1} of a step is the x_t of the next: every latent is kept once.
    """

    x_T: Float[Array, "B h w c"]
    x_tm1: Float[Array, "T B h w c"]
    log_prob: Float[Array, "T B"]
    steps: Steps
    context: Context

    def first(self, n: int | None) -> "Trajectory":
        """Its first n steps, noise first; None: all."""
        x_tm1, log_prob, steps = jax.tree.map(lambda x: x[:n], (self.x_tm1, self.log_prob, self.steps))
        return self._replace(x_tm1=x_tm1, log_prob=log_prob, steps=steps)

    def x_t(self, i: Int[Array, ""] | int) -> Float[Array, "B h w c"]:
        """The latents that step i (0-based) begins with."""
        return jnp.where(i == 0, self.x_T, self.x_tm1[i - 1])


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


# ------------------------------------------------------------------------------------------------ differentiable chains

# As Denoise, with a further argument: where it is False, the output carries no gradient
LiveDenoise = Callable[[Float[Array, "B h w c"], Steps, Context, Bool[Array, ""]], Float[Array, "B h w c"]]


def differentiable(
    denoise: MakeDenoise,
    frozen: Any,
    lora: Any,
    *,
    remat: bool,
    unguided: MakeDenoise | None = None,
    input_gradient: bool = True,
) -> LiveDenoise:
    """The network for a chain whose gradient in `lora` is wanted, for `rollout` with live steps.

    Args:
      denoise: the guided network.
      frozen: arrays that have no gradient.
      remat: the backward pass of a live step computes its activations again, so that one latent per step is all that
        a chain keeps; False keeps every activation of every step.
      unguided: see `by_guidance`.
      input_gradient: False: the network's output has no gradient in its input x_t, as in DRTune (Wu et al. 2024). A
        step's gradient then reaches the reward by the steps' linear part alone, not through the later steps' networks.
    """
    if not input_gradient:
        denoise, unguided = input_detached(denoise), unguided and input_detached(unguided)
    if remat:
        return recomputed(denoise, frozen, lora, unguided)
    return truncated(by_step(denoise, unguided, frozen, lora))


def input_detached(make: MakeDenoise) -> MakeDenoise:
    """Stops the gradient at the network's input x_t."""

    def detached(frozen, lora):
        denoise = make(frozen, lora)
        return lambda x_t, step, context: denoise(jax.lax.stop_gradient(x_t), step, context)

    return detached


def recomputed(denoise: MakeDenoise, frozen: Any, lora: Any, unguided: MakeDenoise | None) -> LiveDenoise:
    """See `differentiable`. The backward pass of a step that is not live runs no network at all.

    The condition is in the backward pass alone: so a program holds the network once to sample and once for the
    gradient, and the cost follows the number of live steps although that number is traced.
    """

    @jax.custom_vjp
    def evaluate(frozen, lora, x_t, step, context, live):
        del live
        return by_step(denoise, unguided, frozen, lora)(x_t, step, context)

    def forward(*args):
        return evaluate(*args), args

    def backward(args, gradient):
        frozen, lora, x_t, step, context, live = args

        def run(make):
            _, pull_back = jax.vjp(lambda lora, x_t: make(frozen, lora)(x_t, step, context), lora, x_t)
            return pull_back(gradient)

        nothing = jax.tree.map(jnp.zeros_like, (lora, x_t))
        gradients = jax.lax.cond(live, lambda: by_guidance(step, run, denoise, unguided), lambda: nothing)
        return None, *gradients, None, None, None

    evaluate.defvjp(forward, backward)
    return partial(evaluate, frozen, lora)


def truncated(denoise: Denoise) -> LiveDenoise:
    """See `differentiable`: the same by a condition around the network, whose activations are kept."""

    def detached(*args):
        return jax.lax.stop_gradient(denoise(*args))

    def step_denoise(x_t, step, context, live):
        return jax.lax.cond(live, denoise, detached, x_t, step, context)

    return step_denoise


# -------------------------------------------------------------------------------------------------------------- chains


def initial_latents(keys: jax.Array, shape: tuple[int, ...]) -> Float[Array, "B h w c"]:
    """x_T for each sample's key."""
    return sample_noise(jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys), shape)


def step_noise(keys: jax.Array, i: Array, shape: tuple[int, ...]) -> Float[Array, "B h w c"]:
    """The noise of step i (0-based) for each sample's key."""
    return sample_noise(jax.vmap(lambda k: jax.random.fold_in(k, i + 1))(keys), shape)


def rollout(
    process: Process,
    denoise: Denoise | LiveDenoise,
    x_T: Float[Array, "B h w c"],
    context: Context,
    steps: Steps,
    keys: jax.Array,
    *,
    live: Bool[Array, "T"] | None = None,
    keep_trajectory: bool = False,
) -> tuple[Float[Array, "B h w c"], Trajectory | None]:
    """Samples x_0 by the process' steps (stochastic where sigma_t > 0).

    Args:
      keys: one PRNG key per sample; the noise depends on nothing else, so not on how samples are batched.
      live: makes the chain differentiable: the steps at which the network's output carries gradient, which `denoise`
        gets as a fourth argument (`differentiable`). The linear recursion always carries it.
      keep_trajectory: also return the chain with its log-probs (needs sigma_t > 0 at every step).
    """

    def body(x_t, xs):
        i, step, live_i = xs
        out = denoise(x_t, step, context) if live is None else denoise(x_t, step, context, live_i)
        mean, std = process.transition(x_t, out, step)
        x_tm1 = mean + std * step_noise(keys, i, x_t.shape[1:])
        kept = (x_tm1, gaussian_log_prob(x_tm1, mean, std)) if keep_trajectory else None
        return x_tm1, kept

    x_0, kept = jax.lax.scan(body, x_T, (jnp.arange(len(steps.t)), steps, live))
    return x_0, Trajectory(x_T, *kept, steps, context) if keep_trajectory else None


def transition_log_prob(
    process: Process,
    out: Float[Array, "B h w c"],
    x_t: Float[Array, "B h w c"],
    x_tm1: Float[Array, "B h w c"],
    step: Steps,
) -> Float[Array, "B"]:
    """log p_theta(x_{t-1} | x_t, c) of a transition that was sampled before, from the network's guided output."""
    mean, std = process.transition(x_t, out, step)
    return gaussian_log_prob(x_tm1, mean, std)


def step_log_prob(
    process: Process,
    denoise: Denoise,
    x_t: Float[Array, "B h w c"],
    x_tm1: Float[Array, "B h w c"],
    step: Steps,
    context: Context,
) -> Float[Array, "B"]:
    """log p_theta(x_{t-1} | x_t, c) of a transition that was sampled before; runs the network."""
    return transition_log_prob(process, denoise(x_t, step, context), x_t, x_tm1, step)
