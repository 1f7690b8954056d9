"""PyTorch's pickled checkpoints (.pt, .pth, .bin) as numpy arrays, without torch and without running what they hold.

A pickle is a program for a small machine, and a stranger's may call anything that Python can import. Chosen here: the
standard library's Unpickler with `find_class` reduced to the table `_NAMES`, the few names that a tensor needs. They
stand for inert objects of this file, not for torch's. torch.load(weights_only=True) works the same way but needs torch,
which the package does not; of the torch-free readers on PyPI (ptloader 0.3, say) none is old or widely used enough to
be trusted more than these lines. Everything else is an error that names what was asked for, and nothing has run.

Tensors are views of the memory-mapped file, read when they are asked for; their sizes are checked against the file.
What a pickle takes of time and memory is bounded by its size: it is looked through before it is run (`check_steps`).
"""

import io
import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffexp_jax.errors import InputError, first_line
from diffexp_jax.formats import files
from diffexp_jax.formats.pickle_steps import check_steps

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how torch before 1.6 begins a file
_ZIP_HEADER, _ZIP_LENGTHS = 30, 26  # bytes of a local header, and where in it the lengths of name and extra are

_MOST_BYTES = 2**26  # of a zip file's data.pkl; a state dict's has some hundred kilobytes
_MOST_NUMBER = 2**60  # of axes and strides: times an item's bytes it is numpy's
_MOST_AXES = 32  # numpy's until its version 2

_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class _Storage(NamedTuple):
    """A run of numbers in the file."""

    key: str
    dtype: str
    count: int


class _Tensor(NamedTuple):
    """Where a tensor's numbers are in its storage; offset and strides in numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Dict(dict):
    """What OrderedDict becomes: torch hangs `_metadata` on a state dict, which is dropped."""

    def __init__(self, items=()):
        """`items`: as Python 2 wrote them, a list of its own for each pair, which is empty afterwards: a list that is
        given to many dicts must not become as many copies."""
        if items and not isinstance(items, list):
            raise pickle.UnpicklingError("a dict of something else than pairs")
        for key, value in items:
            if not isinstance(key, str):
                raise pickle.UnpicklingError("a key that is no name")
            self[key] = value
        if items:
            items.clear()

    def __setstate__(self, state):
        pass


class _Call:
    """What a function's name becomes: an object that can be called, and not be changed by the pickle."""

    __slots__ = ("_function",)

    def __init__(self, function):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a function with a state")


def _tensor(storage, offset, shape, strides, *_) -> _Tensor:
    """torch's _rebuild_tensor_v2; checks that every number lies in the storage."""
    if not isinstance(storage, _Storage) or not (isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise pickle.UnpicklingError("a tensor that is none")
    if len(shape) != len(strides) or len(shape) > _MOST_AXES:
        raise pickle.UnpicklingError(f"a tensor of {len(shape)} axes and {len(strides)} strides")
    if not all(type(x) is int and 0 <= x < _MOST_NUMBER for x in (offset, *shape, *strides)):
        raise pickle.UnpicklingError("a tensor that is none")
    if math.prod(n for n in shape if n) >= _MOST_NUMBER:
        raise pickle.UnpicklingError("a tensor larger than any storage")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if math.prod(shape) > storage.count or (math.prod(shape) and last >= storage.count):
        raise pickle.UnpicklingError("a tensor larger than its storage")
    return _Tensor(storage, offset, shape, tuple(step if n > 1 else 0 for n, step in zip(shape, strides, strict=True)))


_NAMES = {
    ("collections", "OrderedDict"): _Call(_Dict),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(lambda data, *_: data),
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Knows `_NAMES` and storages; `dtypes` collects those of the storages that it met."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.dtypes: dict[str, str] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            asked = f"{module}.{name}"[:80]
            raise InputError(f"refused: it asks for {asked!r}, which no tensor needs (a pickle can run code when read)")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid[:5]
        if kind != "storage" or dtype not in _STORAGES.values() or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("a storage that is none")
        if not isinstance(key, str):
            raise pickle.UnpicklingError("a storage without a name")
        self.dtypes[key] = dtype
        return _Storage(key, dtype, count)


def _run(file: Any) -> tuple[Any, dict[str, str]]:
    """The object of the next pickle of a file, once it is looked through; and the types of its storages."""
    check_steps(file)
    unpickler = _Unpickler(file)
    return unpickler.load(), unpickler.dtypes


class Pickled(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint file, by name; of {"state_dict": ...} those in it. Read when asked for.

    Raises:
      InputError: the file is missing, broken, no checkpoint, or asks for anything but tensors.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            content, self._extents = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
            if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
                content = content["state_dict"]
            items = content.items() if isinstance(content, dict) else ()
            self._tensors = {name: x for name, x in items if isinstance(name, str) and isinstance(x, _Tensor)}
            end = path.stat().st_size
            for tensor in self._tensors.values():
                start, size = self._extents.get(tensor.storage.key, (0, -1))
                size = min(size, end - start)
                if tensor.storage.count * np.dtype(_dtype(tensor.storage.dtype)).itemsize > size:
                    raise pickle.UnpicklingError("the data are cut short")
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except FileNotFoundError:
            raise InputError(f"{path}: the file is missing") from None
        except Exception as error:  # a broken or hostile pickle can make the machine fail in any way
            raise InputError(f"{path}: not a readable PyTorch checkpoint ({first_line(error, 100)})") from None
        if not self._tensors:
            raise InputError(f"{path}: holds no tensors by name; wants a state dict")

    def __getitem__(self, name: str) -> np.ndarray:
        (key, dtype, count), offset, shape, strides = self._tensors[name]
        if not math.prod(shape):
            return np.zeros(shape, _dtype(dtype))
        data = np.memmap(self._path, _dtype(dtype), "r", self._extents[key][0], (count,))
        steps = [step * data.itemsize for step in strides]
        return np.lib.stride_tricks.as_strided(data[offset:], shape, steps, writeable=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _dtype(name: str) -> np.dtype:
    return np.dtype(jnp.bfloat16 if name == "bfloat16" else name)


def _read_zip(path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The pickled object, and {storage: (first byte, bytes)}; a file as torch writes it since 1.6."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        entries = {info.filename: info for info in archive.infolist()}
        (pickled,) = (name for name in entries if name.rpartition("/")[2] == "data.pkl")
        root = pickled.removesuffix("data.pkl")
        for name in (pickled, f"{root}byteorder"):
            info = entries.get(name)
            if info and (info.compress_type != zipfile.ZIP_STORED or info.file_size > _MOST_BYTES):
                raise pickle.UnpicklingError(f"{name} is compressed or too long")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise pickle.UnpicklingError("big-endian")
        content, _ = _run(io.BytesIO(archive.read(pickled)))
        extents = {}
        for name, info in entries.items():
            if name.startswith(f"{root}data/") and info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset + _ZIP_LENGTHS)
                start = info.header_offset + _ZIP_HEADER + sum(struct.unpack("<HH", file.read(4)))
                extents[name.removeprefix(f"{root}data/")] = (start, info.file_size)
    return content, extents


def _read_legacy(path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Reads a file as torch before 1.6 wrote it, pickles one after another, then the storages."""
    # A map reads no more than there is, whatever a pickle says of its strings; a file reserves the memory first.
    with open(path, "rb") as whole, mmap.mmap(whole.fileno(), 0, access=mmap.ACCESS_READ) as file:
        if [_run(file)[0] for _ in range(2)] != [_LEGACY_MAGIC, _LEGACY_PROTOCOL]:
            raise pickle.UnpicklingError("no torch checkpoint")
        if not _run(file)[0].get("little_endian", True):
            raise pickle.UnpicklingError("big-endian")
        content, dtypes = _run(file)
        extents, end = {}, len(file)
        for key in _run(file)[0]:
            if not isinstance(key, str) or key not in dtypes:
                raise pickle.UnpicklingError("a storage that no tensor has")
            (count,) = struct.unpack("<q", file.read(8))
            size = count * _dtype(dtypes[key]).itemsize
            if not 0 <= size <= end - file.tell():
                raise pickle.UnpicklingError("the data are cut short")
            extents[key] = (file.tell(), size)
            file.seek(file.tell() + size)
    return content, extents


def open_checkpoint(path: Path) -> Mapping[str, np.ndarray]:
    """The tensors of one checkpoint file, pickled or safetensors, without the "module." of data-parallel training.

    Raises:
      InputError: as `Pickled`, or another suffix.
    """
    if path.suffix == ".safetensors":
        tensors = files.Weights([path])
    elif path.suffix in SUFFIXES:
        tensors = Pickled(path)
    else:
        raise InputError(f"{path}: wants a file ending in .safetensors, {', '.join(SUFFIXES)}")
    if all(name.startswith("module.") for name in tensors):
        return files.Renamed(tensors, lambda name: name.removeprefix("module."))
    return tensors
