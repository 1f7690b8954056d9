"""DRaFT-K and DRaFT-LV: the reward's gradient through the last sampling steps (Clark et al. 2024)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from diffexp_jax.algorithms.algorithm import (
    AXIS,
    Algorithm,
    Method,
    Needs,
    Policy,
    Setup,
    gradient_over_chunks,
    reward_metrics,
)
from diffexp_jax.limits import within
from diffexp_jax.sampling import Denoise, Steps, initial_latents, rollout, step_noise
from diffexp_jax.state import TrainState


def last_step_again(
    policy: Policy, denoise: Denoise, x_0: Float[Array, "B h w c"], chunk: Any, steps: Steps, draw: Array
) -> Float[Array, "B h w c"]:
    """DRaFT-LV's further x_0: the (detached) sample is noised to the last step's level, and that step taken again.

    `draw` numbers the noises of a sample from 0.
    """
    n_steps = len(steps.t)
    last = jax.tree.map(lambda column: column[-1], steps)
    noise = step_noise(chunk.key, n_steps + draw, x_0.shape[1:])
    x_1 = policy.process.add_noise(jax.lax.stop_gradient(x_0), noise, last)
    mean, _ = policy.process.transition(x_1, denoise(x_1, last, chunk.context), last)
    return mean


def draft(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    n_chunks: int,
    k: int,
    lv_samples: int,
    remat: bool = True,
) -> Algorithm:
    """Makes the algorithm, which maximises the mean reward.

    Args:
      n_chunks: forward passes that a device's samples are split into; their gradients are averaged.
      k: last steps that carry gradient.
      lv_samples: n of DRaFT-LV, whose k is 1: further draws of the last step, whose rewards' gradients are added.
      remat: see `rollout`.
    """

    def init(lora) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), lora, optimizer.init(lora))

    def loss(lora, frozen, chunk, steps):
        denoise = policy.denoise(frozen, lora)
        x_T = initial_latents(chunk.key, policy.latent_shape)
        live = jnp.arange(len(steps.t)) >= len(steps.t) - k
        x_0, _ = rollout(policy.process, denoise, x_T, chunk.context, steps, chunk.key, live=live, remat=remat)

        def rewarded(x_0):
            images = policy.decode(frozen, x_0).clip(0.0, 1.0)
            return *policy.score(frozen, images, chunk.tokens), images

        def again(total, draw):
            rewards, _, _ = rewarded(last_step_again(policy, denoise, x_0, chunk, steps, draw))
            return total + rewards.mean(), None

        rewards, parts, images = rewarded(x_0)
        total, _ = jax.lax.scan(jax.checkpoint(again), rewards.mean(), jnp.arange(lv_samples))
        return -total, (rewards, parts, images)

    def update(state, frozen, batch, steps, key, samples):
        del key, samples  # nothing else is random, and sampling is part of the gradient
        value, grads, (rewards, parts, images) = gradient_over_chunks(
            lambda lora, chunk: loss(lora, frozen, chunk, steps), state.lora, batch, n_chunks
        )
        value, grads = jax.lax.pmean((value, grads), AXIS)
        change, opt_state = optimizer.update(grads, state.opt_state, state.lora)
        lora = optax.apply_updates(state.lora, change)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)} | reward_metrics(rewards, parts)
        return TrainState(state.iteration + 1, lora, opt_state), metrics, images

    return Algorithm(init, None, update)


def check(settings: Mapping[str, Any], n_steps: int) -> None:
    within("draft.k", settings["k"], 1, n_steps)
    within("draft.lv_samples", settings["lv_samples"], 0)
    if settings["lv_samples"]:
        within("draft.k with draft.lv_samples", settings["k"], 1, 1)


def make(setup: Setup, settings: Mapping[str, Any]) -> Algorithm:
    return draft(setup.policy, setup.optimizer, n_chunks=setup.n_chunks, remat=setup.remat, **settings)


METHOD = Method(
    name="draft",
    needs=Needs(reward_gradient=True),
    check=check,
    updates=lambda settings: 1,
    passes=lambda settings, full_float32: ("to sample",),
    make=make,
)
