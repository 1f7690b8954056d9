"""DDPO: denoising diffusion policy optimisation with importance sampling (Black et al. 2024, DDPO-IS)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from diffexp_jax import backend
from diffexp_jax.algorithms.algorithm import (
    AXIS,
    Algorithm,
    Method,
    Needs,
    Policy,
    Samples,
    Setup,
    across_devices,
    chunked,
    mean_over,
    reward_metrics,
    unchunked,
)
from diffexp_jax.limits import one_of, within
from diffexp_jax.sampling import initial_latents, rollout, step_log_prob
from diffexp_jax.state import TrainState, advantages, init_stats, update_stats


def clipped_ratio_loss(
    log_prob: Float[Array, "B"], old_log_prob: Float[Array, "B"], adv: Float[Array, "B"], *, clip: float
) -> Float[Array, ""]:
    """DiffExp Eq. 6, clipped as in PPO: mean of max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = p / p_old."""
    ratio = jnp.exp(log_prob - old_log_prob)
    return jnp.maximum(-adv * ratio, -adv * jnp.clip(ratio, 1.0 - clip, 1.0 + clip)).mean()


# Where the log-probs of the sampling policy come from, see `ddpo`.
OLD_LOG_PROBS = ("sampled", "recomputed", "current")


def ratio_metrics(log_ratio: Float[Array, "*N T B"], clip: float) -> dict[str, Float[Array, ""]]:
    """What importance ratios look like over all updates, steps, samples and devices.

    The clip fractions are of ratios above 1 + clip ("high") and below 1 - clip ("low"). A ratio that moves with the
    weights does so on both sides; rounding mostly makes old samples less likely. `ratio/log_std_*` is the standard
    deviation of the log-ratio in each third of the steps, noise first: rounding shows at the end, where std is small.
    """
    ratio = jnp.exp(log_ratio)

    def mean(x):
        return jax.lax.pmean(x.mean(), AXIS)

    high, low = mean(ratio > 1.0 + clip), mean(ratio < 1.0 - clip)
    metrics = {
        "ratio/mean": mean(ratio),
        "ratio/max_abs_log": jax.lax.pmax(jnp.abs(log_ratio).max(), AXIS),
        "ratio/clip_fraction": high + low,
        "ratio/clip_fraction_high": high,
        "ratio/clip_fraction_low": low,
        "approx_kl": 0.5 * mean(jnp.square(log_ratio)),
    }
    thirds = np.array_split(np.arange(log_ratio.shape[-2]), 3)
    for name, steps in zip(("early", "middle", "late"), thirds, strict=True):
        own = log_ratio[..., steps, :]
        if own.size:  # fewer steps than thirds
            metrics[f"ratio/log_std_{name}"] = jnp.sqrt(mean(jnp.square(own - mean(own))))
    return metrics


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
    old_log_prob: str = "sampled",
) -> Algorithm:
    """Makes the algorithm.

    Args:
      n_prompts: size of the prompt set, for the per-prompt statistics.
      n_updates: optimizer updates an iteration, each on its own share of the samples.
      n_chunks: forward passes that a device's samples are split into; a multiple of n_updates.
      inner_epochs: passes over an iteration's samples.
      clip: of the importance ratio (1e-4: log-probs are means over a latent's entries).
      advantage_clip, stats_buffer, stats_min_count: see `state.advantages`.
      old_log_prob: what the ratio is relative to. "sampled": the log-probs of the sampling program. "recomputed":
        those of the update program, under the weights before the first update. XLA fuses the two programs differently,
        and on an accelerator that alone moves log-probs by more than the clip. So a pass over the samples before the
        first update records them: the very loop that trains, its backward pass skipped, hence the same machine code
        and, while the weights are still the same, a ratio of exactly 1 on any backend. It costs a forward pass per
        sample and step, or nothing where an iteration is one update. "current": those of each update's own weights,
        so the ratio is 1 and nothing is clipped: the plain policy gradient (Black et al.'s DDPO-SF), for networks
        whose rounding is larger than what an update changes (scripts/measure_precision.py). Where an iteration is one
        update, "recomputed" is the same.
    """

    def init(lora) -> TrainState:
        stats = init_stats(n_prompts, stats_buffer)
        return TrainState(jnp.zeros((), jnp.int32), lora, optimizer.init(lora), stats)

    def sample(state, frozen, batch, steps) -> Samples:
        def one(chunk):
            denoise = policy.denoise(frozen, state.lora)
            x_T = initial_latents(chunk.key, policy.latent_shape)
            x_0, trajectory = rollout(
                policy.process, denoise, x_T, chunk.context, steps, chunk.key, keep_trajectory=True
            )
            images = policy.decode(frozen, x_0).clip(0.0, 1.0)
            rewards, parts = policy.score(frozen, images, chunk.tokens) if policy.score else (None, {})
            return Samples(trajectory, rewards, parts, images)

        samples = jax.lax.map(one, chunked(batch, n_chunks))
        flat = unchunked((samples.rewards, samples.parts, samples.images))
        return Samples(samples.trajectory, *flat)

    def minibatch_gradient(lora, frozen, trajectory, adv, old, recording):
        """Mean over chunks and steps of the loss and its gradient, and each step's log-prob under `lora`.

        Trajectory leaves are [chunks, T, m, ...]. `old` are the log-probs of the sampling policy, None where those of
        `lora` itself are taken. While `recording` (None: never), only the log-probs are of use and made.
        """

        def over_steps(chunk):
            tr, adv, old = chunk

            def step_gradient(xs):
                x_t, x_tm1, old, step = xs

                def log_prob_of(lora):
                    denoise = policy.denoise(frozen, lora)
                    return step_log_prob(policy.process, denoise, x_t, x_tm1, step, tr.context)

                log_prob, pull_back = jax.vjp(log_prob_of, lora)
                old = log_prob if old is None else old
                value, slope = jax.value_and_grad(clipped_ratio_loss)(log_prob, old, adv, clip=clip)
                if recording is None:
                    (grads,) = pull_back(slope)
                else:
                    nothing = jax.tree.map(jnp.zeros_like, lora)
                    grads = jax.lax.cond(recording, lambda: nothing, lambda: pull_back(slope)[0])
                return (value, grads), log_prob

            return mean_over(step_gradient, (tr.x_t, tr.x_tm1, old, tr.steps))

        means, log_prob = mean_over(over_steps, (trajectory, adv, old))
        return jax.lax.pmean(means, AXIS), log_prob

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
        trajectory, adv = chunked((samples.trajectory, chunked(adv, n_chunks)), n_updates)  # [updates, chunks, T, m, .]
        record = old_log_prob == "recomputed" and n_updates * inner_epochs > 1
        old = trajectory.log_prob if record or old_log_prob == "sampled" else None  # None: of the weights themselves

        def one_update(carry, minibatch):
            (lora, opt_state), recording = carry
            (loss, grads), log_prob = minibatch_gradient(lora, frozen, *minibatch, recording)
            change, new_opt_state = optimizer.update(grads, opt_state, lora)
            new = optax.apply_updates(lora, change), new_opt_state
            if record:
                new = jax.tree.map(lambda kept, new: jnp.where(recording, kept, new), (lora, opt_state), new)
            return (new, recording), ({"loss": loss, "grad_norm": optax.tree.norm(grads)}, log_prob)

        def one_epoch(carry, recording):
            weights, old = carry
            (weights, _), (means, log_prob) = jax.lax.scan(one_update, (weights, recording), (trajectory, adv, old))
            log_ratio = jnp.zeros_like(log_prob) if old is None else log_prob - old
            return (weights, jnp.where(recording, log_prob, old) if record else old), (means, log_ratio)

        recording = jnp.arange(1 + inner_epochs) == 0 if record else None  # the first pass only records
        carry, length = ((state.lora, state.opt_state), old), inner_epochs + record
        ((lora, opt_state), _), epochs = jax.lax.scan(one_epoch, carry, recording, length=length)
        means, log_ratio = jax.tree.map(lambda x: x[int(record) :], epochs)
        metrics = {name: value.mean() for name, value in means.items()} | ratio_metrics(log_ratio, clip)
        metrics |= reward_metrics(samples.rewards, samples.parts)
        metrics["advantage/own_statistics"] = (stats.seen[prompt_ids] >= stats_min_count).mean()
        return TrainState(state.iteration + 1, lora, opt_state, stats), metrics, samples.images

    return Algorithm(init, sample, update)


def check(settings: Mapping[str, Any], n_steps: int) -> None:
    one_of("ddpo.old_log_prob", settings["old_log_prob"], ("auto", *OLD_LOG_PROBS))
    for key in ("updates", "inner_epochs", "stats_buffer"):
        within(f"ddpo.{key}", settings[key], 1)
    within("ddpo.stats_min_count", settings["stats_min_count"], 1, settings["stats_buffer"])


def resolved_old_log_prob(settings: Mapping[str, Any], full_float32: bool) -> str:
    """What the setting comes to on this machine.

    "auto" in float32 is the ratio of the paper: of the sampling program's log-probs on a CPU, where that program and
    the update's agree to 1e-5, and of recomputed ones on an accelerator. Elsewhere an update changes log-probs by less
    than rounding does, so a ratio would be noise; but samples that are used again cannot do without one.
    """
    if settings["old_log_prob"] != "auto":
        return settings["old_log_prob"]
    if full_float32:
        return "sampled" if backend.platform() == "cpu" else "recomputed"
    return "current" if settings["inner_epochs"] == 1 else "recomputed"


def passes(settings: Mapping[str, Any], full_float32: bool) -> tuple[str, ...]:
    several = settings["updates"] * settings["inner_epochs"] > 1
    again = several and resolved_old_log_prob(settings, full_float32) == "recomputed"
    return ("to sample", "for the old log-probs") if again else ("to sample",)


def make(setup: Setup, settings: Mapping[str, Any]) -> Algorithm:
    return ddpo(
        setup.policy,
        setup.optimizer,
        n_prompts=setup.n_prompts,
        n_chunks=setup.n_chunks,
        n_updates=settings["updates"],
        old_log_prob=resolved_old_log_prob(settings, setup.full_float32),
        **{key: value for key, value in settings.items() if key not in ("updates", "old_log_prob")},
    )


METHOD = Method(
    name="ddpo",
    needs=Needs(step_noise=True),
    check=check,
    updates=lambda settings: settings["updates"],
    passes=passes,
    make=make,
)
