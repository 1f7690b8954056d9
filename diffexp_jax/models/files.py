"""Model folders in the published formats: config.json beside single or sharded safetensors, full or fp16."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from diffexp_jax import InputError

# Weight files by the names that diffusers (first) and transformers (second) write.
STEMS = ("diffusion_pytorch_model", "model")


def read_json(path: Path) -> dict[str, Any]:
    """A json file that must exist and hold an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: the file is missing") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as json ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: wants a json object, found a {type(content).__name__}")
    return content


class Weights(Mapping[str, np.ndarray]):
    """The tensors of a folder's safetensors files, by name; each is read from disk only when asked for."""

    def __init__(self, files: list[Path]):
        self._where, self._open = {}, {}
        for path in files:
            try:
                self._open[path] = safe_open(path, framework="numpy")
            except FileNotFoundError:
                raise InputError(f"{path}: the file is missing") from None
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path}: not a whole safetensors file ({error})") from None
            self._where |= {name: path for name in self._open[path].keys()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._open[self._where[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class Renamed(Mapping[str, np.ndarray]):
    """A view of `tensors` under other names; `rename` gives a tensor's new name, or None to leave it out."""

    def __init__(self, tensors: Mapping[str, np.ndarray], rename: Callable[[str], str | None]):
        self._tensors = tensors
        self._names = {new: old for old in tensors if (new := rename(old)) is not None}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_weights(folder: Path) -> Weights:
    """Finds the weights of a model folder: whole before fp16, single file or shards listed in an index.

    Raises:
      InputError: there are none, a shard is missing, a file is cut short, or there are only pickles (.bin).
    """
    for stem in STEMS:
        for variant in ("", ".fp16"):
            if (single := folder / f"{stem}{variant}.safetensors").is_file():
                return Weights([single])
            # diffusers puts the variant of an index before ".json", transformers before ".index"
            for index in (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json"):
                if (path := folder / index).is_file():
                    shards = read_json(path).get("weight_map", {}).values()
                    return Weights([folder / shard for shard in sorted(set(shards))])
    if not folder.is_dir():
        raise InputError(f"{folder}: the folder is missing")
    if list(folder.glob("*.bin")):
        raise InputError(
            f"{folder}: only pickled weights (.bin), which can run code when read; convert them once with "
            "diffusers or transformers: model.save_pretrained(folder, safe_serialization=True)"
        )
    raise InputError(f"{folder}: no weights; wants {STEMS[0]}.safetensors or {STEMS[1]}.safetensors, or shards")


def only_file(folder: Path, suffixes: Sequence[str]) -> Path:
    """The one file of a folder that ends in one of the suffixes.

    Raises:
      InputError: there is none, or there are several.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(f"{folder}: wants one file ending in {', '.join(suffixes)}; found {names}")
    return found[0]
