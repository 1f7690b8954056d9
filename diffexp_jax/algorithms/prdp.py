"""PRDP: proximal reward difference prediction (Deng et al. 2024, arXiv 2402.08714).

Of all policies that gain reward and stay near the untuned model, the best one's log-ratios to it, R = log p(chain) /
p_0(chain), differ between two chains of a prompt as the rewards do: R_a - R_b = (r_a - r_b) / beta. PRDP regresses the
one on the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from diffexp_jax.algorithms.algorithm import Algorithm, Inputs, Needs, Policy, Setup, chunked, first_state
from diffexp_jax.algorithms.policy_gradient import PolicyGradient, sample, slopes_of, updated, weighted_log_prob
from diffexp_jax.algorithms.policy_settings import PolicyMethod
from diffexp_jax.algorithms.state import TrainState
from diffexp_jax.limits import positive, setting, whole
from diffexp_jax.parallel import AXIS
from diffexp_jax.sampling import Trajectory, step_log_prob


class Compared(NamedTuple):
    """What PRDP goes by besides the log-probs; [chunks, T, m] before the chunks are joined."""

    rewards: Float[Array, "*chunks T B"]  # the same at each step
    untuned: Float[Array, "*chunks T B"]  # log-probs of the untuned model


def pair_loss(
    log_prob: Float[Array, "T B"],
    old_log_prob: Float[Array, "T B"],
    compared: Compared,
    *,
    group: int,
    beta: float,
    clip: float,
) -> Float[Array, ""]:
    """The loss of PRDP's App. G: mean over the prompts of the mean over their pairs with r_i > r_j of max(m_ij, c_ij).

    R = mean_t (log p_theta - log p_0), of log-probs that are means over a latent's numbers; in m_ij = (R_i - R_j -
    (r_i - r_j) / beta)^2 as it is, in c_ij with each step's log p_theta clipped to at most `clip` from log p_old. A
    prompt whose rewards are all equal has no pair and a loss of 0.

    Which of the two is larger is not told by them: wanted differences are about 1000 and the published clip is 1e-6, so
    that both are the same number in float32. The sign of m - c = clipped_off (2 error - clipped_off) tells, with
    error = R_i - R_j - (r_i - r_j) / beta.
    """
    moved = log_prob - old_log_prob
    beyond = moved - jnp.clip(moved, -clip, clip)  # exactly 0 within

    def differences(x):
        x = x.reshape(-1, group)
        return x[:, :, None] - x[:, None]  # [prompts, group, group]

    of_rewards = differences(compared.rewards[0])
    error = differences((log_prob - compared.untuned).mean(0)) - of_rewards / beta
    clipped_off = differences(beyond.mean(0))
    unclipped_is_larger = clipped_off * (2.0 * error - clipped_off) >= 0.0
    error = jnp.where(unclipped_is_larger, error, error - clipped_off)
    counts = of_rewards > 0
    total = jnp.where(counts, jnp.square(error), 0.0).sum((1, 2))
    return (total / jnp.maximum(counts.sum((1, 2)), 1)).mean()


def untuned_log_probs(policy: Policy, frozen: Any, trajectory: Trajectory) -> Float[Array, "chunks T m"]:
    """Of all steps of the chains, which have a leading axis [chunks]: one pass of the untuned network over them."""

    def of_chunk(kept):
        def of_step(xs):
            i, step = xs
            denoise = partial(policy.network, frozen, None)
            return step_log_prob(policy.process, denoise, kept.x_t(i), kept.x_tm1[i], step, kept.context)

        return jax.lax.map(of_step, (jnp.arange(len(kept.x_tm1)), kept.steps))

    return jax.lax.map(of_chunk, trajectory)


def prdp(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    n_updates: int,
    n_chunks: int,
    inner_epochs: int,
    beta: float,
    clip: float,
    old_log_prob: str = "sampled",
    n_trained: int | None = None,
    confined: bool = False,
    group: int,
) -> Algorithm:
    """Makes the algorithm. The metric `loss` is `pair_loss` before an iteration's first update.

    Args:
      n_updates, n_chunks, inner_epochs, old_log_prob, n_trained, confined: as of `ddpo`.
      beta, clip: see `pair_loss`.
      group: see `Setup`.
    """
    loss = partial(pair_loss, group=group, beta=beta, clip=clip)
    rule = PolicyGradient(policy, optimizer, weighted_log_prob, weigh=slopes_of(loss))
    updates = dict(clip=clip, n_updates=n_updates, inner_epochs=inner_epochs, old_log_prob=old_log_prob)

    def init(lora) -> TrainState:
        return first_state(optimizer, lora)

    def update(state, frozen, inputs: Inputs):
        samples = inputs.samples
        old, untuned = samples.trajectory.log_prob, untuned_log_probs(policy, frozen, samples.trajectory)
        rewards = jnp.broadcast_to(chunked(samples.rewards, n_chunks)[:, None], old.shape)
        compared = Compared(rewards, untuned)
        state, metrics = updated(rule, state, frozen, samples, compared, None, **updates)
        old, *compared = (x.swapaxes(0, 1).reshape(old.shape[1], -1) for x in (old, *compared))  # [T, B]
        first = loss(old, old, Compared(*compared))
        path = (old - compared[1]).sum(0).mean()  # a mean over samples of log p / p_0
        metrics |= dict(zip(("loss", "kl/path"), jax.lax.pmean((first, path), AXIS), strict=True))
        return state, metrics

    return Algorithm(init, partial(sample, policy, n_chunks=n_chunks, n_trained=n_trained, confined=confined), update)


@dataclass(frozen=True, kw_only=True)
class PRDP(PolicyMethod):
    """PRDP: the log-ratios of a prompt's samples are made to differ as their rewards do (Deng et al. 2024)."""

    name: ClassVar[str] = "prdp"
    needs: ClassVar[Needs] = Needs(step_noise=True, groups=True)
    updates: int = setting(1, "optimizer updates an epoch, each on whole prompts", whole(1, 4096))
    inner_epochs: int = setting(
        10, "passes over an iteration's samples; 10 with 45 prompts, 1 with 100,000 in the paper", whole(1, 4096)
    )
    clip: float = setting(
        1e-6,
        "how far a step's log-prob may move from the sampling policy's; 1e-4 with 100,000 prompts in the paper",
        positive(),
    )
    beta: float = setting(
        3e-5,
        "weight of the KL to the untuned model, in the reward's units",
        positive(),
        about="""
        In the paper rewards are a cosine (HPSv2, PickScore without its factor), and beta is 3e-5 with 45 prompts, 3e-6
        with 100,000. The log-ratios that it weighs are means over steps and a latent's numbers.
        """,
    )

    def passes(self, n_steps: int, full_float32: bool) -> Mapping[str, float]:
        share = self.trained_share(n_steps)
        found = super().passes(n_steps, full_float32) | {"of the untuned model": share}
        again = (self.inner_epochs - 1.0 / self.updates) * share  # the first update's are those of sampling
        return found | ({"to weigh": again} if again else {})

    def make(self, setup: Setup) -> Algorithm:
        given = self.keywords(setup)
        del given["n_prompts"]  # it keeps no statistics of prompts
        return prdp(setup.policy, setup.optimizer, **given, beta=self.beta)
