"""RWR: reward-weighted likelihood, online (Lee et al. 2023, arXiv 2302.12192; RWR in Black et al. 2024).

A round samples, weighs each image by how good it is among those of its prompt, and goes over them several times with
the loss of pretraining. The weights are not the gradient of anything: the model is drawn to its own better images.

Deviation: t is uniform in 1..n_train - 1 in place of 0..n_train - 1, as a flow model has no t = 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from diffexp_jax.algorithms import by_prompt, denoising
from diffexp_jax.algorithms.algorithm import SAMPLE, WITH_GRADIENT, Algorithm, Inputs, Policy, Setup, first_state
from diffexp_jax.algorithms.denoising import Chunk, Fixed, Rule
from diffexp_jax.algorithms.denoising_settings import DenoisingMethod
from diffexp_jax.algorithms.state import TrainState
from diffexp_jax.limits import Number, positive, setting, whole
from diffexp_jax.parallel import AXIS

WEIGHTINGS = ("exponential", "quantile")


def weights(
    own: Float[Array, "B"],
    same: Array,
    rewards: Float[Array, "N"],
    *,
    weighting: str,
    temperature: float,
    quantile: float,
    per_prompt: bool,
    standardised: bool,
) -> Float[Array, "B"]:
    """Factors of the images' losses, 1 on average; arguments as in `by_prompt`, settings as in `RWR`."""
    if standardised:
        own, rewards = (x / (rewards.std() + by_prompt.EPSILON) for x in (own, rewards))
    same = same if per_prompt else jnp.ones_like(same)
    if weighting == "quantile":
        return by_prompt.best_alone(own, same, rewards, quantile=quantile)
    return by_prompt.exponential_weights(own, same, rewards, temperature=temperature)


def effective_share(weight: Float[Array, "B"]) -> Float[Array, ""]:
    """(mean w)^2 / mean w^2 over all devices: 1 where all images weigh the same, 1 / N where one alone counts."""
    mean, square = jax.lax.pmean((weight.mean(), jnp.square(weight).mean()), AXIS)
    return jnp.square(mean) / square


def denoising_loss(
    out: Float[Array, "B h w c"], target: Float[Array, "B h w c"], weight: Float[Array, "B"]
) -> Float[Array, ""]:
    """mean of w |target - out|^2: -w log p in Lee et al. 2023, but for a factor that depends on t."""
    return (weight * denoising.mean_square(target - out)).mean()


def rwr(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    n_chunks: int,
    n_updates: int,
    inner_epochs: int,
    group: int,
    guided: bool,
    prior_weight: float,
    **weighing,
) -> Algorithm:
    """Makes the algorithm; `weighing` are `weights`' settings, the others are those of `RWR`."""
    network, keeps_untuned = policy.network.at_any(guided=guided), prior_weight > 0

    def init(lora) -> TrainState:
        return first_state(optimizer, lora)

    def loss(lora, fixed: Fixed, chunk: Chunk, i):
        def of_images(x_0, weight, number):
            keys = denoising.folded(chunk.key, number)
            t = denoising.uniform_timesteps(denoising.folded(keys, 0), policy.process)
            x_t, target, row = denoising.noised(policy.process, x_0, t, denoising.folded(keys, 1))
            row = denoising.guided_as(fixed.steps, row) if guided else row
            return denoising_loss(network(fixed.frozen, lora, x_t, row, chunk.context), target, weight)

        total = of_images(chunk.latents.x_0, chunk.weight, 0)
        if keeps_untuned:
            total += prior_weight * of_images(chunk.latents.untuned, jnp.ones_like(chunk.weight), 1)
        return total, {}

    rule, split = Rule(optimizer, loss), dict(n_chunks=n_chunks, n_updates=n_updates, inner_epochs=inner_epochs)

    def sample(state, frozen, batch, steps):
        options = dict(n_chunks=n_chunks, untuned=keeps_untuned)
        return denoising.sample(policy, state.lora, frozen, batch, steps, **options)

    def update(state, frozen, inputs: Inputs):
        weight = denoising.compared(inputs, group, partial(weights, **weighing))
        state, metrics = denoising.updated(rule, state, frozen, inputs, weight, **split)
        return state, metrics | {"weight/effective": effective_share(weight)}

    return Algorithm(init, sample, update)


@dataclass(frozen=True, kw_only=True)
class RWR(DenoisingMethod):
    """RWR: reward-weighted likelihood of the model's own images (Lee et al. 2023; Black et al. 2024)."""

    name: ClassVar[str] = "rwr"
    inner_epochs: int = setting(
        5, "passes over an iteration's images, each at other timesteps and noise", whole(1, 4096)
    )
    weighting: str = setting(
        "exponential",
        'weight of an image by its reward: "exponential" or "quantile"',
        WEIGHTINGS,
        about="""
        "exponential": exp(r / temperature) over its mean. "quantile": 1 for images at that quantile or above, else 0
        (the paper's sparse form), over its mean.
        """,
    )
    temperature: float = setting(
        5.0,
        "temperature of the exponential, in the reward's units",
        positive(),
        about="""
        Published: an inverse temperature of 0.2, on LAION's aesthetic score and on kilobytes of JPEG. Other rewards
        have other units; with `standardised` it is in standard deviations, and 1 is a good start.
        """,
    )
    standardised: bool = setting(False, "whether rewards are first divided by their iteration's standard deviation")
    quantile: float = setting(0.9, 'quantile from which an image counts, for "quantile"', Number(0.0, 1.0, below=True))
    per_prompt: bool = setting(
        True, "whether an image is weighed among those of its prompt (else among all of the iteration)"
    )
    guided: bool = setting(
        True,
        "whether the loss is of the guided output, with a gradient through both halves, as published",
        about="""
        False: of the output for the prompt alone, for half of the work; then guidance in sampling no longer fits what
        was trained (Black et al. 2024, appendix E).
        """,
    )
    prior_weight: float = setting(
        0.0,
        "factor of the same loss on images of the untuned model (Lee et al. 2023's beta); 0: none are made",
        Number(0.0, 1e6),
        about="Lee et al. take pretraining images. Those of the untuned model take their place, for twice the work.",
    )

    @property
    def compares_groups(self) -> bool:
        return self.per_prompt

    def passes(self, n_steps: int, full_float32: bool) -> Mapping[str, float]:
        """Each pass over the images learns from one timestep of each."""
        kinds = 2 if self.prior_weight else 1  # of images
        untuned = {"to sample by the untuned model": 1.0} if self.prior_weight else {}
        return {SAMPLE: 1.0, WITH_GRADIENT: kinds * self.inner_epochs / n_steps} | untuned

    def make(self, setup: Setup) -> Algorithm:
        return rwr(
            setup.policy,
            setup.optimizer,
            **self.keywords(setup),
            prior_weight=self.prior_weight,
            weighting=self.weighting,
            temperature=self.temperature,
            quantile=self.quantile,
            per_prompt=self.per_prompt,
            standardised=self.standardised,
        )
