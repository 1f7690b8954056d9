"""Grids of captioned pictures as one PNG, which says in itself where each picture is and what it is of."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from diffexp_jax.formats.files import replaced
from diffexp_jax.formats.json_text import parse_json

_CELL = 128  # pixels: smaller pictures are enlarged by a whole factor
_TEXT = 44  # pixels of the caption strip: three lines
_GAP = 4  # pixels around a picture
_CAPTION = 2000  # characters of a caption that a grid's file holds
_KEY = "diffexp_jax grid"  # of the PNG's text that `read_grid` reads
GRID = "grid.png"  # the name of a folder's grid
COMPARISONS = ("base", "low", "schedule", "weights", "both")  # pictures that are there to compare: NNNN-base.png, ...


class Grid(NamedTuple):
    """The pictures of a grid, as they were before they were enlarged, and what each is of."""

    images: list[UInt8[np.ndarray, "H W 3"]]
    captions: tuple[str, ...]


def draw_grid(
    images: UInt8[np.ndarray, "N H W 3"], captions: Sequence[str], *, columns: int | None = None
) -> Image.Image:
    """Images with their captions as one picture, row by row; None: as many columns as rows. Long captions are cut.

    Its `info` says where each image is, for a PNG that `read_grid` reads.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    scale = max(1, -(-_CELL // images.shape[1]))
    height, width = images.shape[1] * scale, images.shape[2] * scale
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * (height + _TEXT) + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    captions = [text if len(text) <= _CAPTION else f"{text[:_CAPTION]}..." for text in captions]
    for n, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = _corner(n, columns, width, height)
        pixels = Image.fromarray(np.asarray(image)).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(pixels, (x, y))
        text = _wrapped(draw, caption, font, width)
        draw.multiline_text((x, y + height + 1), text, fill="black", font=font, spacing=1)
    sheet.info[_KEY] = json.dumps({"columns": columns, "scale": scale, "size": [height, width], "captions": captions})
    return sheet


def save_grid(
    path: Path, images: UInt8[np.ndarray, "N H W 3"], captions: Sequence[str], *, columns: int | None = None
) -> None:
    """Writes images as a captioned PNG grid, row by row; its folder may be new. Captions of any length are cut."""
    sheet, about = draw_grid(images, captions, columns=columns), PngInfo()
    about.add_itxt(_KEY, sheet.info[_KEY])
    path.parent.mkdir(exist_ok=True)
    with replaced(path) as partial:
        sheet.save(partial, format="png", pnginfo=about)


def read_grid(path: Path) -> Grid:
    """The pictures of a grid that `save_grid` wrote; of one that does not say where they are, the whole as one.

    Raises:
      OSError: the file cannot be read as a picture.
    """
    try:
        with Image.open(path, formats=("PNG",)) as sheet:
            pixels = np.asarray(sheet.convert("RGB"))
            about = parse_json(sheet.text.get(_KEY, "null"))
        if about is None:
            return Grid([pixels], ("all pictures",))
        height, width, scale, columns, captions = _layout(about)
        corners = [_corner(n, columns, width, height) for n in range(len(captions))]
        if any(y + height > pixels.shape[0] or x + width > pixels.shape[1] for x, y in corners):
            raise ValueError("what it says of its pictures does not fit it")
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow says of broken files
        raise OSError(f"{path}: {error}") from None
    return Grid([pixels[y : y + height : scale, x : x + width : scale] for x, y in corners], captions)


def _layout(about: Any) -> tuple[int, int, int, int, tuple[str, ...]]:
    """(height, width, scale, columns, captions) of what a grid says. Raises ValueError where that is no grid."""
    match about:
        case {"size": [int(height), int(width)], "scale": int(scale), "columns": int(columns), "captions": [*captions]}:
            whole = min(height, width, scale, columns) >= 1 and not (height % scale or width % scale)
            if captions and whole and all(isinstance(x, str) for x in captions):
                return height, width, scale, columns, tuple(captions)
    raise ValueError("what it says of its pictures is not what a grid says")


def _corner(n: int, columns: int, width: int, height: int) -> tuple[int, int]:
    """The n-th picture's upper left corner, (x, y)."""
    return _GAP + n % columns * (width + _GAP), _GAP + n // columns * (height + _TEXT)


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    """At most three lines that fit, the last cut with an ellipsis; what follows them is not looked at."""
    lines = [""]
    for word in text.split():
        if len(lines) > 3:
            break
        word = word[:width]  # of which no more can be seen
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines if len(lines) <= 3 else [*lines[:2], lines[2] + " ..."])
