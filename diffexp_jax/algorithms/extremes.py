"""Learning from the extremes of a large group: K of a prompt's G samples (PODS, Xu et al. 2025, arXiv 2504.13818).

All G are sampled and scored, which needs no gradient; the update sees the K whose rewards have the largest variance.
Those are always some of the lowest and some of the highest, so that K + 1 choices are all there are to compare.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffexp_jax.algorithms.algorithm import Samples, chunked
from diffexp_jax.sampling import Trajectory


def number_kept(group: int, share: float) -> int:
    """K: this share of a group's samples, at least two."""
    return min(group, max(2, round(share * group)))


def most_varied(rewards: Float[Array, "P G"], k: int) -> Int[Array, "P k"]:
    """The samples of each group, in order, whose k rewards have the largest variance."""
    lowest, last = np.arange(k + 1)[:, None], np.arange(k)  # so many of the lowest: a choice in each row
    places = np.where(last < lowest, last, rewards.shape[1] - k + last)  # among the group's rewards in order
    in_order = jnp.argsort(rewards, axis=1)
    best = jnp.take_along_axis(rewards, in_order, axis=1)[:, places].var(2).argmax(1)  # [P]
    return jnp.sort(jnp.take_along_axis(in_order, jnp.asarray(places)[best], axis=1), axis=1)


def rows_kept(rewards: Float[Array, "B"], group: int, k: int) -> Int[Array, " kept"]:
    """Which of a device's samples are learnt from; groups follow each other."""
    of_group = rewards.reshape(-1, group)
    return (most_varied(of_group, k) + group * jnp.arange(len(of_group))[:, None]).reshape(-1)


def chunks_of(n: int, n_updates: int, most: int) -> int:
    """How many forward passes go over n samples: as few as take at most so many, and are alike in every update."""
    of_update = n // n_updates
    return n // max(size for size in range(1, min(most, of_update) + 1) if of_update % size == 0)


def samples_kept(samples: Samples, *, group: int, k: int, n_updates: int) -> tuple[Samples, Int[Array, " kept"]]:
    """The samples with the chains of those that are learnt from, and which these are; each update has as many."""
    rows, trajectory = rows_kept(samples.rewards, group, k), samples.trajectory
    n_chunks = chunks_of(len(rows), n_updates, trajectory.x_T.shape[1])
    return samples._replace(trajectory=trajectory_kept(trajectory, rows, n_chunks)), rows


def trajectory_kept(trajectory: Trajectory, rows: Int[Array, " kept"], n_chunks: int) -> Trajectory:
    """The chains of these samples, in so many chunks; all have the same steps."""
    m = trajectory.x_T.shape[1]
    chunk, place = rows // m, rows % m

    def of_steps(x):  # [chunks, T, m, ...]
        return chunked(x[chunk, :, place], n_chunks).swapaxes(1, 2)

    def of_samples(tree: Any) -> Any:  # [chunks, m, ...]
        return jax.tree.map(lambda x: chunked(x[chunk, place], n_chunks), tree)

    return Trajectory(
        of_samples(trajectory.x_T),
        of_steps(trajectory.x_tm1),
        of_steps(trajectory.log_prob),
        jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (n_chunks, *x.shape[1:])), trajectory.steps),
        of_samples(trajectory.context),
    )
