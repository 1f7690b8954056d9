"""A run's image grids as one picture that moves: the same prompts from the same noise, iteration after iteration."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffexp_jax.errors import InputError
from diffexp_jax.formats.files import replaced
from diffexp_jax.report.grids import draw_grid
from diffexp_jax.report.pictures import Frame, label_of, read_frames

FORMATS = {".webp": "webp", ".gif": "gif"}
COLUMNS = 6
_HEAD, _BAR = 30, 4  # pixels: the strip above the pictures, and the bar in it that shows how far the run is
_BLUE, _GREY = (26, 95, 180), (226, 230, 235)
_USUAL, _FIRST, _LAST = 250, 1200, 3000  # milliseconds that a frame is shown


def save_animation(workdir: Path, out: Path) -> None:
    """Writes the pictures of a run's grids as an animation that repeats: a WebP or a GIF, as the file's name ends.

    Raises:
      InputError: the name ends otherwise, or the run has no two grids of the same prompts.
      OSError: it cannot be written.
    """
    if out.suffix.lower() not in FORMATS:
        raise InputError(f"--animation {out}: wants a name that ends with {' or '.join(FORMATS)}")
    frames = read_frames(workdir / "images").frames
    if len(frames) < 2:
        raise InputError(f"{workdir / 'images'}: wants two image grids or more (log.images_every); has {len(frames)}")
    sheets = [drawn(frame, of=frames[-1].iteration) for frame in frames]
    durations = [_FIRST, *[_USUAL] * (len(frames) - 2), _LAST]
    with replaced(out) as partial:
        options = {"append_images": sheets[1:], "save_all": True, "duration": durations, "loop": 0}
        sheets[0].save(partial, FORMATS[out.suffix.lower()], quality=80, method=6, **options)


def drawn(frame: Frame, *, of: int) -> Image.Image:
    """A grid's pictures with their captions, below a line that says which of the run's iterations they are of."""
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in frame.images])
    grid = draw_grid(pictures, frame.captions, columns=min(COLUMNS, len(pictures)))
    sheet = Image.new("RGB", (grid.width, grid.height + _HEAD), "white")
    sheet.paste(grid, (0, _HEAD))
    _draw_head(ImageDraw.Draw(sheet), frame.iteration, of, grid.width)
    return sheet


def _draw_head(draw: ImageDraw.ImageDraw, iteration: int, of: int, width: int) -> None:
    draw.text((_BAR, _BAR), label_of(iteration), fill="black", font=ImageFont.load_default(14))
    top, whole = _HEAD - 2 * _BAR, width - 2 * _BAR
    for colour, length in ((_GREY, whole), (_BLUE, whole * iteration // of)):
        if length:
            draw.rectangle((_BAR, top, _BAR + length - 1, top + _BAR - 1), fill=colour)
