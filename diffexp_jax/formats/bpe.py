"""Whether the files of a BPE tokenizer belong together: an interrupted download is found, not read as another one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffexp_jax.errors import InputError
from diffexp_jax.formats.files import read_json
from diffexp_jax.formats.json_text import read_text

WORD_END, SPECIAL = "</w>", ("<|startoftext|>", "<|endoftext|>")  # of CLIP
_MOST_TOKENS = 2**24
_FEW = 16  # of the 512 symbols that stand for bytes: a vocabulary that lacks no more is damaged, not another one
VOCABULARY, MERGES, WHOLE = "vocab.json", "merges.txt", "tokenizer.json"
# Read beside them where they are there
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class Files(NamedTuple):
    """What the files of a tokenizer say."""

    vocabulary: Path  # the file of the ids
    merges_from: Path  # that of the merges, which may be the same
    ids: Mapping[str, int]
    merges: Sequence[tuple[str, str]]  # of two tokens each, the first ones first


def read_files(folder: Path) -> Files:
    """The vocabulary and merges of a folder as transformers reads it: of tokenizer.json, else of the two other files.

    Raises:
      InputError: a file is missing or damaged, also one of the settings beside them.
    """
    check_settings(folder)
    if (path := folder / WHOLE).is_file():
        model = read_json(path).get("model")
        model = model if isinstance(model, dict) else {}
        return Files(path, path, _ids(path, model.get("vocab")), merges_of(path, model.get("merges")))
    ids = _ids(folder / VOCABULARY, read_json(folder / VOCABULARY))
    lines = text_lines(folder / MERGES)
    lines = lines[1:] if lines[:1] and lines[0].startswith("#version") else lines
    return Files(folder / VOCABULARY, folder / MERGES, ids, merges_of(folder / MERGES, lines))


def names_of(folder: Path) -> str:
    """The tokenizer's files that are there, for an error."""
    known = (WHOLE, VOCABULARY, MERGES, *SETTINGS)
    return f"{folder}: of {', '.join(name for name in known if (folder / name).is_file())}"


def check_settings(folder: Path) -> None:
    """Raises InputError where one of the files of settings is no json, which names it."""
    for name in SETTINGS:
        if (folder / name).is_file():
            read_json(folder / name)


def text_lines(path: Path) -> list[str]:
    """The lines of a tokenizer's text file.

    Raises:
      InputError: it is missing, not UTF-8, or too long.
    """
    try:
        return read_text(path).removesuffix("\n").replace("\r\n", "\n").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: the file is missing") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as text ({error})") from None


def check(files: Files) -> None:
    """Raises InputError, which names the file, where a merge is there twice, or no token is what it makes."""
    if len(set(files.merges)) < len(files.merges):
        raise InputError(f"{files.merges_from}: a merge is there twice")
    for one, other in files.merges:
        if not {one, other, one + other} <= files.ids.keys():
            known = f"the vocabulary ({files.vocabulary.name}) lacks one of its tokens"
            raise InputError(f"{files.merges_from}: the merge {one!r} {other!r}: {known}; is the file damaged?")


def check_whole(files: Files, byte_symbols: Sequence[str], end: int) -> None:
    """Checks of CLIP's BPE, whose tokens are the 256 bytes, the same at the end of a word, one for each merge, and
    special ones, that no merge is missing. Other BPE is not checked: its tokens may come from elsewhere.

    Args:
      byte_symbols: the characters that stand for the 256 bytes.
      end: the first special token's id; added ones may follow it.

    Raises:
      InputError: it names the file.
    """
    symbols = {*byte_symbols, *(symbol + WORD_END for symbol in byte_symbols)}
    missing = symbols - files.ids.keys()
    if 0 < len(missing) <= _FEW:
        raise InputError(f"{files.vocabulary}: lacks {min(missing)!r}, one of the symbols that stand for bytes")
    if missing or end < max(files.ids[symbol] for symbol in symbols):
        return
    known = {*symbols, *SPECIAL, *(one + other for one, other in files.merges)}
    if lost := {i: token for token, i in files.ids.items() if i < end and token not in known}:
        raise InputError(
            f"{files.merges_from}: {len(lost)} merges are missing, that of {lost[min(lost)]!r} first; is the file cut?"
        )


def _ids(path: Path, content: Any) -> dict[str, int]:
    """The ids of a vocabulary. Raises InputError where they are none."""
    if not isinstance(content, dict) or not all(type(i) is int and 0 <= i < _MOST_TOKENS for i in content.values()):
        raise InputError(f"{path}: wants a vocabulary, an object that gives each token's id")
    if len(set(content.values())) < len(content):
        raise InputError(f"{path}: two tokens have the same id")
    return content


def merges_of(path: Path, content: Any) -> list[tuple[str, str]]:
    """Merges as pairs, from "one other" or [one, other]. Raises InputError where they are none."""
    found = []
    for n, merge in enumerate(content if isinstance(content, list) else [None]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise InputError(f"{path}: merge {n + 1} is {merge!r:.60}; wants two tokens")
        found.append((pair[0], pair[1]))
    return found
