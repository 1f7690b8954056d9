"""Parts of documents that are written by scripts, each between two lines that mark it."""

from collections.abc import Sequence
from pathlib import Path

from diffexp_jax.errors import InputError
from diffexp_jax.formats.files import write_whole
from diffexp_jax.report import Table


def markdown(table: Table) -> list[str]:
    """A table's lines of Markdown; none where it has no rows."""
    if not table.rows:
        return []
    return [f"| {' | '.join(row)} |" for row in (table.header, ["---"] * len(table.header), *table.rows)]


def markers(name: str, *, kind: str = "results") -> tuple[str, str]:
    """The lines around what is written of one model or experiment."""
    return f"<!-- {kind}: {name} -->", f"<!-- /{kind}: {name} -->"


def check(document: Path, pair: tuple[str, str]) -> None:
    """Raises InputError where `write_between` could not write: to be asked before long work."""
    if not document.is_file():
        raise InputError(f"{document}: the file is missing")
    between(document.read_text(encoding="utf-8"), pair, "", str(document))


def write_between(document: Path, pair: tuple[str, str], lines: Sequence[str]) -> None:
    """Writes the document with these lines between the two markers; raises as `between`."""
    write_whole(document, between(document.read_text(encoding="utf-8"), pair, "\n".join(lines), str(document)))


def between(text: str, pair: tuple[str, str], content: str, where: str) -> str:
    """The text with this content between the two markers.

    Raises:
      InputError: a marker is missing.
    """
    before, begin, rest = text.partition(pair[0])
    _, end, after = rest.partition(pair[1])
    if not begin or not end:
        raise InputError(f"{where}: wants the lines {pair[0]} and {pair[1]}")
    return f"{before}{begin}\n{content}\n{end}{after}"
