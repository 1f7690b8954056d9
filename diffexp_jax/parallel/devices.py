"""Devices: how one pure per-device function becomes a data-parallel program, and how arrays get there and back.

Samples that are compared, a group, follow each other in the global index and lie on one device: sample g is on device
(g // group) mod n of the axis "data", which spans the devices of all hosts. So the j-th n-th of every device's share is
the same set of samples on any number of devices, and minibatches, noise and statistics do not depend on how many there
are. Where nothing is compared a group is one sample.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from diffexp_jax import backend
from diffexp_jax.errors import InputError

AXIS = "data"


class Split(NamedTuple):
    """How the samples of an iteration are shared out."""

    samples: int  # over all devices
    devices: int
    updates: int  # optimizer updates an iteration, each on its own share of the samples
    chunks: int  # forward passes that a device's samples are split into; a multiple of the updates
    per_forward: int  # samples of a forward pass on a device


def split_batch(samples: int, *, devices: int, per_forward: int, updates: int, group: int = 1) -> Split:
    """The split among so many devices; a forward pass takes `per_forward` samples or all there are.

    A group's samples are on one device and learnt from in one update; a forward pass may take a part of them.

    Raises:
      InputError: the samples do not divide among devices, forward passes and updates.
    """
    if samples % devices:
        raise InputError(f"batch.samples={samples}: wants a multiple of the {devices} devices")
    if samples % (devices * updates):
        raise InputError(f"batch.samples={samples}: wants a multiple of devices x updates = {devices} x {updates}")
    if samples % (devices * updates * group):
        raise InputError(
            f"batch.samples={samples}: wants a multiple of devices x updates x batch.group = {devices} x {updates} x "
            f"{group}: a prompt's group is on one device, and learnt from in one update"
        )
    share = samples // (devices * updates)  # what a device handles before the weights change
    chunk = min(share, per_forward)
    if share % chunk:
        raise InputError(
            f"batch.samples={samples}, batch.samples_per_forward={per_forward}: a device handles {share} samples per "
            f"update ({devices} devices, {updates} updates), in forward passes of equal size; wants "
            f"batch.samples_per_forward to divide {share}, or batch.samples a multiple of "
            f"{devices * updates * chunk}"
        )
    return Split(samples, devices, updates, samples // devices // chunk, chunk)


def pmap(function: Callable, **kwargs) -> Callable:
    """`jax.pmap` over the axis "data"; every argument and result has a leading axis of local devices."""
    absent = backend.absent_devices()
    return jax.pmap(function, axis_name=AXIS, devices=absent and absent.devices, **kwargs)


# Arrays get to the devices without a program: a tree of new shapes would be one more to compile, and to keep.


def replicate(tree: Any) -> Any:
    """A copy of the tree on every local device, with a leading device axis."""
    return _put(lambda x: (np.array(x)[None] for _ in range(backend.local_device_count())), tree)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Part:
    """A kernel of which each device holds an even part, cut along one axis; on the host it is all of it."""

    kernel: Any
    axis: int = field(metadata={"static": True})  # negative: counted from the last

    def of(self, place: int) -> np.ndarray:
        """The part of the device at this place of the axis "data"."""
        return np.split(np.asarray(self.kernel), backend.device_count(), self.axis)[place]


def share(tree: Any) -> Any:
    """`replicate` for arrays that are read alone, of host arrays: the devices of a CPU read one copy.

    That is the host's own where an array begins at a multiple of 64 bytes (`formats.convert.aligned`), so it must not
    be written any more, nor be donated to a program. Of a `Part` each device gets its own.
    """

    def parts(part, kernel):
        return (replace(part, kernel=kernel).of(place)[None] for place in _places_here())

    def one(x):
        if isinstance(x, Part):
            return replace(x, kernel=_put(functools.partial(parts, x), x.kernel))
        return _put(lambda x: [x[None]] * backend.local_device_count(), x)

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Part))


def shapes_on_devices(tree: Any) -> Any:
    """The shapes of a tree of arrays, or of shapes, as `share` lays it out."""
    n_local = backend.local_device_count()

    def one(x):
        if isinstance(x, Part):
            shape = list(x.kernel.shape)
            shape[x.axis] //= backend.device_count()
            return replace(x, kernel=one(jax.ShapeDtypeStruct(tuple(shape), x.kernel.dtype)))
        return jax.ShapeDtypeStruct((n_local, *x.shape), x.dtype)

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Part))


def _put(rows: Callable[[np.ndarray], Iterable[np.ndarray]], tree: Any) -> Any:
    """Arrays [n_local, ...] on this host's devices, or their shapes where the devices are not there.

    `rows` gives of a leaf, as numpy, each device's [1, ...].
    """
    if backend.absent_devices():
        return jax.tree.map(functools.partial(_shape_of, rows), tree)
    devices, sharding, n = _layout()

    def one(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        pieces = [jax.device_put(row, device) for row, device in zip(rows(np.asarray(x)), devices, strict=True)]
        return jax.make_array_from_single_device_arrays((n, *pieces[0].shape[1:]), sharding, pieces)

    return jax.tree.map(one, tree)


def _shape_of(rows: Callable[[np.ndarray], Iterable[np.ndarray]], x: Any) -> jax.ShapeDtypeStruct:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.ShapeDtypeStruct(_shape_of(rows, jax.random.key_data(x)).shape[:-1], x.dtype)
    x = np.asarray(x)
    return jax.ShapeDtypeStruct((backend.local_device_count(), *next(iter(rows(x))).shape[1:]), x.dtype)


@functools.cache
def _layout() -> tuple[list[jax.Device], jax.sharding.Sharding, int]:
    """The layout of a mapped program's rows: the devices of this host's rows, and the number of all rows."""
    rows = pmap(lambda row: row)(np.arange(backend.local_device_count()))
    devices = {int(np.asarray(shard.data)[0]): shard.device for shard in rows.addressable_shards}
    return [device for _, device in sorted(devices.items())], rows.sharding, len(rows)


def first(tree: Any) -> Any:
    """The copy of this host's first device, as numpy."""

    def one(x):
        shard = min(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return shard.data  # x[0] would be a program of all devices, with a collective

    # a copy: what a CPU gives is the device's own memory, which could then not be donated
    return jax.tree.map(lambda x: np.array(x[0]), jax.device_get(jax.tree.map(one, tree)))


def sample_index(n_samples: int, *, group: int = 1) -> Int[np.ndarray, "devices samples"]:
    """The global indices of the samples of each of this host's devices, in the order that they have there."""
    n = backend.device_count()
    of_group, within = np.divmod(np.arange(n_samples // n), group)
    return (_places_here()[:, None] + n * of_group) * group + within


def _places_here() -> Int[np.ndarray, " devices"]:
    """As `_places`, without a program where there is one host."""
    return np.arange(backend.device_count()) if jax.process_count() == 1 else _places()


@functools.cache
def _places() -> Int[np.ndarray, " devices"]:
    """The places of this host's devices on the axis "data": on a TPU pod they need not follow each other."""
    return np.asarray(pmap(lambda _: jax.lax.axis_index(AXIS))(np.arange(backend.local_device_count())))


def shard(tree: Any, n_samples: int, *, group: int = 1) -> Any:
    """Host arrays [n_samples, ...] of the whole batch -> this host's share [n_local, n_samples / n, ...].

    Placed on the devices: a program is compiled once more for arguments that are still on the host.
    """
    index = sample_index(n_samples, group=group)
    return _put(lambda x: (x[row][None] for row in index), tree)


def unshard(tree: Any, *, group: int = 1) -> Any:
    """[n_local, b, ...] of every host -> [n * b, ...] numpy on every host, in the order of the global sample index."""
    return _in_order(first(_gather(tree)) if jax.process_count() > 1 else jax.device_get(tree), group)


_gather = pmap(lambda tree: jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS), tree))


def unshard_local(tree: Any) -> Any:
    """This host's samples alone: [n_local, b, ...] -> [n_local * b, ...] numpy, in the global order of single samples.

    Where samples are in groups that order has no meaning but `shard_local`'s.
    """
    return _in_order(jax.device_get(tree), 1)


def shard_local(tree: Any) -> Any:
    """The inverse of `unshard_local`: [n_local * b, ...] -> [n_local, b, ...] on this host's devices."""
    n = backend.local_device_count()
    return _put(lambda x: (x[i::n][None] for i in range(n)), tree)


def _in_order(tree: Any, group: int) -> Any:
    """[n, b, ...] -> [b * n, ...] numpy."""

    def whole(x):
        n, b, *rest = x.shape
        by_group = np.asarray(x).reshape(n, b // group, group, *rest).swapaxes(0, 1)
        return by_group.reshape(n * b, *rest)  # -1 fails for width 0

    return jax.tree.map(whole, tree)


def sum_of_bytes(data: Int[np.ndarray, " N"] | None, length: int) -> bytes:
    """Bytes that one host has and the others get: theirs are zeros, in a sum over all devices.

    Args:
      data: uint8; None where this host has nothing to say.
    """
    rows = np.zeros((backend.local_device_count(), length), np.uint8)
    if data is not None:
        rows[0] = data
    return first(_sum(rows)).tobytes()


_sum = pmap(lambda x: jax.lax.psum(x, AXIS))
