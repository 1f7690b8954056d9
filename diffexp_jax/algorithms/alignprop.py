"""AlignProp: the reward's gradient through the sampling chain (Prabhudesai et al. 2023; DRaFT: Clark et al. 2024)."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PRNGKeyArray

from diffexp_jax.algorithms import AXIS, Algorithm, Policy, chunked, reward_metrics, unchunked
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
            policy.denoise(frozen, lora),
            x_T,
            chunk.context,
            steps,
            chunk.key,
            prediction_type=policy.prediction_type,
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

        def one(total, chunk):
            grad_fn = jax.value_and_grad(loss, has_aux=True)
            (value, aux), grads = grad_fn(state.lora, frozen, chunk, steps, live)
            return jax.tree.map(jnp.add, total, (value, grads)), aux

        start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.lora))
        total, aux = jax.lax.scan(one, start, chunked(batch, n_chunks))
        value, grads = jax.lax.pmean(jax.tree.map(lambda x: x / n_chunks, total), AXIS)
        rewards, parts, images = unchunked(aux)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.lora)
        lora = optax.apply_updates(state.lora, updates)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), "truncation/k": k}
        metrics |= reward_metrics(rewards, parts)
        return TrainState(state.iteration + 1, lora, opt_state), metrics, images

    return Algorithm(init, None, update)
