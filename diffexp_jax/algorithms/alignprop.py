"""AlignProp: the reward's gradient through the sampling chain (Prabhudesai et al. 2023; DRaFT: Clark et al. 2024)."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PRNGKeyArray

from diffexp_jax.algorithms.algorithm import Algorithm, Method, Needs, Policy, Setup, rewarded
from diffexp_jax.algorithms.reward_gradient import RewardGradient, reward_gradient, sampled, short_of
from diffexp_jax.errors import InputError
from diffexp_jax.limits import Number, check_number, positive, setting, whole

TRUNCATIONS = ("uniform", "per_step", "fixed", "none")
TARGETS = ("auto", "none")


def live_steps(key: PRNGKeyArray, n_steps: int, *, truncation: str, k: int) -> Bool[Array, "T"]:
    """Which steps' network outputs carry gradient.

    "uniform": the last K, K uniform in 1..T, one draw for the iteration. "fixed": the last k. "per_step": the cut
    is drawn anew at every step, uniform in 0..T, as in the published code: step i is live with probability
    (i + 1) / (T + 1). "none": all.
    """
    i = jnp.arange(n_steps)
    if truncation == "none":
        return i >= 0
    if truncation == "per_step":
        return i >= jax.random.randint(key, (n_steps,), 0, n_steps + 1)
    if truncation == "uniform":
        return i >= n_steps - jax.random.randint(key, (), 1, n_steps + 1)
    return i >= n_steps - k


def alignprop(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    n_chunks: int,
    loss_coefficient: float,
    reward_target: float | None,
    truncation: str,
    truncation_k: int,
    input_gradient: bool = True,
    kl_weight: float = 0.0,
    remat: bool = True,
) -> Algorithm:
    """Makes the algorithm.

    Args:
      n_chunks: forward passes that a device's samples are split into; their gradients are averaged.
      loss_coefficient: the loss is this times mean |reward_target - r|, or times mean(-r) without a target.
      truncation: "uniform", "per_step", "none" or "fixed" (the last `truncation_k` steps), see `live_steps`.
      input_gradient, kl_weight, remat: see `reward_gradient.sampled`.
    """
    chain = partial(sampled, policy, remat=remat, input_gradient=input_gradient, kl_weight=kl_weight)

    def loss(lora, frozen, chunk, steps, live):
        x_0, penalty, metrics = chain(lora, frozen, chunk, steps, live)
        rewards, parts, _ = rewarded(policy, frozen, x_0, chunk.tokens)
        return loss_coefficient * short_of(reward_target, rewards).mean() + penalty, (rewards, parts, metrics)

    live = partial(live_steps, truncation=truncation, k=truncation_k)
    return reward_gradient(optimizer, loss, live, n_chunks=n_chunks)


def resolved_target(setting: str, published: float | None, *, key: str) -> float | None:
    """The number that the setting stands for, None for none; `published` is the reward's, `key` the setting's name.

    Raises:
      InputError: it is none of the words, and no finite number.
    """
    if setting in TARGETS:
        return published if setting == "auto" else None
    try:
        target = float(setting)
    except ValueError:
        accepted = ", ".join(TARGETS)
        raise InputError(f"{key}={setting!r}: accepted: {accepted}, or a number") from None
    check_number(f"{key}=", target, Number(-1e6, 1e6))
    return target


@dataclass(frozen=True, kw_only=True)
class Truncating(Method):
    """A method whose gradient goes through a part of the sampling chain, as AlignProp's does."""

    needs: ClassVar[Needs] = Needs(reward_gradient=True)
    truncation: str = setting(
        "uniform",
        'how many last steps carry gradient: "uniform", "per_step", "fixed"; "none": all',
        TRUNCATIONS,
    )
    truncation_k: int = setting(1, 'number of last steps for "fixed"', whole(1, 1000))
    input_gradient: bool = setting(
        True,
        "whether the gradient goes through the later steps' networks, as published",
        about="""
        False: a step's gradient goes through the linear part of the later steps alone, as in DRTune (Wu et al. 2024).
        Through ten or more networks a few samples' gradients blow up (docs/understand/methods/alignprop.md).
        """,
    )

    def check(self, n_steps: int) -> None:
        check_number(f"{self.name}.truncation_k=", self.truncation_k, whole(1, n_steps))

    def live_share(self, n_steps: int) -> float:
        """The mean of `live_steps` over its draws."""
        of = {"none": 1.0, "per_step": 0.5, "uniform": (n_steps + 1) / (2 * n_steps)}
        return of.get(self.truncation, self.truncation_k / n_steps)

    def keywords(self, setup: Setup) -> dict[str, Any]:
        """What `alignprop` takes by keyword: the settings above, and how the samples are gone through."""
        return {
            "n_chunks": setup.n_chunks,
            "remat": setup.remat,
            "truncation": self.truncation,
            "truncation_k": self.truncation_k,
            "input_gradient": self.input_gradient,
        }


@dataclass(frozen=True, kw_only=True)
class Pulling(Truncating):
    """A method that pulls rewards to a number, or up, as AlignProp does."""

    loss_coefficient: float = setting(0.01, "factor of the loss", positive())
    reward_target: str = setting(
        "auto",
        '"auto", "none" or a number',
        about="""
        What rewards are pulled to: the loss is mean |target - r| for a number, mean(-r) for "none"; "auto" is 10 for
        the aesthetic reward alone, as published, else "none".
        """,
    )

    def check(self, n_steps: int) -> None:
        super().check(n_steps)
        self.target(None)

    def target(self, published: float | None) -> float | None:
        """`resolved_target` of the setting."""
        return resolved_target(self.reward_target, published, key=f"{self.name}.reward_target")


@dataclass(frozen=True, kw_only=True)
class AlignProp(Pulling, RewardGradient):
    """AlignProp: the reward's gradient through the sampling chain (Prabhudesai et al. 2023)."""

    name: ClassVar[str] = "alignprop"

    def make(self, setup: Setup) -> Algorithm:
        return alignprop(
            setup.policy,
            setup.optimizer,
            **self.keywords(setup),
            kl_weight=self.kl_weight,
            loss_coefficient=self.loss_coefficient,
            reward_target=self.target(setup.reward_target),
        )
