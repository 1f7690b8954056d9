"""The network in a chain whose gradient is wanted: which steps carry it, and what the backward pass makes again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from diffexp_jax.sampling.guidance import Context, Denoise, Guided, Network, Steps

# As Denoise, with a further argument: where it is False, the output carries no gradient
LiveDenoise = Callable[[Float[Array, "B h w c"], Steps, Context, Bool[Array, ""]], Float[Array, "B h w c"]]


def differentiable(
    network: Network, frozen: Any, lora: Any, *, remat: bool, input_gradient: bool = True
) -> LiveDenoise:
    """The network for a chain whose gradient in `lora` is wanted, for `rollout` with live steps.

    Args:
      frozen: arrays that have no gradient.
      remat: the backward pass of a live step computes its activations again, so that one latent per step is all that
        a chain keeps; False keeps every activation of every step.
      input_gradient: False: the network's output has no gradient in its input x_t, as in DRTune (Wu et al. 2024). A
        step's gradient then reaches the reward by the steps' linear part alone, not through the later steps' networks.
    """
    if not input_gradient:
        network = network.map(input_detached)
    return recomputed(network, frozen, lora) if remat else truncated(partial(network, frozen, lora))


def fixed(guided: Guided) -> Guided:
    """The network that a KL is taken to: what it reads as frozen arrays is (frozen, LoRA), and it is given no LoRA.

    So `differentiable(network.map(fixed), (frozen, lora), None, ...)` has a gradient in x_t and none in that LoRA.
    """

    def without_gradient(both, _, *args):
        frozen, lora = both
        return guided(frozen, jax.lax.stop_gradient(lora), *args)

    return without_gradient


def input_detached(guided: Guided) -> Guided:
    """Stops the gradient at the network's input x_t."""
    return lambda frozen, lora, x_t, *args: guided(frozen, lora, jax.lax.stop_gradient(x_t), *args)


def recomputed(network: Network, frozen: Any, lora: Any) -> LiveDenoise:
    """See `differentiable`. The backward pass of a step that is not live runs no network at all.

    The condition is in the backward pass alone: so a program holds the network once to sample and once for the
    gradient, and the cost follows the number of live steps although that number is traced.
    """

    @jax.custom_vjp
    def evaluate(frozen, lora, x_t, step, context, live):
        del live
        return network(frozen, lora, x_t, step, context)

    def forward(*args):
        return evaluate(*args), args

    def backward(args, gradient):
        frozen, lora, x_t, step, context, live = args

        def run(network):
            _, pull_back = jax.vjp(lambda lora, x_t: network(frozen, lora, x_t, step, context), lora, x_t)
            return pull_back(gradient)

        nothing = jax.tree.map(jnp.zeros_like, (lora, x_t))
        gradients = jax.lax.cond(live, lambda: network.at(step, run), lambda: nothing)
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
