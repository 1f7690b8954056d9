"""Devices, hosts, randomness: one pure per-device function becomes one program, on a CPU, eight GPUs or a pod.

`devices.py` maps functions over all devices and moves arrays, `hosts.py` is what the processes of a run say to each
other, `watch.py` notices those that have gone. Nothing outside of this folder knows that there are several.
"""

from diffexp_jax.parallel.devices import (
    AXIS,
    Part,
    Split,
    first,
    pmap,
    replicate,
    sample_index,
    shapes_on_devices,
    shard,
    shard_local,
    share,
    split_batch,
    unshard,
    unshard_local,
)
from diffexp_jax.parallel.host_settings import HostSettings
from diffexp_jax.parallel.hosts import (
    agree,
    check_same,
    exchange,
    from_each,
    from_first,
    is_first,
    joined,
    number_of_hosts,
    on_first,
    own_share,
    together,
)
from diffexp_jax.parallel.randomness import keys_of, sample_keys, stream
from diffexp_jax.parallel.weights import by_all_devices, by_parts, shared_out, waiting

__all__ = ["AXIS", "Split", "first", "pmap", "replicate", "sample_index", "shard", "shard_local", "split_batch"]
__all__ += ["share", "unshard", "unshard_local", "keys_of", "sample_keys", "stream"]
__all__ += ["Part", "by_all_devices", "by_parts", "shapes_on_devices", "shared_out", "waiting"]
__all__ += ["HostSettings", "agree", "check_same", "exchange", "from_each", "from_first", "is_first", "joined"]
__all__ += ["number_of_hosts", "on_first", "own_share", "together"]
