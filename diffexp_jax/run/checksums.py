"""What a checkpoint says of itself besides its arrays, with checksums that find a flipped bit in both."""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffexp_jax.formats.json_text import parse_json, read_text

_OWN = "crc32_of_contents"  # the checksum of all the rest of the contents


def contents_of(state: Any, *, score: float | None, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """{"crc32": of each array of the state, "score", "rows"} and a checksum of these three."""
    contents = {"crc32": checksums(state), "score": score, "rows": list(rows)}
    return contents | {_OWN: _crc32_of_json(contents)}


def read_contents(checkpoint: Path) -> dict[str, Any]:
    """What `contents_of` gave for a checkpoint's folder; {} where an older version wrote it without.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not what was written. An older version wrote no checksum of it: then it is only read.
    """
    file = checkpoint / "contents" / "metadata"
    if not file.exists():
        return {}
    contents = parse_json(read_text(file), finite=False)
    if isinstance(contents, dict):
        rest = {key: value for key, value in contents.items() if key != _OWN}
        if _OWN not in contents or contents[_OWN] == _crc32_of_json(rest):
            return contents
    raise ValueError("its rows, score or checksums are not what was written")


def checksums(tree: Any) -> dict[str, str]:
    """{path: CRC-32 of an array's type, shape and bytes}, the same for a tuple and what orbax reads it as."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _crc32(np.asarray(x))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _crc32(x: np.ndarray) -> str:
    kind = zlib.crc32(f"{x.dtype} {x.shape}".encode())
    return f"{zlib.crc32(np.ascontiguousarray(x).view(np.uint8).reshape(-1) if x.size else b'', kind):08x}"


def _crc32_of_json(contents: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(contents, sort_keys=True).encode()):08x}"


def steps_in(folder: Path) -> list[int]:
    """The iterations of a folder's checkpoints, in no order; one that is only being written has another name."""
    return [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
