"""Picture files: which are opened, and the bytes that rewards read of them."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diffexp_jax.errors import InputError, first_line

# Of Pillow's formats those of pictures alone: it would start another program for one, and read films and icons.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF")
MOST_PIXELS = 2**26  # 8192 x 8192: a quarter of a gigabyte while it is read

# What is said of pictures that are not plain 8-bit RGB, after "N pictures (NAMES) ".
NOTES = {
    "transparent": "are transparent: PickScore and CLIP read them on white, as transformers 5 does, all other rewards "
    "without the transparency, as their own code does",
    "frames": "have several frames: the first is read",
    "turned": "are to be shown turned (EXIF): they are read as stored, as the rewards' own code does",
    "sixteen": "are grey of 16 bits: 8 are read (the rewards' own code would read them as white)",
    "profile": "have a colour profile other than sRGB: it is not applied, as in the rewards' own code",
    "mode": "are not stored as RGB: Pillow converts them before they are resized, as transformers does (HPSv2's, "
    "ImageReward's and LAION's own code resizes them first)",
}


class Picture(NamedTuple):
    """What is read of a file."""

    pixels: UInt8[np.ndarray, "H W C"]  # RGB, or RGB and opacity where some of it is transparent
    notes: tuple[str, ...]  # keys of NOTES


def formats() -> tuple[str, ...]:
    """FORMATS, without those that this Pillow was built without."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def endings() -> tuple[str, ...]:
    """All endings of the formats' files, in lower case."""
    known = (*formats(), "MPO")  # which begins as a JPEG file does, and is opened as one
    return tuple(ending for ending, name in sorted(Image.registered_extensions().items()) if name in known)


def natural(path: Path) -> tuple:
    """A key to sort paths as people count: 1.png, 2.png, 10.png."""
    parts = re.split(r"([0-9]+)", str(path))
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts)), str(path)


def n_pixels(path: Path) -> int:
    """How many pixels a file's header says that it has.

    Raises:
      InputError: as `read_picture`.
    """
    with _opened(path) as image:
        return image.width * image.height


def read_picture(path: Path) -> Picture:
    """A picture as Pillow's convert("RGB") makes it, which the published scorers call; its first frame.

    Raises:
      InputError: it cannot be read, is of another format, has more than MOST_PIXELS pixels, or holds numbers whose
        white is not known.
    """
    with _opened(path) as image:
        notes = []
        with _explained(path):
            image.load()
        _check(path, image)
        if image.mode.startswith("I"):
            pixels = _of_sixteen_bits(path, image)
            notes.append("sixteen")
        elif image.mode != "LAB" and _has_opacity(image):  # LAB's A is a colour
            with _explained(path):
                pixels = np.asarray(image.convert("RGBA"))
        else:
            with _explained(path):
                pixels = np.asarray(image.convert("RGB"))
        if pixels.shape[2] == 4 and (pixels[..., 3] == 255).all():
            pixels = pixels[..., :3]
        if pixels.shape[2] == 4:
            notes.append("transparent")
        if image.mode not in ("RGB", "RGBA", "L", "LA") and "sixteen" not in notes:
            notes.append("mode")
        return Picture(pixels, (*notes, *_notes_of_file(image)))


def _opened(path: Path) -> Image.Image:
    """The file's header; its pixels are read later.

    Raises:
      InputError: as `read_picture`, of what the header says.
    """
    with _explained(path):
        image = Image.open(path, formats=formats())
    _check(path, image)
    return image


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Errors that Pillow raises, of many types, as InputError; its warnings are not shown."""
    with warnings.catch_warnings(action="ignore"):
        try:
            yield
        except Image.UnidentifiedImageError:
            raise InputError(f"{path}: not a readable picture; accepted: {', '.join(formats())}") from None
        except Exception as error:
            raise InputError(f"{path}: not a readable picture ({first_line(error)})") from None


def _check(path: Path, image: Image.Image) -> None:
    if image.width * image.height > MOST_PIXELS:
        raise InputError(f"{path}: has {image.width} x {image.height} pixels; wants at most {MOST_PIXELS:,}")
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # of PNG's 16 bits older Pillows make I
        raise InputError(f"{path}: holds 32-bit numbers, whose white is not known; wants 8 or 16 bits a channel")


def _has_opacity(image: Image.Image) -> bool:
    return "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None


def _of_sixteen_bits(path: Path, image: Image.Image) -> UInt8[np.ndarray, "H W C"]:
    """Grey of 16 bits (in a TIFF file perhaps 12 of them) by its upper 8, as Pillow reads colours of 16 bits."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(262) == 0:
        raise InputError(f"{path}: is grey of 16 bits where 0 is white; wants 0 to be black, or 8 bits")
    bits = min(max(int(np.ravel(tags.get(258, 16))[0]), 8), 16)
    values = np.asarray(image).astype(np.int64)
    grey = (values.clip(0, 2**bits - 1) >> bits - 8).astype(np.uint8)
    shown = image.info.get("transparency")  # the one value that is transparent
    opacity = [] if shown is None else [np.where(values == shown, 0, 255).astype(np.uint8)]
    return np.stack([grey, grey, grey, *opacity], axis=-1)


def _notes_of_file(image: Image.Image) -> list[str]:
    """What the file says besides its first frame's pixels; what cannot be read of that is left out."""
    notes = []
    with warnings.catch_warnings(action="ignore"):
        try:
            profile = image.info.get("icc_profile") or b""
            if profile and b"sRGB" not in profile.replace(b"\0", b""):  # its name is in ASCII or UTF-16
                notes.append("profile")
            if image.getexif().get(0x0112, 1) not in (0, 1):
                notes.append("turned")
            if getattr(image, "is_animated", False):
                notes.append("frames")
        except Exception:  # of many types: damaged metadata beside pixels that are whole
            pass
    return notes
