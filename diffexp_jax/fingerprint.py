"""Knows weights again, whatever their files are called."""

import zlib
from typing import Any

import jax
import numpy as np

_SAMPLED = 4096  # numbers of an array that count, about


def fingerprint(*trees: Any) -> str:
    """Eight hexadecimal digits that tell trees of arrays or texts from others, in no time.

    They are a checksum of every array's place, type, shape, and of numbers evenly spaced in it: enough to know weights
    again, not to find a flipped bit.
    """
    checksum = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        x = np.asarray(leaf)
        checksum = zlib.crc32(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}".encode(), checksum)
        if x.dtype.kind == "U":
            data = str(leaf).encode()
        else:
            data = np.ascontiguousarray(x.reshape(-1)[:: max(x.size // _SAMPLED, 1)]).tobytes()
        checksum = zlib.crc32(data, checksum)
    return f"{checksum:08x}"
