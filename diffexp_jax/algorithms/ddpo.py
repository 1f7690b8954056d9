"""DDPO: denoising diffusion policy optimisation with importance sampling (Black et al. 2024, DDPO-IS)."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from diffexp_jax.algorithms import (
    AXIS,
    Algorithm,
    Policy,
    Samples,
    across_devices,
    chunked,
    mean_over,
    reward_metrics,
    unchunked,
)
from diffexp_jax.sampling import initial_latents, rollout, step_log_prob
from diffexp_jax.state import TrainState, advantages, init_stats, update_stats


def clipped_ratio_loss(
    log_prob: Float[Array, "B"], old_log_prob: Float[Array, "B"], adv: Float[Array, "B"], *, clip: float
) -> Float[Array, ""]:
    """DiffExp Eq. 6, clipped as in PPO: mean of max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = p / p_old."""
    ratio = jnp.exp(log_prob - old_log_prob)
    return jnp.maximum(-adv * ratio, -adv * jnp.clip(ratio, 1.0 - clip, 1.0 + clip)).mean()


def ddpo(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    n_prompts: int,
    n_updates: int,
    n_chunks: int,
    inner_epochs: int,
    clip: float,
    advantage_clip: float,
    stats_buffer: int,
    stats_min_count: int,
) -> Algorithm:
    """Makes the algorithm.

    Args:
      n_prompts: size of the prompt set, for the per-prompt statistics.
      n_updates: optimizer updates an iteration, each on its own share of the samples.
      n_chunks: forward passes that a device's samples are split into; a multiple of n_updates.
      inner_epochs: passes over an iteration's samples.
      clip: of the importance ratio (1e-4: log-probs are means over a latent's entries).
      advantage_clip, stats_buffer, stats_min_count: see `state.advantages`.
    """
    kind = policy.prediction_type

    def init(lora) -> TrainState:
        stats = init_stats(n_prompts, stats_buffer)
        return TrainState(jnp.zeros((), jnp.int32), lora, optimizer.init(lora), stats)

    def sample(state, frozen, batch, steps) -> Samples:
        def one(chunk):
            denoise = policy.denoise(frozen, state.lora)
            x_T = initial_latents(chunk.key, policy.latent_shape)
            x_0, trajectory = rollout(
                denoise, x_T, chunk.context, steps, chunk.key, prediction_type=kind, keep_trajectory=True
            )
            images = policy.decode(frozen, x_0).clip(0.0, 1.0)
            rewards, parts = policy.score(frozen, images, chunk.tokens)
            return Samples(trajectory, rewards, parts, images)

        samples = jax.lax.map(one, chunked(batch, n_chunks))
        flat = unchunked((samples.rewards, samples.parts, samples.images))
        return Samples(samples.trajectory, *flat)

    def minibatch_gradient(lora, frozen, trajectory, adv):
        """Mean over chunks and steps of the loss' gradient; trajectory leaves [chunks, T, m, ...]."""

        def over_steps(chunk):
            tr, adv = chunk

            def loss(lora, xs):
                x_t, x_tm1, old, step = xs
                denoise = policy.denoise(frozen, lora)
                log_prob = step_log_prob(denoise, x_t, x_tm1, step, tr.context, prediction_type=kind)
                log_ratio = log_prob - old
                aux = {
                    "ratio/mean": jnp.exp(log_ratio).mean(),
                    "ratio/max_abs_log": jnp.abs(log_ratio).max(),  # of each step and chunk; then averaged as the rest
                    "ratio/clip_fraction": (jnp.abs(jnp.exp(log_ratio) - 1.0) > clip).mean(),
                    "approx_kl": 0.5 * jnp.square(log_ratio).mean(),
                }
                return clipped_ratio_loss(log_prob, old, adv, clip=clip), aux

            def step_gradient(xs):
                (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(lora, xs)
                return grads, {"loss": value} | aux

            return mean_over(step_gradient, (tr.x_t, tr.x_tm1, tr.log_prob, tr.steps))

        return jax.lax.pmean(mean_over(over_steps, (trajectory, adv)), AXIS)

    def update(state, frozen, batch, steps, key, samples):
        del steps, key  # the trajectory keeps its own steps; nothing here is random
        prompt_ids, rewards = across_devices(batch.prompt_id), across_devices(samples.rewards)
        stats = update_stats(state.stats, prompt_ids, rewards)
        adv = advantages(
            stats,
            batch.prompt_id,
            samples.rewards,
            batch_rewards=rewards,
            min_count=stats_min_count,
            clip=advantage_clip,
        )
        minibatches = chunked((samples.trajectory, chunked(adv, n_chunks)), n_updates)  # [updates, chunks, T, m, ...]

        def one_update(carry, minibatch):
            lora, opt_state = carry
            grads, metrics = minibatch_gradient(lora, frozen, *minibatch)
            updates, opt_state = optimizer.update(grads, opt_state, lora)
            metrics["grad_norm"] = optax.tree.norm(grads)
            return (optax.apply_updates(lora, updates), opt_state), metrics

        def one_epoch(carry, _):
            return jax.lax.scan(one_update, carry, minibatches)

        carry = (state.lora, state.opt_state)
        (lora, opt_state), metrics = jax.lax.scan(one_epoch, carry, length=inner_epochs)
        metrics = {name: value.mean() for name, value in metrics.items()}
        metrics |= reward_metrics(samples.rewards, samples.parts)
        metrics["advantage/own_statistics"] = (stats.seen[prompt_ids] >= stats_min_count).mean()
        return TrainState(state.iteration + 1, lora, opt_state, stats), metrics, samples.images

    return Algorithm(init, sample, update)
