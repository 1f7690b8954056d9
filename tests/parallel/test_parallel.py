"""Devices and randomness: who gets which sample, and which key."""

import zlib
from functools import partial

import jax
import numpy as np
import pytest

from diffexp_jax import parallel
from diffexp_jax.errors import InputError
from diffexp_jax.formats import convert
from diffexp_jax.parallel import devices


def test_sample_index_of_one_of_two_hosts(monkeypatch):
    """Four devices, two a host, as on a TPU pod not in order: global sample g lives on device g mod 4."""
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(devices, "_places", lambda: np.array([1, 3]))
    np.testing.assert_array_equal(parallel.sample_index(12), [[1, 5, 9], [3, 7, 11]])


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("share", [0, 1])
def test_a_minibatch_is_the_same_set_on_any_number_of_devices(monkeypatch, share, group):
    """The j-th half of every device's samples, over all devices; of groups, those of one half of the prompts."""
    for n in (1, 2, 4):
        monkeypatch.setattr(jax, "device_count", lambda n=n: n)
        monkeypatch.setattr(jax, "local_device_count", lambda n=n: n)
        half = np.split(parallel.sample_index(8 * group, group=group), 2, axis=1)[share]
        assert set(half.ravel().tolist()) == set(range(4 * group * share, 4 * group * (share + 1)))


def test_a_groups_samples_lie_on_one_device(monkeypatch):
    """Groups of three on two devices, side by side; and back in the global order."""
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    index = parallel.sample_index(12, group=3)
    np.testing.assert_array_equal(index, [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]])
    np.testing.assert_array_equal(parallel.unshard(index, group=3), np.arange(12))


@pytest.mark.parametrize("samples, group, updates, accepted", [(16, 4, 2, True), (16, 8, 2, False), (8, 4, 1, True)])
def test_a_group_is_learnt_from_in_one_update(samples, group, updates, accepted):
    """16 samples on two devices: of groups of 8 a device has one, which two updates cannot share."""
    split = partial(parallel.split_batch, samples, devices=2, per_forward=2, updates=updates, group=group)
    if accepted:
        assert split().chunks == samples // 4  # a forward pass takes a part of a group
    else:
        with pytest.raises(InputError, match="batch.samples=16: wants a multiple of devices x updates x batch.group"):
            split()


def test_unshard_restores_the_global_order():
    tree = {"a": np.array([[0, 2, 4], [1, 3, 5]]), "b": np.arange(12).reshape(2, 3, 2)}
    out = parallel.unshard(tree)
    np.testing.assert_array_equal(out["a"], [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(out["b"], [[0, 1], [6, 7], [2, 3], [8, 9], [4, 5], [10, 11]])


def test_shard_and_unshard():
    keys = jax.random.split(jax.random.key(0), 6)
    tree = {"x": np.arange(12.0).reshape(6, 2), "k": jax.random.key_data(keys), "none": None}
    share = parallel.shard(tree, 6)
    n = jax.local_device_count()
    assert share["x"].shape == (n, 6 // n, 2) and isinstance(share["x"], jax.Array) and share["none"] is None
    out = parallel.unshard(share)
    np.testing.assert_array_equal(out["x"], tree["x"])
    np.testing.assert_array_equal(out["k"], tree["k"])
    assert jax.random.key_data(parallel.shard(keys, 6)).shape[:2] == (n, 6 // n)


def test_replicate_and_first():
    tree = {"x": np.arange(3.0), "n": np.int32(2), "key": jax.random.key(4)}
    copies = parallel.replicate(tree)
    assert copies["x"].shape == (jax.local_device_count(), 3) and copies["key"].shape == (jax.local_device_count(),)
    assert np.array_equal(jax.random.key_data(copies.pop("key"))[0], jax.random.key_data(tree["key"]))
    back = parallel.first(copies)
    assert isinstance(back["x"], np.ndarray) and back["x"].tolist() == [0, 1, 2] and back["n"] == 2
    tree["x"][:] = 7.0
    assert parallel.first(copies)["x"].tolist() == [0, 1, 2]  # not the host's memory


def test_arrays_reach_the_devices_and_come_back_without_a_program(compiles):
    """Of shapes that no other test has: a program for each would be compiled at a run's start, and kept."""
    parallel.replicate(np.zeros(1))  # where the devices are is asked once
    keys, x = jax.random.split(jax.random.key(0), 26), np.zeros((26, 17), np.float32)
    compiled = compiles.count
    there = parallel.shard((x, keys), 26), parallel.replicate((x, keys)), parallel.shard_local(x), parallel.share(x)
    parallel.first(there[2]), parallel.unshard(there[0][0]), parallel.unshard_local(there[2])
    assert compiles.count == compiled


def test_a_cpus_devices_read_the_hosts_copy():
    x = convert.aligned(np.arange(6.0).reshape(2, 3).T, np.float32)
    copies = parallel.share({"x": x, "n": np.int32(2), "unaligned": np.arange(9.0, dtype=np.float32)[1:]})
    n = jax.local_device_count()
    where = [shard.data.unsafe_buffer_pointer() for shard in copies["x"].addressable_shards]
    assert where == [x.ctypes.data] * n
    replicated = parallel.replicate(jax.tree.map(lambda x: x[0], jax.device_get(copies)))
    for name, copy in copies.items():
        np.testing.assert_array_equal(copy, replicated[name])
        assert copy.sharding == replicated[name].sharding  # no program moves it again


def test_streams_are_independent_of_each_other():
    names = ("prompts", "noise", "weights", "update", "lora", "eval/animals", "eval/dogs")
    keys = {(s, n, i): parallel.stream(s, n, i) for s in (0, 1) for n in names for i in (0, 1, 2)}
    data = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys.values()}
    assert len(data) == len(keys)
    draws = np.stack([jax.random.normal(key, (400,)) for key in keys.values()])
    correlation = np.corrcoef(draws) - np.eye(len(keys))
    assert np.abs(correlation).max() < 0.25  # 5 standard errors of 1 / sqrt(400)


def test_a_stream_is_what_it_was_when_a_run_was_stopped():
    """Fixed for good: a run that is continued with other keys would not be the same run."""
    key = jax.random.key_data(parallel.stream(3, "noise", 7))
    assert np.asarray(key).tolist() == [5863931, 88286164]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_a_stream_is_the_seeds_key_folded_twice(seed):
    expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"noise") & 0x7FFFFFFF), 12)
    assert np.array_equal(jax.random.key_data(parallel.stream(seed, "noise", 12)), jax.random.key_data(expected))


def test_sample_keys_depend_on_the_sample_alone():
    key = jax.random.key(5)
    few, many = (jax.random.key_data(parallel.sample_keys(key, n)) for n in (3, 8))
    np.testing.assert_array_equal(few, many[:3])
    assert len(np.unique(many, axis=0)) == 8
