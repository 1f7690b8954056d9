"""Entropy-regularised control of the sampling chain (Uehara et al. 2024a, arXiv 2402.15194, "ELEGANT").

It maximises

    E[r(x_0)] - alpha KL(p_theta(path) || p_0(path)),   KL = sum_t E |mu_theta - mu_0|^2 / (2 sigma_t^2)

by the reward's gradient through a chain with noise, where p_0 is the untuned model. At the optimum x_0 has the density
p_0(x_0) exp(r / alpha), up to a factor: images are drawn towards the reward without collapsing onto its largest.

Deviation: the paper also learns the distribution of x_T. Where the chain forgets where it began, as with eta = 1, the
value of every x_T is the same, and the standard normal is the right one (Domingo-Enrich et al. 2025, Adjoint Matching).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffexp_jax.algorithms.algorithm import Algorithm, Needs, Setup
from diffexp_jax.algorithms.alignprop import TRUNCATIONS, Truncating, alignprop
from diffexp_jax.limits import positive, setting


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

    @property
    def noise_is_for(self) -> str:
        return "the KL of its paths"

    def passes(self, n_steps: int, full_float32: bool) -> Mapping[str, float]:
        return super().passes(n_steps, full_float32) | {"of the untuned model": 1.0}

    def make(self, setup: Setup) -> Algorithm:
        given = self.keywords(setup) | {"kl_weight": self.alpha, "loss_coefficient": 1.0, "reward_target": None}
        return alignprop(setup.policy, setup.optimizer, **given)
