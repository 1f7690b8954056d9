"""Prompts from a user's file: text, CSV, TSV or JSON, such as DrawBench, PartiPrompts and HPDv2 are published in."""

import csv
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

from diffexp_jax import InputError

FORMATS = ".txt (one prompt a line), .csv or .tsv (a column 'prompt' or 'prompts'), .json (a list of strings)"


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a file, in its order, each once, white space inside them made single spaces.

    Raises:
      InputError: the file cannot be read, is not UTF-8, has the wrong form, or holds no prompt.
    """
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None:
        raise InputError(f"{path}: unknown kind of prompt file {path.suffix!r}; accepted: {FORMATS}")
    texts = (" ".join(text.split()) for text in parse(path, _read_text(path)))
    unique = tuple(dict.fromkeys(text for text in texts if text))
    if not unique:
        raise InputError(f"{path}: no prompts in the file; it needs at least one")
    return unique


def comma_phrases(text: str) -> tuple[str, ...]:
    """The phrases of a prompt that nothing more is known of: its parts between commas, without closing punctuation.

    "A red car, 3,000 km away." -> ("A red car", "3,000 km away")
    """
    parts = (part.strip(" .!?;:,") for part in re.split(r",\s", text))
    return tuple(part for part in parts if part) or (text,)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the prompt file: {error.strerror}") from error
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line} (byte {error.start}) is not UTF-8; save the file as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parse_txt(path: Path, text: str) -> list[str]:
    return text.split("\n")  # not splitlines(): that also cuts at rarer characters, which a prompt may hold


def _parse_csv(path: Path, text: str) -> list[str]:
    reader = csv.reader(io.StringIO(text))
    try:
        return _prompt_column(path, list(reader))
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num} is not CSV: {error}") from error


def _parse_tsv(path: Path, text: str) -> list[str]:
    # TSV has no quoting, and PartiPrompts has a prompt that starts with a quoted word. Yet spreadsheets quote a
    # whole cell, doubling the quotes in it: that form alone is undone.
    def unquote(cell: str) -> str:
        return cell[1:-1].replace('""', '"') if re.fullmatch(r'"(?:[^"]|"")*"', cell) else cell

    return _prompt_column(path, ([unquote(cell) for cell in line.split("\t")] for line in text.split("\n")))


def _prompt_column(path: Path, rows: Iterable[list[str]]) -> list[str]:
    rows = iter(rows)
    header = next(rows, [])
    names = [cell.strip().lower() for cell in header]
    column = next((i for i, name in enumerate(names) if name in ("prompt", "prompts")), None)
    if column is None:
        found = ", ".join(map(repr, header)) or "nothing"
        raise InputError(f"{path}: the first line names no column 'prompt' or 'prompts' (any case); found: {found}")
    return [row[column] for row in rows if len(row) > column]


def _parse_json(path: Path, text: str) -> list[str]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno} is not JSON: {error.msg}") from error
    if not isinstance(data, list):
        raise InputError(f"{path}: holds JSON of type {type(data).__name__}; accepted: a list of strings")
    for i, item in enumerate(data):
        if not isinstance(item, str):
            raise InputError(f"{path}: item {i} is of type {type(item).__name__}; accepted: a list of strings")
    return data


_PARSERS = {".txt": _parse_txt, ".csv": _parse_csv, ".tsv": _parse_tsv, ".json": _parse_json}
