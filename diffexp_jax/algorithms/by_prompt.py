"""How good an image is among the images of its prompt: advantages and weights, of an iteration's samples alone.

Each function gets one device's samples, and those of all devices (`algorithm.across_devices`), which they are compared
with. A prompt's images are all that the iteration has drawn of it, of one group or several.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

EPSILON = 1e-4  # added to a standard deviation, as in Flow-GRPO, DiffusionNFT and AWM


def of_one_prompt(prompt_id: Int[Array, "B"], all_ids: Int[Array, "N"]) -> Bool[Array, "B N"]:
    """Which images are compared: a row for each of the device's samples, a column for each of all."""
    return prompt_id[:, None] == all_ids


def mean_and_std(same: Bool[Array, "B N"], rewards: Float[Array, "N"]) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Of the rewards of each sample's prompt; the population's."""
    count = same.sum(1)
    mean = jnp.where(same, rewards, 0.0).sum(1) / count
    var = jnp.where(same, jnp.square(rewards - mean[:, None]), 0.0).sum(1) / count
    return mean, jnp.sqrt(var)


def advantages(
    own: Float[Array, "B"], same: Bool[Array, "B N"], rewards: Float[Array, "N"], *, global_std: bool
) -> Float[Array, "B"]:
    """(r - mean) / (std + 1e-4): the prompt's mean, and the std of the prompt's rewards or of all (`global_std`)."""
    mean, std = mean_and_std(same, rewards)
    return (own - mean) / ((rewards.std() if global_std else std) + EPSILON)


def above_the_others(own: Float[Array, "B"], same: Bool[Array, "B N"], rewards: Float[Array, "N"]) -> Float[Array, "B"]:
    """r less the mean of the prompt's other rewards, of which there is at least one: leave-one-out."""
    others = same.sum(1) - 1
    return own - (jnp.where(same, rewards, 0.0).sum(1) - own) / others


def exponential_weights(
    own: Float[Array, "B"], same: Bool[Array, "B N"], rewards: Float[Array, "N"], *, temperature: float
) -> Float[Array, "B"]:
    """exp(r / temperature) / its mean over the images that it is compared with, so that weights are 1 on average.

    Reward-weighted regression (Black et al. 2024, section 4.2): w = exp(beta r) / Z, beta = 1 / temperature.
    """
    largest = jnp.where(same, rewards, -jnp.inf).max(1)  # so that nothing overflows
    z = jnp.where(same, jnp.exp((rewards - largest[:, None]) / temperature), 0.0).sum(1) / same.sum(1)
    return jnp.exp((own - largest) / temperature) / z


def best_alone(
    own: Float[Array, "B"], same: Bool[Array, "B N"], rewards: Float[Array, "N"], *, quantile: float
) -> Float[Array, "B"]:
    """1[r >= that quantile] over the share of the images that reach it, so that weights are 1 on average.

    The sparse form of reward-weighted regression (Black et al. 2024, section 4.2). A prompt's best image always counts,
    and of equal ones each does.
    """
    # r >= numpy's quantile, which lies between two rewards, where r is at least the upper one of these
    upper = jnp.ceil(quantile * (same.sum(1) - 1) - 1e-4).astype(jnp.int32)
    in_order = jnp.sort(jnp.where(same, rewards, jnp.inf), axis=1)
    threshold = jnp.take_along_axis(in_order, upper[:, None], axis=1)  # [B, 1]
    share = (same & (rewards >= threshold)).sum(1) / same.sum(1)
    return (own >= threshold[:, 0]) / share
