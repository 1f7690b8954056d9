"""Prompts from a user's file: text, CSV, TSV or JSON, such as DrawBench, PartiPrompts and HPDv2 are published in."""

import csv
import io
import re
from collections.abc import Iterable
from json import JSONDecodeError
from pathlib import Path
from typing import NamedTuple

from diffexp_jax import InputError
from diffexp_jax.formats.json_text import parse_json

FORMATS = (
    ".txt (one prompt a line), .csv or .tsv (a column 'prompt' or 'prompts'; FILE.csv:COLUMN=VALUE|VALUE takes rows of "
    "it), .json (a list of strings)"
)
ENDINGS = (".txt", ".csv", ".tsv", ".json")

_FILTERED = re.compile(r"(.+?\.(?:txt|csv|tsv|json)):(.*)", re.IGNORECASE)


class Filter(NamedTuple):
    """Which rows of a table count: those with one of the values in a column."""

    column: str  # of the table's first line, in any case
    values: tuple[str, ...]  # exactly as they are written there, but for blanks at their ends


def split_filter(spec: str) -> tuple[Path, Filter | None]:
    """ "a.csv:Category=Colors|Text" -> a.csv, and the rows whose Category is Colors or Text; "a.csv" -> all of them.

    Raises:
      InputError: what follows the file is no filter.
    """
    match = _FILTERED.fullmatch(spec)
    if match is None:
        return Path(spec), None
    column, equals, values = match[2].partition("=")
    if not column.strip() or not equals:
        raise InputError(f"{match[1]}: filter {match[2]!r}; wants FILE.csv:COLUMN=VALUE, several values joined by |")
    return Path(match[1]), Filter(column.strip(), tuple(value.strip() for value in values.split("|")))


def read_prompts(path: Path, rows: Filter | None = None) -> tuple[str, ...]:
    """The prompts of a file, in its order, each once, white space inside them made single spaces.

    Args:
      path: see `FORMATS`.
      rows: of a .csv or .tsv file, those that count; None: all.

    Raises:
      InputError: the file cannot be read, is not UTF-8, has the wrong form, or holds no prompt; it has no such column,
        or no row with such a value.
    """
    kind = path.suffix.lower()
    if kind not in ENDINGS:
        raise InputError(f"{path}: unknown kind of prompt file {path.suffix!r}; accepted: {FORMATS}")
    if rows is not None and kind not in _TABLES:
        raise InputError(f"{path}: a {kind} file has no columns to filter by; accepted: .csv, .tsv")
    text = _read_text(path)
    found = _prompt_column(path, _TABLES[kind](path, text), rows) if kind in _TABLES else _LISTS[kind](path, text)
    texts = (" ".join(text.split()) for text in found)
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


def _parse_csv(path: Path, text: str) -> list[list[str]]:
    reader = csv.reader(io.StringIO(text))
    try:
        return list(reader)
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num} is not CSV: {error}") from error


def _parse_tsv(path: Path, text: str) -> list[list[str]]:
    # TSV has no quoting, and PartiPrompts has a prompt that starts with a quoted word. Yet spreadsheets quote a
    # whole cell, doubling the quotes in it: that form alone is undone.
    def unquote(cell: str) -> str:
        return cell[1:-1].replace('""', '"') if re.fullmatch(r'"(?:[^"]|"")*"', cell) else cell

    return [[unquote(cell) for cell in line.split("\t")] for line in text.split("\n")]


def _prompt_column(path: Path, table: list[list[str]], rows: Filter | None) -> list[str]:
    header, body = (table[0], table[1:]) if table else ([], [])
    names = [cell.strip().lower() for cell in header]
    column = next((i for i, name in enumerate(names) if name in ("prompt", "prompts")), None)
    if column is None:
        found = _some(header) or "nothing"
        raise InputError(f"{path}: the first line names no column 'prompt' or 'prompts' (any case); found: {found}")
    body = [row for row in body if len(row) > column]
    return [row[column] for row in (_filtered(path, header, body, rows) if rows else body)]


def _filtered(path: Path, header: list[str], body: list[list[str]], rows: Filter) -> list[list[str]]:
    names = [cell.strip().lower() for cell in header]
    if rows.column.lower() not in names:
        raise InputError(f"{path}: no column {rows.column!r}; found: {_some(header)}")
    at = names.index(rows.column.lower())
    cells = [row[at].strip() if len(row) > at else "" for row in body]
    for value in rows.values:
        if value not in cells:
            found = _some(dict.fromkeys(cells)) or "nothing"
            raise InputError(f"{path}: no row has {rows.column}={value!r}; found: {found}")
    return [row for row, cell in zip(body, cells, strict=True) if cell in rows.values]


def _some(values: Iterable[str], most: int = 10, width: int = 40) -> str:
    """The values for an error line: the first few, each cut."""
    values = list(values)
    shown = [repr(value if len(value) <= width else value[: width - 3] + "...") for value in values[:most]]
    return ", ".join([*shown, f"and {len(values) - most} more"] if len(values) > most else shown)


def _parse_json(path: Path, text: str) -> list[str]:
    try:
        data = parse_json(text)
    except ValueError as error:
        where = f"line {error.lineno} is not JSON: {error.msg}" if isinstance(error, JSONDecodeError) else f"{error}"
        raise InputError(f"{path}: {where}") from error
    if not isinstance(data, list):
        raise InputError(f"{path}: holds JSON of type {type(data).__name__}; accepted: a list of strings")
    for i, item in enumerate(data):
        if not isinstance(item, str):
            raise InputError(f"{path}: item {i} is of type {type(item).__name__}; accepted: a list of strings")
    return data


_TABLES = {".csv": _parse_csv, ".tsv": _parse_tsv}
_LISTS = {".txt": _parse_txt, ".json": _parse_json}
