"""A page that is one file: its pictures, style and script are in it, and it fetches nothing.

    save_page(Path("sweep.html"), "DDPO over three seeds", [
        Section("Reward", [
            "What came out, in a paragraph or several, with `code` and **emphasis**.",
            Table(("arm", "reward"), [("baseline", "18.8"), ("diffexp", "18.3")], "at the end"),
            drawing(figure, "mean reward of both arms", "reward over queries"),  # of matplotlib
            Picture(png, "twelve pictures of each arm"),  # bytes: PNG, JPEG, WebP, SVG
        ]),
    ])

A part of a section is a string or one of the classes here; another kind needs a method `html`. All text is escaped.
"""

import base64
import hashlib
import html
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple, Protocol, runtime_checkable

from PIL import Image

from diffexp_jax.formats.files import replaced

_HERE = Path(__file__).parent
# What matplotlib draws with, and the page's name for it, which is another colour where the page is dark.
_THEME = {"#000000": "var(--ink)", "#ffffff": "var(--paper)", "#b0b0b0": "var(--line)"}
SERIES = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")  # matplotlib's colours, in its order
_THEME |= {colour: f"var(--series-{n})" for n, colour in enumerate(SERIES, 1)}
_LARGEST = 1.4  # pixels that a point of a drawing may be wide


@runtime_checkable
class Part(Protocol):
    """What a section is made of."""

    def html(self) -> str: ...


class Section(NamedTuple):
    """A chapter of a page."""

    title: str
    parts: Sequence[str | Part]


class Table(NamedTuple):
    """Rows of text; columns of numbers are set to the right.

    `stacked`: on a phone the first cell of a row, which may be long, stands above the others.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    stacked: bool = False

    def html(self) -> str:
        kinds = [' class="number"' if all(map(_is_number, column)) else "" for column in zip(*self.rows, strict=True)]
        kinds = kinds or [""] * len(self.header)
        caption = f"<caption>{inline(self.caption)}</caption>" if self.caption else ""
        head = _cells("th", self.header, kinds).replace("_", "_<wbr>")  # long names of runs break there
        body = "".join(f"<tr>{_cells('td', row, kinds)}</tr>\n" for row in self.rows)
        return (
            f'<div class="table{" stacked" if self.stacked else ""}"><table>{caption}\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
        )


class Picture(NamedTuple):
    """A picture as it is in a file: PNG, JPEG, WebP or SVG."""

    content: bytes
    alt: str
    caption: str = ""

    def html(self) -> str:
        return _figure(image(self.content, self.alt), self.caption, "picture")


class Drawing(NamedTuple):
    """An SVG in the page's own colours, see `drawing`."""

    svg: str
    caption: str = ""

    def html(self) -> str:
        return _figure(self.svg, self.caption, "drawing")


class Row(NamedTuple):
    """Parts side by side, as many as there is room for."""

    parts: Sequence[str | Part]

    def html(self) -> str:
        return f'<div class="row">{"".join(map(html_of, self.parts))}</div>'


class Stack(NamedTuple):
    """Parts below each other, as one part of a row."""

    parts: Sequence[str | Part]

    def html(self) -> str:
        return f"<div>{''.join(map(html_of, self.parts))}</div>"


class Folded(NamedTuple):
    """Parts that are there to be opened."""

    title: str
    parts: Sequence[str | Part]

    def html(self) -> str:
        return f"<details><summary>{inline(self.title)}</summary>{''.join(map(html_of, self.parts))}</details>"


class Facts(NamedTuple):
    """Names and values, beside each other."""

    items: Sequence[tuple[str, str]]

    def html(self) -> str:
        items = (f"<div><dt>{inline(name)}</dt><dd>{inline(value)}</dd></div>" for name, value in self.items)
        return f'<dl class="facts">{"".join(items)}</dl>'


class Legend(NamedTuple):
    """What lines mean: (name, colour of matplotlib, dash pattern of matplotlib)."""

    items: Sequence[tuple[str, str, str]]

    def html(self) -> str:
        return f'<ul class="legend">{"".join(_legend_item(*item) for item in self.items)}</ul>'


# ------------------------------------------------------------------------------------------------------------- the page


def save_page(path: Path, title: str, sections: Sequence[Section], *, lead: Sequence[str | Part] = ()) -> None:
    """Writes the page, all or nothing; `lead` comes before the first section.

    Raises:
      OSError: it cannot be written; what was there is untouched.
    """
    text = page(title, sections, lead=lead)
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def page(title: str, sections: Sequence[Section], *, lead: Sequence[str | Part] = ()) -> str:
    """The page's HTML."""
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    links = (f'<a href="#section-{n}">{inline(section.title)}</a>' for n, section in enumerate(sections, 1))
    chapters = (
        f'<section id="section-{n}">\n<h2>{inline(section.title)}</h2>\n'
        + "\n".join(map(html_of, section.parts))
        + "\n</section>"
        for n, section in enumerate(sections, 1)
    )
    return Template((_HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=escaped(title),
        lead="\n".join(map(html_of, lead)),
        links="\n".join(links),
        sections="\n".join(chapters),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),  # no other script may run
    )


# ---------------------------------------------------------------------------------------------------------------- parts


def html_of(part: str | Part) -> str:
    """A string is a paragraph."""
    return f"<p>{inline(part)}</p>" if isinstance(part, str) else part.html()


def escaped(text: str) -> str:
    """Text as it may stand in HTML, also between quotes."""
    return html.escape(text, quote=True)


def inline(text: str) -> str:
    """Text with `code` and **emphasis**."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def data_uri(content: bytes) -> str:
    """The bytes of a picture as an address that holds them.

    Raises:
      ValueError: they are none of PNG, JPEG, WebP, SVG.
    """
    return f"data:{_media_type(content)};base64,{base64.b64encode(content).decode()}"


def image(content: bytes, alt: str, **attributes: str) -> str:
    """An <img> that holds its picture, with its size where the picture has one."""
    size = {}
    if _media_type(content) != "image/svg+xml":
        with Image.open(io.BytesIO(content)) as picture:
            size = {"width": str(picture.width), "height": str(picture.height)}
    others = "".join(f' {name}="{escaped(value)}"' for name, value in (size | attributes).items())
    return f'<img src="{data_uri(content)}" alt="{escaped(alt)}"{others}>'


def drawing(figure: Any, alt: str, caption: str = "") -> Drawing:
    """A matplotlib figure as SVG: black, white and matplotlib's own colours become the page's, light or dark.

    Args:
      figure: a matplotlib.figure.Figure (one of pyplot stays open: close it). About 4.6 inches wide can be read on a
        phone: several axes are better several drawings in a `Row`.
      alt: what it shows, for those who cannot see it.
    """
    import matplotlib

    buffer = io.StringIO()
    options = {"svg.fonttype": "none", "svg.hashsalt": plain(alt)}
    with matplotlib.rc_context(options), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the page's font has it
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    head, _, body = buffer.getvalue().partition("<svg ")[2].partition(">")
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head).groups()
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r' font-family: [^;"]*;?', "", re.sub(r'<g id="[^"]*">', "<g>", body))  # no id twice on a page
    body = re.sub(r"#[0-9a-f]{6}\b", lambda colour: _THEME.get(colour[0], colour[0]), re.sub(r"\s*\n\s*", "\n", body))
    size = f'viewBox="0 0 {width} {height}" style="max-width:{float(width) * _LARGEST:.0f}px"'
    return Drawing(f'<svg {size} role="img" aria-label="{escaped(alt)}">{body.strip()}', caption)


def plain(text: str) -> str:
    """Text as matplotlib draws it as it is: a `$` begins no formula, a label may begin with `_`, all can be encoded."""
    text = text.encode("utf-8", "replace").decode("utf-8").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _media_type(content: bytes) -> str:
    begins = {b"\x89PNG": "image/png", b"\xff\xd8": "image/jpeg", b"<svg": "image/svg+xml", b"<?xml": "image/svg+xml"}
    for begin, kind in begins.items():
        if content.startswith(begin):
            return kind
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    raise ValueError(f"wants PNG, JPEG, WebP or SVG, found bytes that begin with {content[:8]!r}")


def _figure(content: str, caption: str, kind: str) -> str:
    caption = f"<figcaption>{inline(caption)}</figcaption>" if caption else ""
    return f'<figure class="{kind}">{content}{caption}</figure>'


def _is_number(text: str) -> bool:
    return bool(re.match(r"[-+−±]?\.?\d|-$", text))


def _cells(tag: str, texts: Sequence[str], kinds: Sequence[str]) -> str:
    return "".join(f"<{tag}{kind}>{inline(text)}</{tag}>" for text, kind in zip(texts, kinds, strict=True))


def _legend_item(name: str, colour: str, dash: str) -> str:
    colour = _THEME.get({"black": "#000000"}.get(colour, colour), colour)
    pattern = {"-": "", "--": "7 3", ":": "2 3", "-.": "7 3 2 3"}[dash]
    line = f'<line x1="0" y1="5" x2="28" y2="5" style="stroke:{escaped(colour)}" stroke-dasharray="{pattern}"/>'
    return f'<li><svg viewBox="0 0 28 10" aria-hidden="true">{line}</svg>{inline(name)}</li>'
