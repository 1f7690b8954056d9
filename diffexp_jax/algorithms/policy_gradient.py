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
from jaxtyping import Array, Float

from diffexp_jax.algorithms.algorithm import (
    Policy,
    Samples,
    by_chunks,
    chunked,
    mean_over,
    reward_metrics,
    rewarded,
    zeros_like_output,
)
from diffexp_jax.algorithms.ratios import ratio_metrics
from diffexp_jax.algorithms.state import TrainState
from diffexp_jax.algorithms.visits import Visit, schedule
from diffexp_jax.parallel import AXIS
from diffexp_jax.sampling import Context, Network, Steps, Trajectory, initial_latents, rollout, transition_log_prob


class Transition(NamedTuple):
    """One step of the sampled chain, of the samples of a chunk."""

    x_t: Float[Array, "B h w c"]
    x_tm1: Float[Array, "B h w c"]
    weight: Float[Array, "B"]  # what its log-prob is weighted by: an advantage
    old_log_prob: Float[Array, "B"] | None  # of the policy that sampled; None: of the LoRA at the update
    step: Steps  # one row


class Minibatch(NamedTuple):
    """What one optimizer step is made of."""

    trajectory: Trajectory  # a leading axis [chunks]
    weight: Any  # [chunks T B], or where the method weighs, a tree of such arrays
    old_log_prob: Float[Array, "chunks T B"] | None


class PolicyGradient(NamedTuple):
    """How a method learns from the steps of its samples.

    `loss(log_prob [B], outputs, transition)` is (a scalar, {metric: scalar}). Its mean over the steps, samples and
    devices is followed; the metrics' are reported.

    `reference(extra)` is a second LoRA, of what the method keeps in `TrainState.extra` (an average, an older one; None
    is the untuned model). Where it is given, `outputs` is the network's guided output [B h w c] by both LoRAs: (by the
    one that is trained, by the reference). Else it is None.

    `weigh(log_prob, old_log_prob, weight)`, all [T, B], gives the weights [T, B] that the loss gets in place of those
    that the samples had, which may be a tree of arrays: once for each update, from the log-probs of all steps and
    samples that it is made of on a device, a prompt's group together. So a loss may couple steps and samples: see
    `slopes_of`. At an iteration's first update these log-probs are the sampling program's.
    """

    policy: Policy
    optimizer: optax.GradientTransformation
    loss: Callable[..., tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]
    reference: Callable[[Any], Any] | None = None
    weigh: Callable[[Array, Array, Any], Float[Array, "T B"]] | None = None


def slopes_of(loss: Callable[[Array, Array, Any], Float[Array, ""]]) -> Callable[..., Float[Array, "T B"]]:
    """A `PolicyGradient.weigh`, for any scalar loss(log_prob, old_log_prob, weight) of all steps and samples, [T, B].

    With `weighted_log_prob` as the method's loss, its gradient is followed: d loss = sum_tb (d loss / d log p_tb) d log
    p_tb, a step at a time.
    """

    def weigh(log_prob, old_log_prob, weight):
        return log_prob.size * jax.grad(loss)(log_prob, old_log_prob, weight)

    return weigh


def weighted_log_prob(
    log_prob: Float[Array, "B"], outputs: Any, transition: Transition
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """mean of weight log p: the loss whose slopes are the weights; nothing to report."""
    return (transition.weight * log_prob).mean(), {}


class Trained(NamedTuple):
    """What an optimizer step changes."""

    lora: Any
    opt_state: Any


class Fixed(NamedTuple):
    """What an iteration's updates read and leave alone."""

    frozen: Any
    extra: Any  # the state's, before the iteration


def sample(
    policy: Policy,
    state: Any,
    frozen: Any,
    batch: Any,
    steps: Steps,
    *,
    n_chunks: int,
    n_trained: int | None = None,
    confined: bool = False,
) -> Samples:
    """A method's `Algorithm.sample`: trajectories, scored. They keep the chunks' axis.

    They have the first `n_trained` steps of a chain (None: all), or where `confined` those from the first with noise.
    """

    def one(chunk):
        denoise = partial(policy.network, frozen, state.lora)
        x_T = initial_latents(chunk.key, policy.latent_shape)
        x_0, trajectory = rollout(policy.process, denoise, x_T, chunk.context, steps, chunk.key, keep_trajectory=True)
        kept = trajectory.noisy(n_trained) if confined else trajectory.first(n_trained)
        return Samples(kept, *rewarded(policy, frozen, x_0, chunk.tokens))

    return by_chunks(one, batch, n_chunks)


def step_gradient(
    rule: PolicyGradient,
    network: Network,
    lora: Any,
    fixed: Fixed,
    transition: Transition,
    context: Context,
    visit: Visit | None,
) -> tuple[tuple[dict[str, Float[Array, ""]], Any], Float[Array, "B"]]:
    """((metrics, the loss' gradient in `lora`), log-prob) of one step; zeros for the first two where it does not learn.

    The metrics are "loss" and the loss' own. What does not learn evaluates no reference, and has no backward pass.

    `visit` None: it learns, and its old log-probs are known.
    """

    def evaluate(lora):
        out = network(fixed.frozen, lora, transition.x_t, transition.step, context)
        log_prob = transition_log_prob(rule.policy.process, out, transition.x_t, transition.x_tm1, transition.step)
        return log_prob, out if rule.reference else None

    (log_prob, out), pull_back = jax.vjp(evaluate, lora)
    if transition.old_log_prob is None:
        transition = transition._replace(old_log_prob=log_prob)
    elif visit is not None:
        transition = transition._replace(old_log_prob=jnp.where(visit.notes_old, log_prob, transition.old_log_prob))

    def loss(log_prob, out, reference):
        value, seen = rule.loss(log_prob, (out, reference) if rule.reference else None, transition)
        return value, {"loss": value} | seen

    def learnt():
        reference = None
        if rule.reference:
            second = rule.reference(fixed.extra)
            reference = network(fixed.frozen, second, transition.x_t, transition.step, context)
        slopes, seen = jax.grad(loss, argnums=(0, 1), has_aux=True)(log_prob, out, reference)
        return seen, pull_back(slopes)[0]

    if visit is None:
        return learnt(), log_prob
    nothing = zeros_like_output(loss, log_prob, out, out)[1], jax.tree.map(jnp.zeros_like, lora)
    return jax.lax.cond(visit.learns, learnt, lambda: nothing), log_prob


def minibatch_gradient(
    rule: PolicyGradient, lora: Any, fixed: Fixed, minibatch: Minibatch, visit: Visit | None
) -> tuple[tuple[dict[str, Float[Array, ""]], Any], Float[Array, "chunks T B"]]:
    """((metrics, gradient), log-probs): mean over chunks, steps and devices, and each step's log-prob under `lora`."""

    def over_steps(chunk):
        kept = chunk.trajectory

        def one(xs):
            i, weight, old_log_prob, step = xs
            transition = Transition(kept.x_t(i), kept.x_tm1[i], weight, old_log_prob, step)

            def gradient(network):
                return step_gradient(rule, network, lora, fixed, transition, kept.context, visit)

            return rule.policy.network.at(step, gradient)

        xs = jnp.arange(len(kept.x_tm1)), chunk.weight, chunk.old_log_prob, kept.steps
        return mean_over(one, xs)

    means, log_prob = mean_over(over_steps, minibatch)
    return jax.lax.pmean(means, AXIS), log_prob


def minibatches(trajectory: Trajectory, weight: Any, *, n_updates: int) -> Minibatch:
    """The samples' chunks shared out to the updates, [updates, chunks, ...]; a sample's weight is that of its steps."""
    shape = trajectory.log_prob.shape
    weight = jax.tree.map(lambda x: jnp.broadcast_to(x if x.ndim == 3 else x[:, None], shape), weight)
    return chunked(Minibatch(trajectory, weight, trajectory.log_prob), n_updates)


def weighed(
    weigh: Callable[[Array, Array, Any], Array], log_prob: Float[Array, "chunks T m"], minibatch: Minibatch
) -> Minibatch:
    """The minibatch with `PolicyGradient.weigh`'s weights; `log_prob` is of the LoRA before the update."""
    old = log_prob if minibatch.old_log_prob is None else minibatch.old_log_prob
    of_all = log_prob, old, minibatch.weight
    whole = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1), of_all)  # [T, chunks * m]
    chunks, n_steps, m = log_prob.shape
    return minibatch._replace(weight=weigh(*whole).reshape(n_steps, chunks, m).swapaxes(0, 1))


def several_updates(
    rule: PolicyGradient,
    trained: Trained,
    fixed: Fixed,
    minibatches: Minibatch,
    *,
    epochs: int,
    old_log_prob: str,
) -> tuple[Trained, dict[str, Float[Array, "epochs updates"]], Float[Array, "epochs updates chunks T B"]]:
    """One optimizer step for each minibatch, `epochs` times over, by the `schedule` of visits.

    Args:
      minibatches: leading axes [updates, chunks, ...]; their old log-probs are those of the sampling program.
      old_log_prob: what the ratio is relative to. "sampled": to those. "recomputed": to those of the update program, by
        the LoRA before the first update, so that the ratio there is exactly 1 on any backend. "current": to those by
        each update's own LoRA, so the ratio is 1 and nothing is clipped: the plain policy gradient (Black et al.'s
        DDPO-SF).

    Returns:
      What the updates have changed, metrics of each update, log-ratios.
    """
    n, newest = len(minibatches.old_log_prob), minibatches.old_log_prob if rule.weigh else None
    recomputes = old_log_prob == "recomputed" and n * epochs > 1
    visits = schedule(n, epochs, recomputes=recomputes, weighs=rule.weigh is not None)
    always_learns, learns = visits.learns.all(), np.flatnonzero(visits.learns)
    if old_log_prob != "sampled" and not recomputes:
        minibatches = minibatches._replace(old_log_prob=None)

    def one_visit(carry, visit):
        trained, old, newest = carry
        minibatch = jax.tree.map(lambda x: x[visit.minibatch], minibatches._replace(old_log_prob=old))
        if rule.weigh:
            minibatch = weighed(rule.weigh, newest[visit.minibatch], minibatch)
        known = None if always_learns and not recomputes else visit
        (seen, grads), log_prob = minibatch_gradient(rule, trained.lora, fixed, minibatch, known)
        change, opt_state = rule.optimizer.update(grads, trained.opt_state, trained.lora)
        new, before = Trained(optax.apply_updates(trained.lora, change), opt_state), minibatch.old_log_prob
        if recomputes:
            before = jnp.where(visit.notes_old, log_prob, before)
            old = old.at[visit.minibatch].set(before)
        if not always_learns:
            new = jax.tree.map(lambda kept, new: jnp.where(visit.learns, new, kept), trained, new)
        log_ratio = jnp.zeros_like(log_prob) if before is None else log_prob - before
        newest = newest.at[visit.minibatch].set(log_prob) if rule.weigh else None
        return (new, old, newest), (seen | {"grad_norm": optax.tree.norm(grads)}, log_ratio)

    (trained, *_), found = jax.lax.scan(one_visit, (trained, minibatches.old_log_prob, newest), visits)
    means, log_ratio = jax.tree.map(lambda x: x[learns].reshape(epochs, n, *x.shape[1:]), found)
    return trained, means, log_ratio


def updated(
    rule: PolicyGradient,
    state: TrainState,
    frozen: Any,
    samples: Samples,
    weight: Any,
    extra: Any,
    *,
    clip: float,
    n_updates: int,
    inner_epochs: int,
    old_log_prob: str,
) -> tuple[TrainState, dict[str, Array]]:
    """What `Algorithm.update` returns, once the samples' weights are known; `extra` is the next state's.

    `weight` is [chunks, m] or [chunks, T, m], of `weigh` a tree of these.
    """
    trained, means, log_ratio = several_updates(
        rule,
        Trained(state.lora, state.opt_state),
        Fixed(frozen, state.extra),
        minibatches(samples.trajectory, weight, n_updates=n_updates),
        epochs=inner_epochs,
        old_log_prob=old_log_prob,
    )
    metrics = {name: value.mean() for name, value in means.items()} | ratio_metrics(log_ratio, clip)
    metrics |= {"lora_norm": optax.tree.norm(trained.lora)} | reward_metrics(samples.rewards, samples.parts)
    return TrainState(state.iteration + 1, *trained, extra), metrics
