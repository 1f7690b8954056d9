"""What the methods share that follow the reward's gradient through the sampling chain."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from diffexp_jax.algorithms.algorithm import Algorithm, Batch, Inputs, chunked, stepped, unchunked
from diffexp_jax.algorithms.state import TrainState
from diffexp_jax.parallel import AXIS
from diffexp_jax.sampling import Steps

# (LoRA, frozen arrays, a chunk of the batch, steps, live steps) -> the loss, and (rewards, parts)
Loss = Callable[[Any, Any, Batch, Steps, Array], tuple[Array, Any]]


def reward_gradient(
    optimizer: optax.GradientTransformation,
    loss: Loss,
    live_steps: Callable[[PRNGKeyArray, int], Array],
    *,
    n_chunks: int,
) -> Algorithm:
    """An algorithm whose update is one step against the loss' gradient, and that samples in its course.

    Args:
      live_steps: (key of the iteration, T) -> [T], the steps whose network outputs carry gradient.
      n_chunks: forward passes that a device's samples are split into; their gradients are averaged.
    """

    def init(lora) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), lora, optimizer.init(lora))

    def update(state, frozen, inputs: Inputs):
        live = live_steps(inputs.key, len(inputs.steps.t))
        value, grads, scores = gradient_over_chunks(
            lambda lora, chunk: loss(lora, frozen, chunk, inputs.steps, live), state.lora, inputs.batch, n_chunks
        )
        value, grads = jax.lax.pmean((value, grads), AXIS)
        state, metrics = stepped(optimizer, state, value, grads, scores)
        return state, metrics | {"truncation/k": live.sum()}

    return Algorithm(init, None, update)


def gradient_over_chunks(
    loss: Callable[[Any, Any], tuple[Array, Any]], lora: Any, batch: Any, n_chunks: int
) -> tuple[Array, Any, Any]:
    """Mean over the chunks of loss(lora, chunk)[0] and of its gradient in `lora`, and all of loss(lora, chunk)[1].

    A scan that holds one chunk's work at a time; the second results keep the samples' order.
    """

    def one(total, chunk):
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(lora, chunk)
        return jax.tree.map(jnp.add, total, (value, grads)), aux

    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, lora))
    total, aux = jax.lax.scan(one, start, chunked(batch, n_chunks))
    return *jax.tree.map(lambda x: x / n_chunks, total), unchunked(aux)
