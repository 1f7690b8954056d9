"""DiffusionNFT: negative-aware fine-tuning on the forward process (Zheng et al. 2025, arXiv 2509.16117).

An older policy samples. Its output and the trained one's make two further outputs, one that leans towards the trained
and one that leans away from it by as much. The first is to predict what good images were made of, the second what bad
ones were: so the trained output moves towards good images and away from bad ones. No log-probs, no chain, any sampler.

Errors are those of the x_0 that an output predicts, as published. That makes the loss the same of epsilon, v and flow
models that predict the same x_0; of an epsilon model high noise levels weigh much, and `weighting` can leave that out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from diffexp_jax.algorithms import by_prompt, denoising
from diffexp_jax.algorithms.algorithm import SAMPLE, WITH_GRADIENT, Algorithm, Inputs, Needs, Policy, Setup, first_state
from diffexp_jax.algorithms.denoising import Chunk, Fixed, Rule
from diffexp_jax.algorithms.denoising_settings import DenoisingMethod
from diffexp_jax.algorithms.state import TrainState
from diffexp_jax.limits import Number, positive, setting, whole

WEIGHTINGS = ("x_0", "output")


def probability(adv: Float[Array, "B"], clip: float) -> Float[Array, "B"]:
    """r = 1/2 + clip(A, -clip, clip) / (2 clip): how good an image is, 0 to 1; the average one is 1/2."""
    return 0.5 + jnp.clip(adv, -clip, clip) / (2.0 * clip)


def normalised_square(error: Float[Array, "B h w c"]) -> Float[Array, "B"]:
    """mean |e|^2 / stop_gradient(mean |e|), the divisor at least 1e-5: every noise level weighs alike, as published."""
    size = jax.lax.stop_gradient(jnp.abs(error).mean((1, 2, 3)))
    return denoising.mean_square(error) / jnp.maximum(size, 1e-5)


def negative_aware_loss(
    out: Float[Array, "B h w c"],
    old: Float[Array, "B h w c"],
    target: Float[Array, "B h w c"],
    r: Float[Array, "B"],
    scale: Float[Array, "B"],
    *,
    strength: float,
) -> Float[Array, "B"]:
    """1 / b (r |e+|^2 + (1 - r) |e-|^2), each divided by its own size (`normalised_square`).

    e+ and e- are `scale` times what the outputs v+ = old + b (out - old) and v- = old - b (out - old) are off the
    target by; b is `strength`.
    """
    chex.assert_equal_shape((out, old, target))
    change, scale = strength * (out - old), scale[:, None, None, None]
    positive, negative = (normalised_square(scale * (old + x - target)) for x in (change, -change))
    return (r * positive + (1.0 - r) * negative) / strength


def nft(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    n_chunks: int,
    n_updates: int,
    inner_epochs: int,
    n_timesteps: int,
    group: int,
    guided: bool,
    weighting: str,
    strength: float,
    advantage_clip: float,
    global_std: bool,
    kl_weight: float,
    decay: dict[str, float],
) -> Algorithm:
    """Makes the algorithm; `decay` has `denoising.rising`'s numbers, the others are the settings of `NFT`."""
    network = policy.network.at_any(guided=guided)

    def init(lora) -> TrainState:
        old = jax.tree.map(jnp.array, lora)
        return first_state(optimizer, lora, {"old": old})

    def loss(lora, fixed: Fixed, chunk: Chunk, i):
        t = denoising.shuffled_timesteps(denoising.folded(chunk.key, 0), fixed.steps, i)
        x_t, target, row = denoising.noised(policy.process, chunk.latents.x_0, t, denoising.folded(chunk.key, 1 + i))
        row = denoising.guided_as(fixed.steps, row) if guided else row
        scale = denoising.scales(policy.process, row).x_0 if weighting == "x_0" else jnp.ones(len(t))

        def output(lora):
            return network(fixed.frozen, lora, x_t, row, chunk.context)

        out, old = output(lora), output(fixed.extra["old"])
        r = probability(chunk.weight, advantage_clip)
        total = advantage_clip * negative_aware_loss(out, old, target, r, scale, strength=strength).mean()
        seen = {"distance/old": denoising.mean_square(out - old).mean()}
        if kl_weight:
            seen["distance/untuned"] = denoising.mean_square(out - output(None)).mean()
            total += kl_weight * seen["distance/untuned"]
        return total, seen

    rule = Rule(optimizer, loss, n_timesteps)
    split = dict(n_chunks=n_chunks, n_updates=n_updates, inner_epochs=inner_epochs)

    def sample(state, frozen, batch, steps):
        return denoising.sample(policy, state.extra["old"], frozen, batch, steps, n_chunks=n_chunks)

    def update(state, frozen, inputs: Inputs):
        adv = denoising.compared(inputs, group, partial(by_prompt.advantages, global_std=global_std))
        state, metrics = denoising.updated(rule, state, frozen, inputs, adv, **split)
        return denoising.followed(state, "old", n_updates * inner_epochs, **decay), metrics

    return Algorithm(init, sample, update)


@dataclass(frozen=True, kw_only=True)
class NFT(DenoisingMethod):
    """DiffusionNFT: towards good images and away from bad ones, on the forward process (Zheng et al. 2025)."""

    name: ClassVar[str] = "nft"
    needs: ClassVar[Needs] = Needs(groups=True)
    timestep_fraction: float = setting(
        0.99, "share of the sampler's timesteps, drawn at random, at which each image is learnt", positive(1.0)
    )
    strength: float = setting(
        1.0, "how far the two outputs lean towards the trained one and away from it: the paper's beta", positive(100.0)
    )
    advantage_clip: float = setting(5.0, "largest advantage, in standard deviations", positive())
    global_std: bool = setting(True, "whether advantages are in all images' deviation (else the prompt's own)")
    kl_weight: float = setting(
        1e-4, "factor of |output - the untuned model's|^2 in the loss; 0: none", Number(0.0, 1e6)
    )
    weighting: str = setting(
        "x_0",
        'of noise levels, by the error of: "x_0", as published, or the network\'s "output"',
        WEIGHTINGS,
        about="""
        An epsilon model's error of x_0 is that of its output times sqrt((1 - alpha_bar) / alpha_bar), which is 13 at
        Stable Diffusion's first step of 50 and 0.04 at its last. A flow model's is the noise level, at most 1.
        """,
    )
    old_start: int = setting(0, "optimizer updates up to which the sampling policy is the newest one", whole(0))
    old_rate: float = setting(1e-3, "what each later update adds to the decay of the average", Number(0.0, 1.0))
    old_most: float = setting(
        0.5,
        "largest decay of the average",
        Number(0.0, 1.0),
        about="""
        Published for most rewards: 0, 1e-3, 0.5. For text in images: 75, 7.5e-3, 0.999.
        """,
    )

    def n_timesteps(self, n_steps: int) -> int:
        """At how many of the sampler's timesteps each image is learnt."""
        return denoising.first_steps(n_steps, self.timestep_fraction)

    def passes(self, n_steps: int, full_float32: bool) -> Mapping[str, float]:
        share = self.inner_epochs * self.n_timesteps(n_steps) / n_steps
        untuned = {"of the untuned model": share} if self.kl_weight else {}
        return {SAMPLE: 1.0, WITH_GRADIENT: share, "of the policy that sampled": share} | untuned

    def make(self, setup: Setup) -> Algorithm:
        return nft(
            setup.policy,
            setup.optimizer,
            **self.keywords(setup),
            n_timesteps=self.n_timesteps(setup.n_steps),
            weighting=self.weighting,
            strength=self.strength,
            advantage_clip=self.advantage_clip,
            global_std=self.global_std,
            kl_weight=self.kl_weight,
            decay={"start": self.old_start, "rate": self.old_rate, "most": self.old_most},
        )
