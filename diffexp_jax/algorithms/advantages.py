"""What a policy gradient weighs samples by: their rewards, less what is expected of their prompt."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffexp_jax.algorithms import by_prompt, extremes
from diffexp_jax.algorithms.algorithm import Samples, across_devices
from diffexp_jax.algorithms.state import PromptStats, advantages

KINDS = ("prompt", "group", "group_mean", "loo")


def compared(
    stats: PromptStats,
    own: tuple[Int[Array, "B"], Float[Array, "B"]],
    all_samples: tuple[Int[Array, "N"], Float[Array, "N"]],
    *,
    kind: str,
    clip: float,
    min_count: int,
) -> Float[Array, "B"]:
    """The advantages of a device's samples; `kind` is one of KINDS.

    "prompt": `state.advantages`. Else of the iteration alone: "group" is (r - mean) / (std + 1e-4) of the prompt's
    rewards (GRPO, Shao et al. 2024), "group_mean" the same with the std of all rewards (Flow-GRPO, Liu et al. 2025),
    both at most `clip`; "loo" is r less the mean of the prompt's other rewards (leave-one-out, Kool et al. 2019).

    Args:
      own, all_samples: prompt ids and rewards of the device's samples, and of those of all devices.
    """
    (prompt_id, rewards), (all_ids, everything) = own, all_samples
    if kind == "prompt":
        return advantages(stats, prompt_id, rewards, batch_rewards=everything, min_count=min_count, clip=clip)
    same = by_prompt.of_one_prompt(prompt_id, all_ids)
    if kind == "loo":
        return by_prompt.above_the_others(rewards, same, everything)
    adv = by_prompt.advantages(rewards, same, everything, global_std=kind == "group_mean")
    return jnp.clip(adv, -clip, clip)


def with_advantages(
    stats: PromptStats,
    prompt_id: Int[Array, "B"],
    samples: Samples,
    all_samples: tuple[Int[Array, "N"], Float[Array, "N"]],
    n_updates: int,
    *,
    group: int,
    keep: int | None,
    **kinds: Any,
) -> tuple[Samples, Float[Array, " kept"]]:
    """The samples that are learnt from, and their advantages (`compared`).

    Args:
      keep: how many of each group these are (`extremes.py`); None: all. As published, they are compared with each other
        alone; but for "prompt", whose statistics are of all that was scored.
    """
    own = prompt_id, samples.rewards
    if keep:
        samples, rows = extremes.samples_kept(samples, group=group, k=keep, n_updates=n_updates)
        own = prompt_id[rows], samples.rewards[rows]
        if kinds["kind"] != "prompt":
            all_samples = tuple(across_devices(x, keep) for x in own)
    return samples, compared(stats, own, all_samples, **kinds)
