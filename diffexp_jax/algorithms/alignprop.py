"""AlignProp: the reward's gradient through the sampling chain (Prabhudesai et al. 2023; DRaFT: Clark et al. 2024)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PRNGKeyArray

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
from diffexp_jax.limits import one_of, within
from diffexp_jax.sampling import initial_latents, rollout
from diffexp_jax.state import TrainState

TRUNCATIONS = ("uniform", "per_step", "fixed")


def live_steps(key: PRNGKeyArray, n_steps: int, *, truncation: str, k: int) -> tuple[Bool[Array, "T"], Array]:
    """Which steps' network outputs carry gradient, and how many they are.

    "uniform": the last K, K uniform in 1..T, one draw for the iteration. "fixed": the last k. "per_step": the cut
    is drawn anew at every step, uniform in 0..T, as in the published code: step i is live with probability
    (i + 1) / (T + 1).
    """
    i = jnp.arange(n_steps)
    if truncation == "per_step":
        live = i >= jax.random.randint(key, (n_steps,), 0, n_steps + 1)
    elif truncation == "uniform":
        live = i >= n_steps - jax.random.randint(key, (), 1, n_steps + 1)
    else:
        live = i >= n_steps - k
    return live, live.sum()


def alignprop(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    n_chunks: int,
    loss_coefficient: float,
    reward_target: float | None,
    truncation: str,
    truncation_k: int,
    remat: bool = True,
) -> Algorithm:
    """Makes the algorithm.

    Args:
      n_chunks: forward passes that a device's samples are split into; their gradients are averaged.
      loss_coefficient: the loss is this times mean |reward_target - r|, or times mean(-r) without a target.
      truncation: "uniform", "per_step" or "fixed" (then the last `truncation_k` steps), see `live_steps`.
      remat: see `rollout`.
    """

    def init(lora) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), lora, optimizer.init(lora))

    def loss(lora, frozen, chunk, steps, live):
        x_T = initial_latents(chunk.key, policy.latent_shape)
        x_0, _ = rollout(
            policy.process,
            policy.denoise(frozen, lora),
            x_T,
            chunk.context,
            steps,
            chunk.key,
            live=live,
            remat=remat,
        )
        images = policy.decode(frozen, x_0).clip(0.0, 1.0)
        rewards, parts = policy.score(frozen, images, chunk.tokens)
        per_sample = -rewards if reward_target is None else jnp.abs(reward_target - rewards)
        return loss_coefficient * per_sample.mean(), (rewards, parts, images)

    def update(state, frozen, batch, steps, key, samples):
        del samples  # sampling is part of the gradient
        live, k = live_steps(key, len(steps.t), truncation=truncation, k=truncation_k)

        value, grads, (rewards, parts, images) = gradient_over_chunks(
            lambda lora, chunk: loss(lora, frozen, chunk, steps, live), state.lora, batch, n_chunks
        )
        value, grads = jax.lax.pmean((value, grads), AXIS)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.lora)
        lora = optax.apply_updates(state.lora, updates)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), "truncation/k": k}
        metrics |= reward_metrics(rewards, parts)
        return TrainState(state.iteration + 1, lora, opt_state), metrics, images

    return Algorithm(init, None, update)


def check(settings: Mapping[str, Any], n_steps: int) -> None:
    one_of("alignprop.truncation", settings["truncation"], TRUNCATIONS)
    within("alignprop.truncation_k", settings["truncation_k"], 1, n_steps)


def make(setup: Setup, settings: Mapping[str, Any]) -> Algorithm:
    return alignprop(setup.policy, setup.optimizer, n_chunks=setup.n_chunks, remat=setup.remat, **settings)


METHOD = Method(
    name="alignprop",
    needs=Needs(reward_gradient=True),
    check=check,
    updates=lambda settings: 1,
    passes=lambda settings, full_float32: ("to sample",),
    make=make,
)
