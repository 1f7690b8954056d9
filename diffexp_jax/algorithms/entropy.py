"""Entropy-regularised control of the sampling chain (Uehara et al. 2024a, arXiv 2402.15194, "ELEGANT").

It maximises

    E[r(x_0)] - alpha KL(p_theta(path) || p_0(path)),   KL = sum_t E |mu_theta - mu_0|^2 / (2 sigma_t^2)

by the reward's gradient through a chain with noise, where p_0 is the untuned model. At the optimum x_0 has the density
p_0(x_0) exp(r / alpha), up to a factor: images are drawn towards the reward without collapsing onto its largest.

The paper also learns the distribution of x_T. Where the chain forgets where it began, as with eta = 1, the value of
every x_T is the same, and the standard normal is the right one (Domingo-Enrich et al. 2025, Adjoint Matching). For
smaller eta `start` learns its mean m, with - alpha |m|^2 / 2 in the objective: KL(N(m, 1) || N(0, 1)). Deviation: the
paper learns a second diffusion for x_T, of any shape and for each prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from diffexp_jax.algorithms.algorithm import Algorithm, Needs, Setup
from diffexp_jax.algorithms.alignprop import TRUNCATIONS, Truncating, alignprop
from diffexp_jax.algorithms.reward_gradient import chain_passes
from diffexp_jax.limits import positive, setting
from diffexp_jax.sampling import START


@dataclass(frozen=True, kw_only=True)
class Entropy(Truncating):
    """Entropy-regularised control: the reward's gradient less the KL of the paths (Uehara et al. 2024a)."""

    name: ClassVar[str] = "entropy"
    needs: ClassVar[Needs] = Needs(reward_gradient=True, step_noise=True)
    alpha: float = setting(
        1.0,
        "weight of the KL between the tuned and the untuned model's paths, in the reward's units",
        positive(),
        about="""
        The KL is a sum over the steps, a mean over a latent's numbers. 1 is what SEIKO's code has (0.01 of each). The
        larger it is, the more the images stay as diverse as the untuned model's, and the less is gained.
        """,
    )
    truncation: str = setting(
        "per_step",
        'how many last steps carry gradient: "uniform", "per_step", "fixed"; "none": all',
        TRUNCATIONS,
    )

    start: bool = setting(
        False,
        "whether the mean of x_T is learnt too, one for all prompts",
        about="""
        For sampling.eta below 1: with 1 a chain forgets where it began. The mean is kept beside the LoRA, and all
        sampling here begins around it. A LoRA file has no place for it: it is a second file, FILE.x_T.npy.
        """,
    )

    @property
    def noise_is_for(self) -> str:
        return "the KL of its paths"

    def passes(self, n_steps: int, full_float32: bool) -> Mapping[str, float]:
        return chain_passes(self.live_share(n_steps)) | {"of the untuned model": 1.0}

    def make(self, setup: Setup) -> Algorithm:
        given = self.keywords(setup) | {"kl_weight": self.alpha, "loss_coefficient": 1.0, "reward_target": None}
        algorithm = alignprop(setup.policy, setup.optimizer, **given)
        if not self.start:
            return algorithm
        mean = jnp.zeros(setup.policy.latent_shape)
        return algorithm._replace(init=lambda lora: algorithm.init({**lora, START: mean}))
