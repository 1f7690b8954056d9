"""AWM: advantage-weighted matching (Xue et al. 2025, arXiv 2509.25050).

A policy gradient whose log-likelihood of an image is the loss of pretraining, at random noise levels, in place of the
log-probs of a sampler's steps: log p = -|target - out|^2, here through a generalised Huber function. So the noise of a
chain does not enter the gradient, and any sampler will do.

Deviations: noise levels are drawn for each image, in place of one draw for the images of a forward pass; and the
network's own output is compared, so that it is the velocity, as published, for a flow model alone. The factor t, a flow
model's noise level, is then that of the same mixture of signal and noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from diffexp_jax.algorithms import by_prompt, denoising
from diffexp_jax.algorithms.algorithm import SAMPLE, WITH_GRADIENT, Algorithm, Inputs, Needs, Policy, Setup, first_state
from diffexp_jax.algorithms.ddpo import clipped_ratio_loss
from diffexp_jax.algorithms.denoising import Chunk, Fixed, Rule
from diffexp_jax.algorithms.denoising_settings import DenoisingMethod
from diffexp_jax.algorithms.state import TrainState
from diffexp_jax.limits import Number, positive, setting, whole

EPSILON = 1e-10  # of the Huber function, as published


def log_likelihood(
    out: Float[Array, "B h w c"], target: Float[Array, "B h w c"], level: Float[Array, "B"], *, power: float
) -> Float[Array, "B"]:
    """-level ((d + 1e-10)^p - 1e-10^p) / p, d = mean |target - out|^2: but for a constant, log p of the images.

    p = 1 is the plain squared error, p = 1/2 its root; `level` is the noise level, 0 to 1.
    """
    d = denoising.mean_square(target - out)
    return -level * ((d + EPSILON) ** power - EPSILON**power) / power


def awm_loss(
    outs: dict[str, Float[Array, "B h w c"] | None],
    target: Float[Array, "B h w c"],
    level: Float[Array, "B"],
    adv: Float[Array, "B"],
    *,
    power: float,
    clip: float,
    kl_weight: float,
    average_weight: float,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The clipped policy gradient and the two penalties, and what a run reports of them.

    Args:
      outs: the network's outputs by the "trained" LoRA, by that which "sampled" (None: it is the same, and the ratio
        1), by none ("untuned", where it has a weight) and by the "average" (where it has).
      adv: in -1..1.
    """
    out, sampled = outs["trained"], outs["sampled"]
    log_prob = log_likelihood(out, target, level, power=power)
    old = jax.lax.stop_gradient(log_prob) if sampled is None else log_likelihood(sampled, target, level, power=power)
    total = clipped_ratio_loss(log_prob, old, adv, clip=clip)
    seen = {} if sampled is None else {"ratio/mean": jnp.exp(log_prob - old).mean()}
    for name, weight in (("untuned", kl_weight), ("average", average_weight)):
        if weight:
            seen[f"distance/{name}"] = denoising.mean_square(out - outs[name]).mean()
            total += weight * seen[f"distance/{name}"]
    return total, seen


def awm(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    n_chunks: int,
    n_updates: int,
    inner_epochs: int,
    strata: dict[str, Any],
    group: int,
    guided: bool,
    advantage_clip: float,
    global_std: bool,
    decay: dict[str, float],
    **losses: float,
) -> Algorithm:
    """Makes the algorithm; the other settings are those of `AWM`.

    Args:
      strata, decay, losses: of `denoising.stratified_timesteps`, `denoising.rising` and `awm_loss`.
    """
    network, has_average = policy.network.at_any(guided=guided), losses["average_weight"] > 0
    n_of_iteration = n_updates * inner_epochs

    def init(lora) -> TrainState:
        average = {"average": jax.tree.map(jnp.array, lora)} if has_average else None
        return first_state(optimizer, lora, average)

    def loss(lora, fixed: Fixed, chunk: Chunk, i):
        keys = denoising.folded(chunk.key, i)
        t = denoising.stratified_timesteps(denoising.folded(keys, 0), fixed.steps, i, **strata)
        x_t, target, row = denoising.noised(policy.process, chunk.latents.x_0, t, denoising.folded(keys, 1))
        row = denoising.guided_as(fixed.steps, row) if guided else row

        def output(lora):
            return network(fixed.frozen, lora, x_t, row, chunk.context)

        outs = {
            "trained": output(lora),
            "sampled": output(fixed.lora) if n_of_iteration > 1 else None,
            "untuned": output(None) if losses["kl_weight"] else None,
            "average": output(fixed.extra["average"]) if has_average else None,
        }
        adv = jnp.clip(chunk.weight / advantage_clip, -1.0, 1.0)
        return awm_loss(outs, target, denoising.scales(policy.process, row).level, adv, **losses)

    rule = Rule(optimizer, loss, strata["n"])
    split = dict(n_chunks=n_chunks, n_updates=n_updates, inner_epochs=inner_epochs)

    def sample(state, frozen, batch, steps):
        return denoising.sample(policy, state.lora, frozen, batch, steps, n_chunks=n_chunks)

    def update(state, frozen, inputs: Inputs):
        adv = denoising.compared(inputs, group, partial(by_prompt.advantages, global_std=global_std))
        state, metrics = denoising.updated(rule, state, frozen, inputs, adv, **split)
        return denoising.followed(state, "average", n_of_iteration, **decay) if has_average else state, metrics

    return Algorithm(init, sample, update)


@dataclass(frozen=True, kw_only=True)
class AWM(DenoisingMethod):
    """AWM: advantage-weighted matching, a policy gradient by the loss of pretraining (Xue et al. 2025)."""

    name: ClassVar[str] = "awm"
    needs: ClassVar[Needs] = Needs(groups=True)
    timesteps: int = setting(
        6, "noise levels at which each image is learnt, one of each of so many parts of the sampler's", whole(1, 1000)
    )
    timestep_fraction: float = setting(
        0.9, "share of the sampler's steps, from the noise on, that noise levels are drawn from", positive(1.0)
    )
    power: float = setting(0.25, "power of the squared error in the log-likelihood", positive(1.0))
    clip: float = setting(1.0, "how far the importance ratio may be from 1, of several updates", positive())
    advantage_clip: float = setting(5.0, "advantage, in standard deviations, that counts as 1", positive())
    global_std: bool = setting(True, "whether advantages are in all images' deviation (else the prompt's own)")
    kl_weight: float = setting(
        1e-3,
        "factor of |output - the untuned model's|^2 in the loss; 0: none",
        Number(0.0, 1e6),
        about="Published: 1e-3 for GenEval, 3e-3 for text in images, 1e-4 for PickScore.",
    )
    average_weight: float = setting(
        1.0, "factor of |output - that of an average of the LoRA's past|^2; 0: no average", Number(0.0, 1e6)
    )
    average_rate: float = setting(1e-3, "what each update adds to the decay of the average", Number(0.0, 1.0))
    average_most: float = setting(0.3, "largest decay of the average", Number(0.0, 1.0))

    def passes(self, n_steps: int, full_float32: bool) -> Mapping[str, float]:
        share = self.inner_epochs * self.timesteps / n_steps
        others = {
            "for the old log-likelihoods": self.updates * self.inner_epochs > 1,
            "of the untuned model": self.kl_weight > 0,
            "of the average": self.average_weight > 0,
        }
        return {SAMPLE: 1.0, WITH_GRADIENT: share} | {name: share for name, needed in others.items() if needed}

    def make(self, setup: Setup) -> Algorithm:
        return awm(
            setup.policy,
            setup.optimizer,
            **self.keywords(setup),
            strata={"n": self.timesteps, "fraction": self.timestep_fraction},
            advantage_clip=self.advantage_clip,
            global_std=self.global_std,
            decay={"start": 0, "rate": self.average_rate, "most": self.average_most},
            power=self.power,
            clip=self.clip,
            kl_weight=self.kl_weight,
            average_weight=self.average_weight,
        )
