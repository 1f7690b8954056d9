"""What training carries from one iteration to the next: DDPO's per-prompt reward statistics, SEIKO's queries."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class PromptStats:
    """The newest rewards of every prompt, in ring buffers (P prompts, K rewards each)."""

    rewards: Float[Array, "P K"]
    seen: Int[Array, "P"]  # rewards ever entered per prompt


@struct.dataclass
class Queries:
    """The newest images whose true reward is known, in a ring buffer (N rows, P features each)."""

    features: Float[Array, "N P"]
    rewards: Float[Array, "N"]
    seen: Int[Array, ""]  # queries so far

    @property
    def filled(self) -> Int[Array, ""]:
        """How many rows hold something."""
        return jnp.minimum(self.seen, len(self.rewards))


@struct.dataclass
class Learnt:
    """What a run carries besides the LoRA: every answer of the true reward, and what was fitted to them."""

    queries: Queries
    networks: Any


@struct.dataclass
class TrainState:
    """Everything that a checkpoint holds. Keys are derived from the seed and the iteration, so there is none here."""

    iteration: Int[Array, ""]
    lora: Any
    opt_state: Any
    extra: Any = None  # what a method carries besides

    @property
    def tuned(self) -> Any:
        """The LoRA that is evaluated and exported, see `tuned_lora`."""
        return tuned_lora({"lora": self.lora, "opt_state": self.opt_state})


@struct.dataclass
class Averaged:
    """The state of an optimizer that keeps the weights' moving average (`optimizer.averaged`)."""

    inner: Any  # the optimizer's own
    average: Any  # of the weights
    n: Int[Array, ""]  # updates so far


def tuned_lora(state: Mapping[str, Any]) -> Any:
    """The moving average of the LoRA where a state has one, else the LoRA; also of a state read without its types."""
    opt_state = state.get("opt_state")
    if isinstance(opt_state, Averaged):
        return opt_state.average
    return opt_state["average"] if isinstance(opt_state, Mapping) and "average" in opt_state else state["lora"]


def init_stats(n_prompts: int, buffer_size: int) -> PromptStats:
    return PromptStats(jnp.zeros((n_prompts, buffer_size)), jnp.zeros(n_prompts, jnp.int32))


def update_stats(stats: PromptStats, prompt_ids: Int[Array, "B"], rewards: Float[Array, "B"]) -> PromptStats:
    """Enters a batch, in order; a full buffer forgets its oldest reward."""

    def enter(stats, row):
        prompt, reward = row
        slot = stats.seen[prompt] % stats.rewards.shape[1]
        return PromptStats(stats.rewards.at[prompt, slot].set(reward), stats.seen.at[prompt].add(1)), None

    return jax.lax.scan(enter, stats, (prompt_ids, rewards))[0]


def advantages(
    stats: PromptStats,
    prompt_ids: Int[Array, "B"],
    rewards: Float[Array, "B"],
    *,
    batch_rewards: Float[Array, "N"] | None = None,
    min_count: int,
    clip: float,
    epsilon: float = 1e-6,
) -> Float[Array, "B"]:
    """(r - mean) / std, clipped to +-clip (DDPO, Black et al. 2024, section 5).

    Mean and std are those of the prompt's buffer where it holds at least `min_count` rewards, else of the whole batch.
    `stats` already contains this batch; std is the population's. `batch_rewards` is the whole batch where `rewards`
    is one device's share of it.
    """
    batch_rewards = rewards if batch_rewards is None else batch_rewards
    buffers, seen = stats.rewards[prompt_ids], stats.seen[prompt_ids]  # [B, K], [B]
    count = jnp.minimum(seen, buffers.shape[1])
    filled = jnp.arange(buffers.shape[1]) < count[:, None]
    mean = jnp.where(filled, buffers, 0.0).sum(1) / jnp.maximum(count, 1)
    var = jnp.where(filled, jnp.square(buffers - mean[:, None]), 0.0).sum(1) / jnp.maximum(count, 1)
    enough = count >= min_count
    mean = jnp.where(enough, mean, batch_rewards.mean())
    std = jnp.where(enough, jnp.sqrt(var), batch_rewards.std())
    return jnp.clip((rewards - mean) / (std + epsilon), -clip, clip)
