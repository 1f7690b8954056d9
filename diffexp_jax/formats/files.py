"""Model folders in the published formats: config.json beside single or sharded safetensors, full or fp16."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from diffexp_jax import paths
from diffexp_jax.errors import InputError, first_line
from diffexp_jax.formats.json_text import MOST_BYTES, parse_json, read_text
from diffexp_jax.formats.writing import replaced

# Weight files by the names that diffusers (first) and transformers (second) write.
STEMS = ("diffusion_pytorch_model", "model")


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all; folders above it are made.

    Raises:
      InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None


def read_json(path: Path, *, finite: bool = True, most: int = MOST_BYTES) -> dict[str, Any]:
    """A json file that must exist and hold an object; see `parse_json`.

    Raises:
      InputError: it does not, or has more than `most` bytes.
    """
    try:
        content = parse_json(read_text(path, most), finite=finite)
    except FileNotFoundError:
        raise InputError(f"{path}: the file is missing") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as json ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: wants a json object, found a {type(content).__name__}")
    return content


class Weights(Mapping[str, np.ndarray]):
    """The tensors of a folder's safetensors files, by name; each is read from disk only when asked for."""

    def __init__(self, files: list[Path]):
        self._where, self._open = {}, {}
        for path in files:
            try:
                # read, not mapped: the pages of a mapped file stay with the process, a second copy of the weights
                self._open[path] = safe_open(path, framework="numpy", backend="pread")
            except FileNotFoundError:
                raise InputError(f"{path}: the file is missing") from None
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path}: not a whole safetensors file ({first_line(error)})") from None
            self._where |= {name: path for name in self._open[path].keys()}

    @property
    def metadata(self) -> dict[str, str]:
        """What the files' headers say beside the tensors."""
        return {key: text for file in self._open.values() for key, text in (file.metadata() or {}).items()}

    def __getitem__(self, name: str) -> np.ndarray:
        path = self._where[name]
        try:
            return self._open[path].get_tensor(name)
        except Exception as error:  # of many types: cut short since it was opened, a type of numbers without numpy's
            raise InputError(f"{path}: tensor {name} is not readable ({first_line(error)})") from None

    def file_of(self, name: str) -> Path:
        """The file that a tensor is in, for errors."""
        return self._where[name]

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

    def file_of(self, name: str) -> Path | None:
        """The file that a tensor is in, for errors; None where that is not known."""
        inner = getattr(self._tensors, "file_of", None)
        return inner and inner(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_weights(folder: Path, *, variant: str | None = None) -> Weights:
    """Finds the weights of a model folder, in a single file or in shards listed in an index.

    Where there are both whole and half-precision files, the whole ones are taken, unless `variant` is "fp16".

    Raises:
      InputError: there are none, a shard is missing, a file is cut short, or there are only pickles (.bin).
    """
    for mark in ("", ".fp16") if variant is None else (f".{variant}", ""):
        for stem in STEMS:
            if (single := folder / f"{stem}{mark}.safetensors").is_file():
                return Weights([single])
            # diffusers puts the variant of an index before ".json", transformers before ".index"
            for index in (f"{stem}.safetensors.index{mark}.json", f"{stem}{mark}.safetensors.index.json"):
                if (path := folder / index).is_file():
                    return Weights([folder / shard for shard in _shards(path)])
    if not folder.is_dir():
        raise InputError(f"{folder}: the folder is missing")
    if list(folder.glob("*.bin")):
        raise InputError(
            f"{folder}: only pickled weights (.bin), which can run code when read; convert them once with "
            "diffusers or transformers: model.save_pretrained(folder, safe_serialization=True)"
        )
    if variants := _variants(folder):
        missing = "without a variant" if variant is None else f"of the variant {variant!r}"
        others = f"--variant {' or '.join(variants)} (model.variant in a config)"
        raise InputError(f"{folder}: no weights {missing}; there are those of {others}")
    raise InputError(f"{folder}: no weights; wants {STEMS[0]}.safetensors or {STEMS[1]}.safetensors, or shards")


def _variants(folder: Path) -> list[str]:
    """The variants whose weights are in a folder, "bf16" say, however their shards and indices are named."""
    part = r"(?:-\d{5}-of-\d{5})?"
    name = re.compile(rf"(?:{'|'.join(STEMS)}){part}\.(?:safetensors\.index\.)?([\w-]+?){part}\.(?:safetensors|json)")
    return sorted({match[1] for path in folder.iterdir() if (match := name.fullmatch(path.name))} - {"index"})


def _shards(index: Path) -> list[str]:
    """The files that an index names."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index}: wants weight_map, an object that gives each tensor's file")
    return sorted(set(names.values()))


# ------------------------------------------------------------------------------------------------------------------ hub

HUB = "hub:"  # before a repository of the hub: hub:ORGANISATION/NAME
_OF_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # how names end that are a file's, never a repository's
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def _asked_for(path: str, *, what: str) -> str | None:
    """The repository that a path asks the hub for, hub:ORGANISATION/NAME; None: it is no such path.

    Raises:
      InputError: what follows "hub:" is no name of a repository.
    """
    if not path.startswith(HUB):
        return None
    repository = path.removeprefix(HUB)
    if not _HUB_ID.fullmatch(repository):
        raise InputError(f"{what}: wants hub:ORGANISATION/NAME")
    return repository


def model_folder(path: str, parts: Iterable[str], *, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of a pipeline: `path` itself, or a copy of the hub's repository of this name, downloaded once.

    Args:
      path: a local folder, or a hub id "organisation/name", also as hub:ORGANISATION/NAME. Without "hub:" it is a
        folder's name where there is a folder "organisation" here.
      parts: the subfolders that are wanted of the repository; of each the json files, the tokenizer's files, and the
        weights in safetensors format.
      revision: a branch, tag or commit of the repository.
      variant: of the weight files to download: None for the whole ones, "fp16" for those.

    Raises:
      InputError: no such folder, and the repository (or the network) is not there and nor is a copy of it.
    """
    what = f"model {path!r}"
    repository = _asked_for(path, what=what)
    if repository is None and (folder := paths.local("model", path)).is_dir():
        return folder
    if repository is None and (not _HUB_ID.fullmatch(path) or path.lower().endswith(_OF_FILES)):
        raise InputError(
            f"{what}: no such folder; accepted: emoji, emoji_hard, emoji_flow, a folder in diffusers' format, or a "
            "hub id; or a single file of Stable Diffusion"
        )
    if repository is None and (parent := Path(path).parent).is_dir():
        hub = f"the hub's repository of this name is {HUB}{path}"
        raise InputError(f"{what}: no such folder in {parent}, which is a folder here; {hub}")
    mark = f".{variant}" if variant else ""
    names = ["*.json", "merges.txt"]
    shard = "-?????-of-?????"
    names += [f"{stem}{end}.safetensors" for stem in STEMS for end in (mark, f"{mark}{shard}", f"{shard}{mark}")]
    wanted = ["model_index.json", *(f"{part}/{name}" for part in parts for name in names)]
    return _from_hub(repository or path, wanted, what=what, revision=revision)


_PARTS = ("*.json", "merges.txt", "vocab.txt", "*.safetensors")  # configs, vocabularies, weights


def file_or_folder(path: str, *, what: str, wanted: Sequence[str] = _PARTS) -> Path:
    """`path` itself, or of hub:ORGANISATION/NAME a copy of that repository's wanted files.

    Raises:
      InputError: it is not there; `what` begins the message.
    """
    check_location(path, what=what)
    repository = _asked_for(path, what=what)
    if repository is None:
        return paths.local(what, path)
    return _from_hub(repository, wanted, what=what)


def tokenizer_folder(path: str, *, what: str) -> Path:
    """Finds a folder as `file_or_folder` does, with tokenizers and nothing else of the repository."""
    names = ("vocab.json", "merges.txt", "tokenizer*.json", "special_tokens_map.json")
    wanted = [f"{folder}{name}" for folder in ("", "tokenizer/", "tokenizer_2/") for name in names]
    return file_or_folder(path, what=what, wanted=wanted)


def check_location(path: str, *, what: str) -> None:
    """Raises InputError, without any download, where nothing is at the path and it is no hub:ORGANISATION/NAME."""
    if _asked_for(path, what=what) is None and not paths.local(what, path).exists():
        hub = f"; the hub's repository of this name is {HUB}{path}" if _HUB_ID.fullmatch(path) else ""
        raise InputError(f"{what}: {path}: no such file or folder{hub}")


def _from_hub(repository: str, wanted: Sequence[str], *, what: str, revision: str | None = None) -> Path:
    """The folder of a repository's copy in the hub's cache, downloaded if it is not there yet."""
    from huggingface_hub import errors, snapshot_download  # a second to import: only where it is used

    print(f"{what}: the hub's repository {repository}", flush=True)
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except errors.IncompleteSnapshotError as error:  # offline; another program may have left out what is not needed
        return Path(error.snapshot_path)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        reason = "wants a login or a licence accepted" if isinstance(error, errors.GatedRepoError) else "not on the hub"
        at = f" at revision {revision!r}" if revision else ""
        raise InputError(f"{what}: no such folder, and {reason}{at}") from None
    except Exception as error:  # of many libraries: no network, offline by HF_HUB_OFFLINE, a full disk
        raise InputError(
            f"{what}: no such folder, no copy in the hub's cache, and it could not be downloaded "
            f"({first_line(error)}); give the path of a folder, or run once with a network"
        ) from None


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
