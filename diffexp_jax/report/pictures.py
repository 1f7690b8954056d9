"""The image grids of a run as pictures that a page can hold, and the gallery with a slider over them."""

import io
import json
from base64 import b64encode
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diffexp_jax.report.grids import read_grid
from diffexp_jax.report.page import escaped, image

MOST_FRAMES = 20  # grids that a page holds
MOST_PLACES = 24  # pictures of a grid that it holds
_SIDE = 256  # pixels: larger pictures are made smaller
_WHOLE = 1024  # pixels: the same, where a picture is a whole grid


class Frame(NamedTuple):
    """The pictures of a grid, as WebP."""

    iteration: int
    captions: tuple[str, ...]
    images: tuple[bytes, ...]


class Frames(NamedTuple):
    """What a page holds of a run's grids: all of the same prompts, first to last, and what was left out, in words."""

    frames: list[Frame]
    notes: list[str]


def read_frames(folder: Path) -> Frames:
    """The grids of a folder whose names are iterations; none where it is missing."""
    paths = sorted((path for path in folder.glob("*.png") if path.stem.isdecimal()), key=lambda path: int(path.stem))
    kept, found, unreadable = _thinned(paths, MOST_FRAMES), {}, []
    for path in kept:
        try:
            found[int(path.stem)] = _encoded(path, path.stat().st_mtime_ns)
        except OSError:
            unreadable.append(path.name)
    if not found:
        return Frames([], _left_out(unreadable, others=0))
    last = found[max(found)]
    frames = [Frame(i, grid.captions, grid.images) for i, grid in found.items() if grid.captions == last.captions]
    notes = [f"{len(kept)} of {len(paths)} grids are here, evenly spaced."] if len(kept) < len(paths) else []
    if len(last.images) < last.count:
        notes.append(f"Of each grid's {last.count} pictures {len(last.images)} are here, evenly spaced.")
    if last.shown < last.side:
        notes.append(f"Pictures are made smaller, from {last.side} to {last.shown} pixels.")
    return Frames(frames, notes + _left_out(unreadable, others=len(found) - len(frames)))


def _left_out(unreadable: Sequence[str], *, others: int) -> list[str]:
    notes = [f"Left out, as they cannot be read: {', '.join(unreadable)}."] if unreadable else []
    return notes + ([f"Left out, as they are of other prompts than the last grid: {others}."] if others else [])


def _thinned(paths: Sequence[Path], most: int) -> list[Path]:
    """Every, every second, every fourth ... and the last: a run that continues keeps most of what it has."""
    stride = 1
    while len(paths[::stride]) >= most < len(paths):
        stride *= 2
    kept = list(paths[::stride])
    return kept + [path for path in paths[-1:] if path not in kept]


class Encoded(NamedTuple):
    """What a page takes of a grid."""

    captions: tuple[str, ...]
    images: tuple[bytes, ...]  # WebP
    count: int  # of the grid's pictures
    side: int  # pixels of a picture's longer side, in the grid
    shown: int  # and here


@lru_cache(maxsize=4 * MOST_FRAMES)
def _encoded(path: Path, changed: int) -> Encoded:
    """Captions and pictures of a grid, of a few evenly spaced ones where there are many.

    `changed` is when the file last did: as a run goes, only the new grids are encoded.
    """
    grid = read_grid(path)
    n, side = len(grid.captions), max(grid.images[0].shape[:2])
    rows = np.unique(np.linspace(0, n - 1, min(n, MOST_PLACES)).round().astype(int))
    shown = min(side, _WHOLE if n == 1 else _SIDE)
    images = tuple(_as_webp(grid.images[i], shown) for i in rows)
    return Encoded(tuple(grid.captions[i] for i in rows), images, n, side, shown)


def _as_webp(pixels: UInt8[np.ndarray, "H W 3"], side: int) -> bytes:
    picture, buffer = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    picture.save(buffer, "webp", quality=90 if max(picture.size) <= 128 else 80)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------------------- gallery


class Column(NamedTuple):
    """One picture of every card."""

    name: str
    frames: Sequence[Frame]  # one: it stays whatever the slider says


class Gallery(NamedTuple):
    """A card for each caption, a picture for each column; the slider moves the columns of several frames together."""

    captions: Sequence[str]
    columns: Sequence[Column]

    def html(self) -> str:
        positions = sorted({frame.iteration for column in self.columns for frame in column.frames})
        labels = [label_of(iteration) for iteration in positions]
        cards = "\n".join(self._card(place, caption, labels[-1]) for place, caption in enumerate(self.captions))
        width = f"{(7 if len(self.captions) > 1 else 26) * len(self.columns) + 0.5:g}rem"  # at least, of a card
        slider = _slider(labels) + self._data(positions, labels) if len(positions) > 1 else ""
        kind = "gallery" if slider else "still"
        return f'<div class="{kind}" style="--card:{width}">{slider}\n<div class="cards">\n{cards}\n</div></div>'

    def _card(self, place: int, caption: str, last: str) -> str:
        shots = []
        for n, column in enumerate(self.columns):
            moves = len(column.frames) > 1
            what = f"{caption}: {column.name}"
            attributes = {"data-column": str(n), "data-place": str(place), "data-what": what} if moves else {}
            shown = image(column.frames[-1].images[place], f"{what}, {last}" if moves else what, **attributes)
            shots.append(f"<div>{shown}<span>{escaped(column.name)}</span></div>")
        return (
            f'<figure class="card"><div class="shots">{"".join(shots)}</div>'
            f"<figcaption>{escaped(caption)}</figcaption></figure>"
        )

    def _data(self, positions: Sequence[int], labels: Sequence[str]) -> str:
        """All frames for the script; at a position a column shows its newest frame of then."""
        columns = {}
        for n, column in enumerate(self.columns):
            if len(column.frames) > 1:
                frames = [[b64encode(content).decode() for content in frame.images] for frame in column.frames]
                came = [frame.iteration for frame in column.frames]
                columns[n] = {"frames": frames, "at": [max(0, sum(i <= p for i in came) - 1) for p in positions]}
        content = json.dumps({"labels": labels, "columns": columns}, separators=(",", ":"))
        return f'<script type="application/json">{content}</script>'


def label_of(iteration: int) -> str:
    """ "after 30 iterations"."""
    return f"after {iteration} iteration{'' if iteration == 1 else 's'}" if iteration else "before"


def _slider(labels: Sequence[str]) -> str:
    last = len(labels) - 1
    return (
        '<div class="slider" hidden><label><span>Pictures</span>'
        f'<input type="range" min="0" max="{last}" value="{last}" step="1" aria-valuetext="{labels[-1]}"></label>'
        f"<output>{labels[-1]}</output></div>"
    )
