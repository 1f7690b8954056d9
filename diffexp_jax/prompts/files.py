"""Prompts from a user's file: text, CSV, TSV or JSON, such as DrawBench, PartiPrompts and HPDv2 are published in."""

import csv
import io
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple

from diffexp_jax.errors import InputError
from diffexp_jax.formats.json_text import parse_json
from diffexp_jax.formats.tokenizers import check_text

FORMATS = (
    ".txt (one prompt a line), .csv or .tsv (a column 'prompt' or 'prompts'; FILE.csv:COLUMN=VALUE|VALUE takes rows of "
    "it), .json (a list of strings, or of objects with 'prompt'), .jsonl (one of these a line)"
)
ENDINGS = (".txt", ".csv", ".tsv", ".json", ".jsonl")
MOST_BYTES = 2**28  # of a file of prompts; a million of usual length are a third of it
_LARGEST_CELL = 2**30  # characters of a table's cell; Python's own limit is 131,072

Row = tuple[int, list[str]]  # the number of the line that it begins on, its cells

_FILTERED = re.compile(r"(.+?\.(?:txt|csv|tsv|jsonl?)):(.*)", re.IGNORECASE)


class Prompt(str):
    """A prompt's text with what its file says beside it: other columns' cells by name, a json object's other keys."""

    metadata: Mapping[str, Any]

    def __new__(cls, text: str, metadata: Mapping[str, Any] = {}) -> "Prompt":
        prompt = super().__new__(cls, text)
        prompt.metadata = metadata
        return prompt


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
    """The prompts of a file in its order, as often as they are there, white space inside them made single spaces.

    Those of which the file says more are each a `Prompt`.

    Args:
      path: see `FORMATS`.
      rows: of a .csv or .tsv file, those that count; None: all.

    Raises:
      InputError: the file cannot be read, is too large or not UTF-8, has the wrong form, or holds no prompt; a table's
        row has more or fewer cells than its first line; it has no such column, or no row with such a value.
    """
    kind = path.suffix.lower()
    if kind not in ENDINGS:
        raise InputError(f"{path}: unknown kind of prompt file {path.suffix!r}; accepted: {FORMATS}")
    if rows is not None and kind not in _TABLES:
        raise InputError(f"{path}: a {kind} file has no columns to filter by; accepted: .csv, .tsv")
    text = read_text(path)
    if kind in _TABLES:
        found = _prompt_column(path, list(_TABLES[kind](path, text)), rows)
    else:
        found = _LISTS[kind](path, text)
    texts = tuple(text for text in map(_spaced, found) if text)
    if not texts:
        raise InputError(f"{path}: no prompts in the file; it needs at least one")
    return texts


def _spaced(prompt: str) -> str:
    text = " ".join(prompt.split())
    return Prompt(text, prompt.metadata) if isinstance(prompt, Prompt) else text


def read_named_prompts(path: Path) -> dict[str, str]:
    """{picture's name: prompt} of a .csv file of two columns or a .json object; the prompts exactly as written.

    Raises:
      InputError: the file cannot be read or has another form, or names a picture twice with different prompts.
    """
    text = read_text(path, line_ends=False)
    if path.suffix.lower() == ".json":
        table = _loads(path, text)
        if not isinstance(table, dict):
            raise InputError(f"{path}: holds JSON of type {type(table).__name__}; accepted: an object {{name: prompt}}")
        pairs = [(f"{name!r:.80}", name, prompt) for name, prompt in table.items() if isinstance(prompt, str)]
    else:
        pairs = []
        for line, row in _parse_csv(path, text):
            if len(row) != 2:
                raise InputError(
                    f"{path}: line {line}: {len(row)} cells; wants two columns, an image's name and its prompt (a "
                    "prompt that holds a comma is written in quotes)"
                )
            pairs.append((f"line {line}", *row))
    named: dict[str, str] = {}
    for where, name, prompt in pairs:
        if named.setdefault(name, check_text(prompt, f"{path}: {where}")) != prompt:
            raise InputError(f"{path}: {where}: another prompt for {name!r:.80}; wants one for each picture")
    return named


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, which may hold anything but a line's end; blank ones at the end do not count.

    Raises:
      InputError: the file cannot be read.
    """
    return read_text(path).rstrip("\n \t").split("\n")


def comma_phrases(text: str) -> tuple[str, ...]:
    """The phrases of a prompt that nothing more is known of: its parts between commas, without closing punctuation.

    "A red car, 3,000 km away." -> ("A red car", "3,000 km away")
    """
    parts = (part.strip(" .!?;:,") for part in re.split(r",\s", text))
    return tuple(part for part in parts if part) or (text,)


def read_text(path: Path, *, line_ends: bool = True) -> str:
    """A file's text; each line's end is made a newline, where that is asked for by `line_ends`.

    Raises:
      InputError: it cannot be read, is no file, is larger than MOST_BYTES, or is not UTF-8.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):  # a pipe would be waited for
            raise InputError(f"{path}: cannot read the prompt file: not a regular file")
        if found.st_size > MOST_BYTES:
            raise InputError(f"{path}: {found.st_size / 2**20:,.0f} MB of prompts; wants at most {MOST_BYTES >> 20} MB")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the prompt file: {error.strerror}") from error
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line} (byte {error.start}) is not UTF-8; save the file as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n") if line_ends else text


def _parse_txt(path: Path, text: str) -> list[str]:
    return text.split("\n")  # not splitlines(): that also cuts at rarer characters, which a prompt may hold


def _parse_csv(path: Path, text: str) -> Iterator[Row]:
    """The rows that are not blank. Of a table of one column a line with commas that are not in quotes is one cell."""
    csv.field_size_limit(_LARGEST_CELL)
    lines, line, columns = list(io.StringIO(text, newline="")), 1, 0
    reader = csv.reader(lines, strict=True)  # else quotes that do not match are dropped
    try:
        for row in reader:
            whole = lines[line - 1].rstrip("\r\n")
            if columns == 1 and len(row) > 1 and not whole.startswith('"') and ',"' not in whole:
                row = [whole]
            if any(cell.strip() for cell in row):
                columns = columns or len(row)
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}: line {line} is not CSV: {error}; wants a cell with commas or quotes in quotes, and quotes in it "
            "doubled"
        ) from error


def _parse_tsv(path: Path, text: str) -> Iterator[Row]:
    # TSV has no quoting, and PartiPrompts has a prompt that starts with a quoted word. Yet spreadsheets quote a
    # whole cell, doubling the quotes in it: that form alone is undone.
    def unquote(cell: str) -> str:
        return cell[1:-1].replace('""', '"') if re.fullmatch(r'"(?:[^"]|"")*"', cell) else cell

    for line, content in enumerate(text.split("\n"), 1):
        if content.strip() or line == 1:
            yield line, [unquote(cell) for cell in content.split("\t")]


def _prompt_column(path: Path, table: list[Row], rows: Filter | None) -> list[str]:
    header, body = (table[0][1], table[1:]) if table else ([], [])
    columns = [i for i, cell in enumerate(header) if cell.strip().lower() in ("prompt", "prompts")]
    if not columns:
        found = _some(header) or "nothing"
        raise InputError(f"{path}: the first line names no column 'prompt' or 'prompts' (any case); found: {found}")
    if len(columns) > 1:
        raise InputError(f"{path}: the first line names the column of the prompts twice; found: {_some(header)}")
    for line, row in body:
        if len(row) != len(header):
            quotes = "; a cell that holds a comma is written in quotes" if path.suffix.lower() == ".csv" else ""
            raise InputError(
                f"{path}: line {line} is of {len(row)} cells, the first line of {len(header)}: {_some(header)}{quotes}"
            )
    cells = [row for _, row in body]
    at, names = columns[0], [cell.strip() for cell in header]
    chosen = _filtered(path, header, cells, rows) if rows else cells
    if len(header) == 1:
        return [row[at] for row in chosen]
    return [Prompt(row[at], {names[i]: row[i] for i in range(len(row)) if i != at}) for row in chosen]


def _filtered(path: Path, header: list[str], body: list[list[str]], rows: Filter) -> list[list[str]]:
    names = [cell.strip().lower() for cell in header]
    if rows.column.lower() not in names:
        raise InputError(f"{path}: no column {rows.column!r}; found: {_some(header)}")
    at = names.index(rows.column.lower())
    cells = [row[at].strip() for row in body]
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
    data = _loads(path, text)
    if not isinstance(data, list):
        raise InputError(f"{path}: holds JSON of type {type(data).__name__}; accepted: a list of strings")
    return [_json_prompt(f"{path}: item {i}", item) for i, item in enumerate(data)]


def _parse_jsonl(path: Path, text: str) -> list[str]:
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_json_prompt(f"{path}: line {i}", _loads(path, line, first=i)) for i, line in lines]


def _json_prompt(where: str, item: Any) -> str:
    """A string, or an object with "prompt" and what else belongs to it."""
    if isinstance(item, dict) and isinstance(item.get("prompt"), str):
        return Prompt(item["prompt"], {key: value for key, value in item.items() if key != "prompt"})
    if isinstance(item, dict):
        raise InputError(f"{where} is an object without 'prompt', a string; found: {_some(item) or 'nothing'}")
    if not isinstance(item, str):
        kind = type(item).__name__
        raise InputError(f"{where} is of type {kind}; accepted: a list of strings, or of objects with 'prompt'")
    return item


def _loads(path: Path, text: str, *, first: int = 1) -> Any:
    """The text's content; `first` is the number of its first line in the file."""
    try:
        return parse_json(text)
    except ValueError as error:
        where = (
            f"line {error.lineno + first - 1} is not JSON: {error.msg}"
            if isinstance(error, JSONDecodeError)
            else f"{error}"
        )
        raise InputError(f"{path}: {where}") from error


_TABLES = {".csv": _parse_csv, ".tsv": _parse_tsv}
_LISTS = {".txt": _parse_txt, ".json": _parse_json, ".jsonl": _parse_jsonl}
