"""Devices and randomness: how one pure per-device function becomes a data-parallel program.

Global sample g lives on device g mod n. So the j-th n-th of every device's share is the same set of samples on any
number of devices, and minibatches, noise and statistics do not depend on how many there are.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, PRNGKeyArray

from diffexp_jax import InputError

AXIS = "data"


class Split(NamedTuple):
    """How the samples of an iteration are shared out."""

    samples: int  # over all devices
    devices: int
    updates: int  # optimizer updates an iteration, each on its own share of the samples
    chunks: int  # forward passes that a device's samples are split into; a multiple of the updates
    per_forward: int  # samples of a forward pass on a device


def split_batch(samples: int, *, devices: int, per_forward: int, updates: int) -> Split:
    """The split among so many devices; a forward pass takes `per_forward` samples or all there are.

    Raises:
      InputError: the samples do not divide among devices, forward passes and updates.
    """
    if samples % devices:
        raise InputError(f"batch.samples={samples}: wants a multiple of the {devices} devices")
    if samples % (devices * updates):
        raise InputError(f"batch.samples={samples}: wants a multiple of devices x updates = {devices} x {updates}")
    share = samples // (devices * updates)  # what a device handles before the weights change
    chunk = min(share, per_forward)
    if share % chunk:
        raise InputError(
            f"batch.samples_per_forward={per_forward}: wants a divisor of the {share} samples that a device handles "
            f"per update ({samples} samples, {devices} devices, {updates} updates)"
        )
    return Split(samples, devices, updates, samples // devices // chunk, chunk)


def pmap(function: Callable, **kwargs) -> Callable:
    """`jax.pmap` over the axis "data"; every argument and result has a leading axis of local devices."""
    return jax.pmap(function, axis_name=AXIS, **kwargs)


def replicate(tree: Any) -> Any:
    """A copy of the tree on every local device, with a leading device axis."""
    return _copy(np.arange(jax.local_device_count()), tree)


_copy = pmap(lambda _, tree: tree, in_axes=(0, None))  # made once: every pmap compiles for itself
_put = pmap(lambda tree: tree)


def first(tree: Any) -> Any:
    """Device 0's copy, as numpy."""
    return jax.device_get(jax.tree.map(lambda x: x[0], tree))


def sample_index(n_samples: int) -> Int[np.ndarray, "devices samples"]:
    """The global indices of the samples of each local device."""
    n, n_local = jax.device_count(), jax.local_device_count()
    device = jax.process_index() * n_local + np.arange(n_local)
    return device[:, None] + n * np.arange(n_samples // n)


def shard(tree: Any, n_samples: int) -> Any:
    """Host arrays [n_samples, ...] of the whole batch -> this host's share [n_local, n_samples / n, ...].

    Placed on the devices: a program is compiled once more for arguments that are still on the host.
    """
    index = sample_index(n_samples)
    return _put(jax.tree.map(lambda x: x[index], tree))


def shard_local(tree: Any) -> Any:
    """The inverse of `unshard`: this host's share [n_local * b, ...] -> [n_local, b, ...] on its devices."""
    n = jax.local_device_count()
    return _put(jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), tree))


def unshard(tree: Any) -> Any:
    """[n_local, b, ...] -> [n_local * b, ...] numpy, in the order of the global sample index."""

    def whole(x):
        return np.asarray(x).swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])  # -1 fails for width 0

    return jax.tree.map(whole, jax.device_get(tree))


def stream(seed: int, name: str, iteration: int = 0) -> PRNGKeyArray:
    """The key of one kind of randomness at one iteration: nothing else has to be remembered to resume."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()) & 0x7FFFFFFF)
    return jax.random.fold_in(key, iteration)


def sample_keys(key: PRNGKeyArray, n_samples: int) -> jax.Array:
    """A key per sample of the whole batch, from its global index alone."""
    return keys_of(key, np.arange(n_samples))


def keys_of(key: PRNGKeyArray, index: Int[np.ndarray, " N"]) -> jax.Array:
    """A key for each of these numbers; equal numbers have the same."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
