"""Reward fine-tuning algorithms, one file each.

An algorithm sees a model and a reward only as the functions of `Policy`, and prompts only as a `Batch`. It does not
know of exploration: that changes the guidance in `Steps` and the embeddings in `Batch.context`, nothing else.

To add one: write `name.py` with a function that returns an `Algorithm`, and name it in `make_algorithm` of
`diffexp_jax/programs.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from diffexp_jax.diffusion import Steps
from diffexp_jax.sampling import Context, Denoise
from diffexp_jax.state import TrainState

AXIS = "data"  # the name of the device axis that the functions below run under


class Policy(NamedTuple):
    """The model and the reward, as pure functions; `frozen` holds every array that is not trained."""

    denoise: Callable[[Any, Any], Denoise]  # (frozen, lora) -> guided denoiser
    decode: Callable[[Any, Float[Array, "B h w c"]], Float[Array, "B H W 3"]]
    # (frozen, images, tokens) -> rewards and their parts; None: a host adds them to the samples
    score: Callable[..., tuple[Float[Array, "B"], dict[str, Float[Array, "B"]]]] | None
    latent_shape: tuple[int, int, int]
    prediction_type: str


class Batch(NamedTuple):
    """One device's share of an iteration's samples; every leaf has the leading axis B."""

    prompt_id: Int[Array, "B"]
    context: Context
    tokens: Any  # the reward's tokens of the (unweighted) prompts
    key: jax.Array  # a PRNG key per sample, from its global index


class Samples(NamedTuple):
    """What a sampling program hands to the update; leading axes [chunks, ...]."""

    trajectory: Any
    rewards: Float[Array, "B"] | None  # None: not known yet, see `Policy.score`
    parts: dict[str, Float[Array, "B"]]
    images: Float[Array, "B H W 3"]


class Algorithm(NamedTuple):
    """Pure per-device functions, run under an axis named "data" (`parallel.pmap`).

    sample(state, frozen, batch, steps) -> Samples, or None where the algorithm samples inside its update;
    update(state, frozen, batch, steps, key, samples) -> (state, metrics, images), the same state and metrics on
    every device.
    """

    init: Callable[[Any], TrainState]
    sample: Callable[..., Samples] | None
    update: Callable[..., tuple[TrainState, dict[str, Array], Float[Array, "B H W 3"]]]


def chunked(tree: Any, n_chunks: int) -> Any:
    """[B, ...] -> [n_chunks, B / n_chunks, ...], in order."""
    # no -1 in the shape: a reward that reads no prompts has tokens of width 0
    return jax.tree.map(lambda x: x.reshape(n_chunks, len(x) // n_chunks, *x.shape[1:]), tree)


def unchunked(tree: Any) -> Any:
    """[chunks, m, ...] -> [chunks * m, ...]."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)


def zeros_like_output(function: Callable, *args) -> Any:
    """A tree of zeros shaped like the function's output: the start of a sum of such outputs."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *args))


def mean_over(function: Callable[[Any], tuple[Any, Any]], xs: Any) -> tuple[Any, Any]:
    """(mean of the first, stack of the second) result of function(x) over the leading axis of xs.

    A scan that holds one x's work at a time.
    """
    length = len(jax.tree.leaves(xs)[0])

    def add(total, x):
        to_add, to_keep = function(x)
        return jax.tree.map(jnp.add, total, to_add), to_keep

    start, _ = zeros_like_output(function, jax.tree.map(lambda x: x[0], xs))
    total, kept = jax.lax.scan(add, start, xs)
    return jax.tree.map(lambda x: x / length, total), kept


def across_devices(x: Num[Array, "B"]) -> Num[Array, "N"]:
    """A per-sample array of all devices, in the order of the global sample index (device d holds d, d + n, ...)."""
    return jax.lax.all_gather(x, AXIS, axis=1).reshape(-1)


def reward_metrics(rewards: Float[Array, "B"], parts: dict[str, Float[Array, "B"]]) -> dict[str, Array]:
    """Mean and std of the reward over all devices, and the mean of each of its parts."""
    everything = across_devices(rewards)
    metrics = {"reward/mean": everything.mean(), "reward/std": everything.std()}
    return metrics | {f"reward/{name}": jax.lax.pmean(part.mean(), AXIS) for name, part in parts.items()}


__all__ = ["AXIS", "Algorithm", "Batch", "Policy", "Samples", "Steps"]
