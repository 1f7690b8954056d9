"""Weights for models of a published size, without files: what check_machine.py and benchmark.py run."""

import functools
from typing import Any

import jax
import numpy as np

from diffexp_jax import parallel

PERIOD = 2**20 + 7  # a draw of so many numbers is repeated: a billion different ones would take minutes


def random_weights(shapes: Any) -> Any:
    """Arrays of such shapes, on every device: normal numbers of std 0.02, about 1 where they scale."""
    numbers = 0.02 * np.random.RandomState(0).standard_normal(PERIOD).astype(np.float32)

    @functools.cache
    def block(mean, dtype):
        return (mean + numbers).astype(dtype)

    def fill(path, leaf):
        return np.resize(block(float(path[-1].key == "scale"), leaf.dtype), leaf.shape)

    return parallel.replicate(jax.tree_util.tree_map_with_path(fill, shapes))


def peak_memory() -> int | None:
    """Bytes of the first device since the program began; None where the device does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
