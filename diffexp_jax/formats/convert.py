"""Checkpoints in the published formats <-> parameter trees, with full accounting.

The modules carry the checkpoints' own names, so a tensor's name is its parameter's path joined by dots. Only the last
part differs (torch "weight" is our "kernel", "scale" or "embedding") and the axes of kernels (torch keeps outputs
first). A missing, unexpected or wrongly shaped tensor is an error that names it.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from diffexp_jax.errors import InputError

# torch axis order from ours, by the rank of a kernel: Dense [in, out] -> [out, in]; Conv [H, W, I, O] -> [O, I, H, W]
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
_FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}

_SHOWN = 8  # names printed per list of an error
_AT_ONCE = 2**20  # numbers that are looked at together


def torch_name(path: tuple[str, ...]) -> str:
    """("down_blocks.0", "conv1", "kernel") -> "down_blocks.0.conv1.weight"."""
    *module, leaf = path
    return ".".join([*module, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])


def torch_names(shapes: Mapping[str, Any]) -> list[str]:
    """The checkpoint names of a parameter tree."""
    return [torch_name(path) for path in traverse_util.flatten_dict(shapes)]


def to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A parameter tree as {checkpoint name: contiguous array in torch's axis order}."""
    flat = traverse_util.flatten_dict(params)
    out = {}
    for path, value in flat.items():
        value = np.asarray(value)
        out[torch_name(path)] = np.asarray(value.transpose(_axes(_TO_TORCH, path, value.ndim)), order="C")
    return out


def from_torch(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Any], *, where: str, dtype=np.float32):
    """Builds the parameter tree of `shapes` (as from `jax.eval_shape`) out of checkpoint tensors.

    Args:
      tensors: {checkpoint name: array in torch's axis order}; read one at a time.
      shapes: the tree to fill; its leaves give the shapes.
      where: the file or folder, for the errors.
      dtype: of every leaf.

    Raises:
      InputError: tensors are missing, unexpected, or of another shape (the message lists their names), or one holds
        a number that is not finite, or is not in this dtype.
    """
    wanted = {torch_name(path): (path, leaf.shape) for path, leaf in traverse_util.flatten_dict(shapes).items()}
    missing, unexpected = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if missing or unexpected:
        lists = (("missing", missing), ("unexpected", unexpected))
        parts = [f"{len(names)} {what} ({_listed(names)})" for what, names in lists if names]
        raise InputError(f"{where}: the tensors do not fit the config: {'; '.join(parts)}")
    flat, wrong = {}, []
    for name, (path, shape) in wanted.items():
        value = np.asarray(tensors[name])
        if not jax.dtypes.issubdtype(value.dtype, np.floating):
            raise InputError(f"{where}: {name} holds {value.dtype} numbers; wants floating-point ones")
        shape = tuple(shape[axis] for axis in _axes(_TO_TORCH, path, len(shape)))
        if value.shape[2:] + shape[2:] == (1, 1):  # a linear layer where a 1x1 convolution is wanted, or the reverse
            value = value.reshape(value.shape[:2] + shape[2:])
        if value.shape != shape:
            wrong.append(f"{name} is {value.shape}, the config wants {shape}")
        else:
            # one copy at most: neither cast before it is transposed, nor transposed before it is cast
            with np.errstate(over="ignore"):  # said below
                flat[path] = aligned(value.transpose(_axes(_FROM_TORCH, path, value.ndim)), dtype)
            if not all_finite(flat[path]):
                file_of = getattr(tensors, "file_of", lambda name: None)
                raise InputError(f"{file_of(name) or where}: {_not_finite(name, value, dtype)}")
    if wrong:
        raise InputError(f"{where}: {len(wrong)} tensors of the wrong shape: {'; '.join(sorted(wrong)[:_SHOWN])}")
    return traverse_util.unflatten_dict(flat)


def all_finite(value: np.ndarray) -> bool:
    """Whether no number is NaN or infinite, by one pass over memory: it makes no copy and no mask of its size."""
    with np.errstate(over="ignore", invalid="ignore"):
        if math.isfinite(value.sum(dtype=np.float32)):  # the sum of anything not finite is not
            return True
    flat = value.reshape(-1)  # a sum may also overflow
    return all(np.isfinite(flat[i : i + _AT_ONCE]).all() for i in range(0, flat.size, _AT_ONCE))


def _not_finite(name: str, value: np.ndarray, dtype: DTypeLike) -> str:
    if all_finite(np.ascontiguousarray(value)):
        return f"tensor {name} has numbers too large for {np.dtype(dtype).name}; wants bfloat16 or float32 weights"
    return f"tensor {name} holds NaN or infinite numbers; the file is damaged, or training it had failed"


def aligned(value: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """A copy in C order that begins at a multiple of 64 bytes: all devices of a CPU can read it where it is."""
    copy = empty_aligned(value.shape, dtype)
    copy[...] = value
    return copy


def empty_aligned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """As `np.empty`, with a beginning at a multiple of 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + 63, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _axes(table: Mapping[int, tuple[int, ...]], path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    return table[ndim] if path[-1] == "kernel" else tuple(range(ndim))


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def abstract_params(module, *args, **kwargs) -> dict[str, Any]:
    """The shapes of a module's parameters, without computing anything; arguments as for `module.init`, or shapes."""
    return jax.eval_shape(lambda *args: module.init(jax.random.key(0), *args, **kwargs), *args)["params"]


def typed(shapes: Any, dtype: DTypeLike) -> Any:
    """The shapes of arrays of this dtype."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
