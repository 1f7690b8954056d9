"""What the methods share that follow the gradient of the steps' log-probs, weighted by rewards.

An iteration samples once. The update then takes one or several optimizer steps, each by the gradient of a loss of every
step's log-prob, summed up step by step and chunk by chunk: what is held at a time is the work of one step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from diffexp_jax.algorithms.algorithm import (
    AXIS,
    Policy,
    Samples,
    chunked,
    mean_over,
    reward_metrics,
    rewarded,
    unchunked,
)
from diffexp_jax.algorithms.state import TrainState
from diffexp_jax.sampling import Context, Network, Steps, Trajectory, initial_latents, rollout, transition_log_prob


class Transition(NamedTuple):
    """One step of the sampled chain, of the samples of a chunk."""

    x_t: Float[Array, "B h w c"]
    x_tm1: Float[Array, "B h w c"]
    weight: Float[Array, "B"]  # what its log-prob is weighted by: an advantage
    old_log_prob: Float[Array, "B"] | None  # of the policy that sampled; None: of the weights at the update
    step: Steps  # one row


class Minibatch(NamedTuple):
    """What one optimizer step is made of."""

    trajectory: Trajectory  # a leading axis [chunks]
    weight: Float[Array, "chunks T B"]
    old_log_prob: Float[Array, "chunks T B"] | None


class PolicyGradient(NamedTuple):
    """How a method learns from a step.

    `loss(log_prob, outputs, transition)` is a scalar. `outputs` is (the network's guided output, what `reference` gives
    of the transition) where there is a `reference`, else None.
    """

    policy: Policy
    optimizer: optax.GradientTransformation
    loss: Callable[..., Float[Array, ""]]
    reference: Callable[[Network, Any, Transition, Context], Float[Array, "B h w c"]] | None = None


def sample(
    policy: Policy, state: Any, frozen: Any, batch: Any, steps: Steps, *, n_chunks: int, n_trained: int | None = None
) -> Samples:
    """A method's `Algorithm.sample`: trajectories, scored. They keep the chunks' axis.

    Args:
      n_trained: how many of a chain's steps, from the first, are kept; None: all.
    """

    def one(chunk):
        denoise = partial(policy.network, frozen, state.lora)
        x_T = initial_latents(chunk.key, policy.latent_shape)
        x_0, trajectory = rollout(policy.process, denoise, x_T, chunk.context, steps, chunk.key, keep_trajectory=True)
        return Samples(trajectory.first(n_trained), *rewarded(policy, frozen, x_0, chunk.tokens))

    samples = jax.lax.map(one, chunked(batch, n_chunks))
    return Samples(samples.trajectory, *unchunked((samples.rewards, samples.parts, samples.images)))


class Visit(NamedTuple):
    """What is done with a minibatch when its turn comes, see `several_updates`."""

    minibatch: Int[Array, ""]  # which one
    records: Bool[Array, ""]  # notes its log-probs, and leaves the weights as they are
    is_own: Bool[Array, ""]  # the log-probs of this visit are the old ones: the weights are those that sampled


def step_gradient(
    method: PolicyGradient,
    network: Network,
    lora: Any,
    frozen: Any,
    transition: Transition,
    context: Context,
    visit: Visit | None,
) -> tuple[tuple[Float[Array, ""], Any], Float[Array, "B"]]:
    """((loss, its gradient in `lora`), log-prob) of one step; zeros for a gradient, not made, where it only records."""

    def evaluate(lora):
        out = network(frozen, lora, transition.x_t, transition.step, context)
        log_prob = transition_log_prob(method.policy.process, out, transition.x_t, transition.x_tm1, transition.step)
        return log_prob, out if method.reference else None

    (log_prob, out), pull_back = jax.vjp(evaluate, lora)
    if transition.old_log_prob is None:
        transition = transition._replace(old_log_prob=log_prob)
    elif visit is not None:
        transition = transition._replace(old_log_prob=jnp.where(visit.is_own, log_prob, transition.old_log_prob))
    reference = method.reference(network, frozen, transition, context) if method.reference else None

    def loss(log_prob, out):
        return method.loss(log_prob, (out, reference) if method.reference else None, transition)

    value, slopes = jax.value_and_grad(loss, argnums=(0, 1))(log_prob, out)
    if visit is None:
        (grads,) = pull_back(slopes)
    else:
        nothing = jax.tree.map(jnp.zeros_like, lora)
        grads = jax.lax.cond(visit.records, lambda: nothing, lambda: pull_back(slopes)[0])
    return (value, grads), log_prob


def minibatch_gradient(
    method: PolicyGradient, lora: Any, frozen: Any, minibatch: Minibatch, visit: Visit | None
) -> tuple[tuple[Float[Array, ""], Any], Float[Array, "chunks T B"]]:
    """((loss, gradient), log-probs): mean over chunks, steps and devices, and each step's log-prob under `lora`."""

    def over_steps(chunk):
        kept = chunk.trajectory

        def one(xs):
            i, weight, old_log_prob, step = xs
            transition = Transition(kept.x_t(i), kept.x_tm1[i], weight, old_log_prob, step)

            def gradient(network):
                return step_gradient(method, network, lora, frozen, transition, kept.context, visit)

            return method.policy.network.at(step, gradient)

        xs = jnp.arange(len(kept.x_tm1)), chunk.weight, chunk.old_log_prob, kept.steps
        return mean_over(one, xs)

    means, log_prob = mean_over(over_steps, minibatch)
    return jax.lax.pmean(means, AXIS), log_prob


def minibatches(
    trajectory: Trajectory, weight: Float[Array, "chunks m"] | Float[Array, "chunks T m"], *, n_updates: int
) -> Minibatch:
    """The samples' chunks shared out to the updates, [updates, chunks, ...]; a sample's weight is that of its steps."""
    weight = jnp.broadcast_to(weight if weight.ndim == 3 else weight[:, None], trajectory.log_prob.shape)
    return chunked(Minibatch(trajectory, weight, trajectory.log_prob), n_updates)


def several_updates(
    method: PolicyGradient,
    weights: tuple[Any, Any],
    frozen: Any,
    minibatches: Minibatch,
    *,
    epochs: int,
    old_log_prob: str,
) -> tuple[tuple[Any, Any], dict[str, Float[Array, "epochs updates"]], Float[Array, "epochs updates chunks T B"]]:
    """One optimizer step for each minibatch, `epochs` times over.

    Args:
      weights: LoRA and optimizer state.
      minibatches: leading axes [updates, chunks, ...]; their old log-probs are those of the sampling program.
      old_log_prob: what the ratio is relative to. "sampled": to those. "recomputed": to those of the update program,
        under the weights before the first update. XLA fuses the two programs differently, and on an accelerator that
        alone moves log-probs by more than the clip. The first minibatch finds them in its own first update. The others
        are visited once before it: by the very loop that trains, its backward pass skipped, hence the same machine
        code and, while the weights are still the same, a ratio of exactly 1 on any backend. So each minibatch but the
        first costs a forward pass more. "current": to those of each update's own weights, so the ratio is 1 and
        nothing is clipped: the plain policy gradient (Black et al.'s DDPO-SF).

    Returns:
      The new weights, {"loss", "grad_norm"} of each update, log-ratios.
    """
    n = len(minibatches.weight)
    recomputes = old_log_prob == "recomputed" and n * epochs > 1
    n_records = n - 1 if recomputes else 0
    order = jnp.arange(n_records + n * epochs) - n_records  # of the updates, from 0; those before it only record
    visits = Visit(jnp.where(order < 0, order + n, order % n), order < 0, order <= 0)
    if old_log_prob != "sampled" and not recomputes:
        minibatches = minibatches._replace(old_log_prob=None)

    def one_visit(carry, visit):
        weights, old = carry
        chosen = jax.tree.map(lambda x: x[visit.minibatch], minibatches._replace(old_log_prob=old))
        (loss, grads), log_prob = minibatch_gradient(method, weights[0], frozen, chosen, visit if recomputes else None)
        change, opt_state = method.optimizer.update(grads, weights[1], weights[0])
        new, before = (optax.apply_updates(weights[0], change), opt_state), chosen.old_log_prob
        if recomputes:
            before = jnp.where(visit.is_own, log_prob, before)
            old = old.at[visit.minibatch].set(before)
            new = jax.tree.map(lambda kept, new: jnp.where(visit.records, kept, new), weights, new)
        log_ratio = jnp.zeros_like(log_prob) if before is None else log_prob - before
        return (new, old), ({"loss": loss, "grad_norm": optax.tree.norm(grads)}, log_ratio)

    (weights, _), found = jax.lax.scan(one_visit, (weights, minibatches.old_log_prob), visits)
    means, log_ratio = jax.tree.map(lambda x: x[n_records:].reshape(epochs, n, *x.shape[1:]), found)
    return weights, means, log_ratio


def updated(
    method: PolicyGradient,
    state: TrainState,
    frozen: Any,
    samples: Samples,
    weight: Float[Array, "chunks m"] | Float[Array, "chunks T m"],
    extra: Any,
    *,
    clip: float,
    n_updates: int,
    inner_epochs: int,
    old_log_prob: str,
) -> tuple[TrainState, dict[str, Array]]:
    """What `Algorithm.update` returns, once the samples' weights are known; `extra` is the next state's."""
    weights, means, log_ratio = several_updates(
        method,
        (state.lora, state.opt_state),
        frozen,
        minibatches(samples.trajectory, weight, n_updates=n_updates),
        epochs=inner_epochs,
        old_log_prob=old_log_prob,
    )
    metrics = {name: value.mean() for name, value in means.items()} | ratio_metrics(log_ratio, clip)
    metrics |= {"lora_norm": optax.tree.norm(weights[0])} | reward_metrics(samples.rewards, samples.parts)
    return TrainState(state.iteration + 1, *weights, extra), metrics


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
        its_steps = log_ratio[..., steps, :]
        if its_steps.size:  # fewer steps than thirds
            metrics[f"ratio/log_std_{name}"] = jnp.sqrt(mean(jnp.square(its_steps - mean(its_steps))))
    return metrics
