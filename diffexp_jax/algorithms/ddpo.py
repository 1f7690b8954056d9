"""DDPO: denoising diffusion policy optimisation with importance sampling (Black et al. 2024, DDPO-IS)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from diffexp_jax.algorithms import extremes
from diffexp_jax.algorithms.advantages import KINDS, with_advantages
from diffexp_jax.algorithms.algorithm import (
    SAMPLE,
    Algorithm,
    Inputs,
    Needs,
    Policy,
    Setup,
    across_devices,
    chunked,
    first_state,
    stepped,
)
from diffexp_jax.algorithms.one_pass import gradient_of_loss, sample_with_gradients
from diffexp_jax.algorithms.policy_gradient import PolicyGradient, Transition, sample, updated
from diffexp_jax.algorithms.policy_settings import PolicyMethod
from diffexp_jax.algorithms.proportionate import log_hinge_loss, weights_of_steps
from diffexp_jax.algorithms.state import TrainState, init_stats, update_stats
from diffexp_jax.errors import InputError
from diffexp_jax.limits import Number, check_number, positive, setting, whole
from diffexp_jax.parallel import AXIS
from diffexp_jax.sampling import Process, transition_kl


def clipped_ratio_loss(
    log_prob: Float[Array, "B"], old_log_prob: Float[Array, "B"], adv: Float[Array, "B"], *, clip: float
) -> Float[Array, ""]:
    """DiffExp Eq. 6, clipped as in PPO: mean of max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = p / p_old."""
    chex.assert_equal_shape((log_prob, old_log_prob, adv))
    ratio = jnp.exp(log_prob - old_log_prob)
    return jnp.maximum(-adv * ratio, -adv * jnp.clip(ratio, 1.0 - clip, 1.0 + clip)).mean()


def step_loss(
    log_prob: Float[Array, "B"],
    outputs: Any,
    step: Transition,
    *,
    process: Process,
    clip: float,
    kl_weight: float = 0.0,
    kl_by_length: bool = False,
    proportionate: bool = False,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`clipped_ratio_loss`, or where `proportionate` `log_hinge_loss`; and kl_weight times the KL to the untuned model.

    The metric "kl/step" is that KL, a mean over the samples.

    Where there is a kl_weight, `outputs` are the network's guided ones: of the LoRA that is trained, of the untuned
    model. `kl_by_length`: the KL is times the step's length dt, so of flow matching it is |dmu|^2 / (2 g^2), without
    the dt that is in sigma_t^2 = g^2 dt.
    """
    of_ratio = log_hinge_loss if proportionate else clipped_ratio_loss
    loss = of_ratio(log_prob, step.old_log_prob, step.weight, clip=clip)
    if not kl_weight:
        return loss, {}
    kl = transition_kl(process, *outputs, step.x_t, step.step).mean()
    return loss + kl_weight * (kl * step.step.dt if kl_by_length else kl), {"kl/step": kl}


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
    advantage: str = "prompt",
    old_log_prob: str = "sampled",
    one_pass: bool = False,
    n_trained: int | None = None,
    confined: bool = False,
    group: int = 1,
    keep: int | None = None,
    **of_loss: Any,
) -> Algorithm:
    """Makes the algorithm.

    Args:
      n_updates, inner_epochs: optimizer updates a pass over the samples, each on its own share; passes an iteration.
      n_prompts, n_chunks: see `Setup`; the second is a multiple of n_updates.
      clip, of_loss: see `step_loss`, and `equal_steps` (1e-4: log-probs are means over a latent).
      advantage, advantage_clip, stats_buffer, stats_min_count, group, keep: see `with_advantages`.
      old_log_prob, one_pass: see `several_updates`; and `one_pass.py`, for a single update an iteration.
      n_trained, confined: which of a chain's steps are learnt from, see `sample`.
    """

    def init(lora) -> TrainState:
        return first_state(optimizer, lora, init_stats(n_prompts, stats_buffer))

    kl_weight, proportionate = (of_loss.get(name) for name in ("kl_weight", "proportionate"))
    loss = partial(step_loss, process=policy.process, clip=clip, **of_loss)
    rule = PolicyGradient(policy, optimizer, loss, reference=(lambda extra: None) if kl_weight else None)
    of_rewards = dict(kind=advantage, clip=advantage_clip, min_count=stats_min_count, group=group, keep=keep)
    updates = dict(clip=clip, n_updates=n_updates, inner_epochs=inner_epochs, old_log_prob=old_log_prob)

    def update(state, frozen, inputs: Inputs):
        batch, samples = inputs.batch, inputs.samples
        prompt_ids, rewards = (across_devices(x, group) for x in (batch.prompt_id, samples.rewards))
        stats = update_stats(state.extra, prompt_ids, rewards)
        samples, adv = with_advantages(stats, batch.prompt_id, samples, (prompt_ids, rewards), n_updates, **of_rewards)
        if one_pass:
            loss, grads = -jax.lax.pmean(adv.mean(), AXIS), gradient_of_loss(samples.gradients, adv)  # at ratios of 1
            state, metrics = stepped(optimizer, state, loss, grads, (samples.rewards, samples.parts), stats)
        else:
            of_step = weights_of_steps(policy.process, inputs.steps, n_trained, confined, proportionate)
            weight = chunked(adv, len(samples.trajectory.x_T))[:, None] * of_step[:, None]  # [chunks, T, m]
            state, metrics = updated(rule, state, frozen, samples, weight, stats, **updates)
            if kl_weight:  # a sum over the steps that are learnt from, in place of their mean
                metrics["kl/path"] = weight.shape[1] * metrics.pop("kl/step")
        metrics["advantage/own_statistics"] = (stats.seen[prompt_ids] >= stats_min_count).mean()
        return state, metrics

    sampled = sample_with_gradients if one_pass else sample
    return Algorithm(init, partial(sampled, policy, n_chunks=n_chunks, n_trained=n_trained, confined=confined), update)


# ------------------------------------------------------------------------------------------------------------ settings

GRADIENTS = ("auto", "onepass", "twopass")
TWO_PASSES = {"kl_weight": 0.0, "proportionate": False, "keep": 1.0}  # with other values
MOST_BYTES = 2 * 2**30  # of the samples' gradients on a device, up to which "auto" makes them while sampling


@dataclass(frozen=True, kw_only=True)
class DDPO(PolicyMethod):
    """DDPO: policy gradient with a clipped importance ratio (Black et al. 2024)."""

    name: ClassVar[str] = "ddpo"
    needs: ClassVar[Needs] = Needs(step_noise=True)
    advantage: str = setting(
        "prompt",
        "what a reward is compared with",
        KINDS,
        about="""
        "prompt": the mean and std of the prompt's newest rewards, as published. Of the batch.group samples of its
        prompt: "group" their mean and std (GRPO), "group_mean" their mean and the std of all (Flow-GRPO), "loo" the
        mean of the others (leave-one-out), unscaled.
        """,
    )
    kl_weight: float = setting(
        0.0,
        "factor of each step's KL to the untuned model, in the loss; 0: none",
        Number(0.0, 1e6),
        about="""
        As in Flow-GRPO (Liu et al. 2025): a mean over the steps, of means over a latent's numbers. Each update then
        evaluates the untuned model too, and is made in two passes.
        """,
    )
    kl_by_length: bool = setting(
        False,
        "whether each step's KL is times the step's length, as in Flow-GRPO's code",
        about="""
        Of flow matching it is then the distance of the two means without the step's dt in the noise's variance.
        """,
    )
    proportionate: bool = setting(
        False,
        "whether every step counts alike, as in PCPO (Lee and Ye 2025)",
        about="""
        A log-prob's gradient grows as its step's noise shrinks: each step's is divided by that factor. The loss is
        linear in the log-ratio, up to ddpo.clip (a log-hinge). Made in two passes.
        """,
    )
    keep: float = setting(
        1.0,
        "share of each prompt's batch.group images that are learnt from, those whose rewards vary most; 1: all",
        positive(1.0),
        about="""
        As in PODS (Xu et al. 2025): more images are sampled and scored than the update can afford. At least two are
        kept, the lowest and the highest, and but for "prompt" compared with each other alone. Made in two passes.
        """,
    )
    advantage_clip: float = setting(5.0, "largest advantage, in standard deviations", positive())
    stats_buffer: int = setting(32, "newest rewards kept per prompt", whole(1, 2**20))
    stats_min_count: int = setting(16, "rewards of a prompt before its own mean and std are used", whole(1, 2**20))
    gradient: str = setting(
        "auto",
        "when the gradient is made",
        GRADIENTS,
        about="""
        "onepass": each sample's gradient is made while it is sampled, for ddpo.updates = ddpo.inner_epochs = 1 alone:
        no second pass of the network, no stored chains, but a gradient per sample. "twopass": after the rewards are
        known. "auto": in one pass where an iteration is one update and the gradients take at most 2 GiB a device.
        """,
    )

    @property
    def compares_groups(self) -> bool:
        return self.advantage != "prompt" or self.keep < 1.0

    def passes(self, n_steps: int, full_float32: bool) -> Mapping[str, float]:
        passes = super().passes(n_steps, full_float32)
        share = self.inner_epochs * self.trained_share(n_steps)
        passes |= {"of the untuned model": share} if self.kl_weight else {}
        return {why: n if why == SAMPLE else self.keep * n for why, n in passes.items()}

    def check(self, n_steps: int) -> None:
        for key, wanted in TWO_PASSES.items():
            if self.gradient == "onepass" and getattr(self, key) != wanted:
                raise InputError(f"ddpo.gradient='onepass': wants ddpo.{key}={wanted}")
        if self.gradient == "onepass" and self.has_several_updates:
            raise InputError(
                "ddpo.gradient='onepass': wants ddpo.updates=1 and ddpo.inner_epochs=1: after an update the samples' "
                "gradients are of other weights"
            )
        buffer = whole(1, self.stats_buffer)
        check_number(f"ddpo.stats_buffer={self.stats_buffer}, ddpo.stats_min_count=", self.stats_min_count, buffer)

    def in_one_pass(self, n_samples: int, lora_size: int) -> bool:
        """What `gradient` means for this many samples a device and numbers that are trained."""
        if self.gradient != "auto":
            return self.gradient == "onepass"
        possible = not self.has_several_updates and all(getattr(self, key) == x for key, x in TWO_PASSES.items())
        return possible and 4 * n_samples * lora_size <= MOST_BYTES

    def make(self, setup: Setup) -> Algorithm:
        return ddpo(
            setup.policy,
            setup.optimizer,
            **self.keywords(setup),
            advantage=self.advantage,
            kl_weight=self.kl_weight,
            kl_by_length=self.kl_by_length,
            proportionate=self.proportionate,
            keep=extremes.number_kept(setup.group, self.keep) if self.keep < 1.0 else None,
            advantage_clip=self.advantage_clip,
            stats_buffer=self.stats_buffer,
            stats_min_count=self.stats_min_count,
            one_pass=self.in_one_pass(setup.n_samples, setup.lora_size),
        )
