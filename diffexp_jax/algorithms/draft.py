"""DRaFT-K and DRaFT-LV: the reward's gradient through the last sampling steps (Clark et al. 2024)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from diffexp_jax.algorithms.algorithm import SAMPLE_WITH_GRADIENT, Algorithm, Policy, Setup, rewarded
from diffexp_jax.algorithms.reward_gradient import RewardGradient, reward_gradient, sampled
from diffexp_jax.errors import InputError
from diffexp_jax.limits import check_number, setting, whole
from diffexp_jax.sampling import Denoise, Steps, step_noise


def last_step_again(
    policy: Policy, denoise: Denoise, x_0: Float[Array, "B h w c"], chunk: Any, steps: Steps, draw: Array
) -> Float[Array, "B h w c"]:
    """DRaFT-LV's further x_0: the (detached) sample is noised to the last step's level, and that step taken again.

    Every term is then of the same step as the first one. The paper's x_0 = (x_1 - sigma_1 eps) / alpha_1 is that step
    where the chain ends without noise, as its sampler's does. Stable Diffusion's schedule ends at alpha_bar = 0.99915:
    the paper's form would weigh the further terms' gradients 3.4 times as much as the first one's.

    `draw` numbers the noises of a sample from 0.
    """
    n_steps = len(steps.t)
    last = jax.tree.map(lambda column: column[-1], steps)
    noise = step_noise(chunk.key, n_steps + draw, x_0.shape[1:])
    x_1 = policy.process.add_noise(jax.lax.stop_gradient(x_0), noise, last)
    mean, _ = policy.process.transition(x_1, denoise(x_1, last, chunk.context), last)
    return mean


def draft(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    n_chunks: int,
    k: int,
    lv_samples: int,
    kl_weight: float = 0.0,
    remat: bool = True,
) -> Algorithm:
    """Makes the algorithm, which maximises the mean reward.

    Args:
      n_chunks: forward passes that a device's samples are split into; their gradients are averaged.
      k: last steps that carry gradient.
      lv_samples: n of DRaFT-LV, whose k is 1: further draws of the last step, whose rewards' gradients are added.
      kl_weight, remat: see `reward_gradient.sampled`.
    """

    chain = partial(sampled, policy, remat=remat, kl_weight=kl_weight)

    def live_steps(key, n_steps):
        del key  # always the last k
        return jnp.arange(n_steps) >= n_steps - k

    def loss(lora, frozen, chunk, steps, live):
        x_0, penalty, metrics = chain(lora, frozen, chunk, steps, live)
        rewards, parts, _ = rewarded(policy, frozen, x_0, chunk.tokens)

        once = partial(policy.network.guided, frozen, lora)  # without a condition, which would keep both branches' work

        def again(total, draw):
            further = last_step_again(policy, once, x_0, chunk, steps, draw)
            return total + rewarded(policy, frozen, further, chunk.tokens)[0].mean(), None

        total, _ = jax.lax.scan(jax.checkpoint(again), rewards.mean(), jnp.arange(lv_samples))
        return penalty - total, (rewards, parts, metrics)

    return reward_gradient(optimizer, loss, live_steps, n_chunks=n_chunks)


@dataclass(frozen=True, kw_only=True)
class DRaFT(RewardGradient):
    """DRaFT: the reward's gradient through the last sampling steps (Clark et al. 2024)."""

    name: ClassVar[str] = "draft"
    k: int = setting(1, "how many last steps carry gradient", whole(1, 1000))
    lv_samples: int = setting(
        0, "DRaFT-LV (with k = 1): further noises of the last step, 2 in the paper; 0: DRaFT-K", whole(0, 1024)
    )

    def check(self, n_steps: int) -> None:
        check_number("draft.k=", self.k, whole(1, n_steps))
        if self.lv_samples and self.k != 1:
            raise InputError(f"draft.k={self.k}: with draft.lv_samples wants 1: DRaFT-LV is of the last step")

    def live_share(self, n_steps: int) -> float:
        return self.k / n_steps

    def passes(self, n_steps: int, full_float32: bool) -> Mapping[str, float]:
        """DRaFT-LV takes the last step again for each further noise."""
        found = dict(super().passes(n_steps, full_float32))
        found[SAMPLE_WITH_GRADIENT] += self.lv_samples / n_steps
        return found

    def make(self, setup: Setup) -> Algorithm:
        given = {"n_chunks": setup.n_chunks, "remat": setup.remat, "kl_weight": self.kl_weight}
        return draft(setup.policy, setup.optimizer, **given, k=self.k, lv_samples=self.lv_samples)
