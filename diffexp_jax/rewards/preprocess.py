"""Images -> what the reward models read, twice: differentiably on the device, and on the host as published.

The published way works on bytes: PIL resizes and rounds to 0..255 (only HPSv2 resizes after the change to floats).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from diffexp_jax.models.clip_config import CLIP_MEAN, CLIP_STD


class Statistics(NamedTuple):
    """Mean and deviation of red, green and blue in [0,1] that a network's pixels are normalised by."""

    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


CLIP = Statistics()


def normalise(images: Float[Array, "*B H W 3"], by: Statistics = CLIP) -> Float[Array, "*B H W 3"]:
    """Pixels in [0,1] to zero mean and unit deviation."""
    return (images - np.array(by.mean, np.float32)) / np.array(by.std, np.float32)


# ------------------------------------------------------------------------------------------------------------- geometry


def shortest_to(size: int, h: int, w: int) -> tuple[int, int]:
    """Height and width with the shortest side at `size`, the other cut to whole pixels, as everybody does it."""
    shortest = min(h, w)
    return int(size * h / shortest), int(size * w / shortest)


def longest_to(size: int, h: int, w: int) -> tuple[int, int]:
    """Height and width with the longest side at `size`, the other rounded (and at least 1), as open_clip does it."""
    scale = size / max(h, w)
    return max(round(h * scale), 1), max(round(w * scale), 1)


def floor_half(spare: int) -> int:
    """The first pixel of a centre crop that leaves out `spare` pixels, by transformers' rule."""
    return spare // 2


def round_half(spare: int) -> int:
    """The first pixel of a centre crop by torchvision's rule: a pixel from `floor_half` for 3, 7, 11, ..."""
    return round(spare / 2)


# --------------------------------------------------------------------------------------------------- on the device


def resize(images: Float[Array, "B H W 3"], h: int, w: int) -> Float[Array, "B h w 3"]:
    """Bicubic and antialiased; what has the size already is left alone.

    Values may overshoot [0,1] a little, as bicubic ones do that are not rounded to bytes.
    """
    if images.shape[1:3] == (h, w):
        return images
    return jax.image.resize(images, (images.shape[0], h, w, images.shape[3]), "bicubic", antialias=True)


def resize_and_crop(
    images: Float[Array, "B H W 3"], size: int, start: Callable[[int], int] = floor_half
) -> Float[Array, "B size size 3"]:
    """The shortest side to `size` pixels, then the square in the centre; `start` gives where it begins."""
    h, w = shortest_to(size, *images.shape[1:3])
    top, left = start(h - size), start(w - size)
    return resize(images, h, w)[:, top : top + size, left : left + size]


def resize_and_pad(images: Float[Array, "B H W 3"], size: int) -> Float[Array, "B size size 3"]:
    """The longest side to `size` pixels, then black around it to a square (the odd pixel below or at the right)."""
    h, w = longest_to(size, *images.shape[1:3])
    top, left = (size - h) // 2, (size - w) // 2
    return jnp.pad(resize(images, h, w), ((0, 0), (top, size - h - top), (left, size - w - left), (0, 0)))


def clip_pixels(
    images: Float[Array, "B H W 3"], size: int, start: Callable[[int], int] = floor_half, by: Statistics = CLIP
) -> Float[Array, "B size size 3"]:
    """Resized, cropped and normalised: the pixels that `CLIP.embed_image` wants."""
    return normalise(resize_and_crop(images, size, start), by)


# ----------------------------------------------------------------------------------------------------- on the host


def official_crop(
    image: UInt8[np.ndarray, "H W 3"], size: int, start: Callable[[int], int], by: Statistics = CLIP
) -> Float[np.ndarray, "size size 3"]:
    """`clip_pixels` as published: bicubic by PIL on bytes, which it rounds to."""
    h, w = shortest_to(size, *image.shape[:2])
    top, left = start(h - size), start(w - size)
    resized = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))
    return normalise(resized[top : top + size, left : left + size].astype(np.float32) / 255, by)


def official_pad(
    image: UInt8[np.ndarray, "H W 3"], size: int, by: Statistics = CLIP
) -> Float[np.ndarray, "size size 3"]:
    """`resize_and_pad`, normalised, as HPSv2 does it: bicubic on floats, here channel by channel by PIL."""
    h, w = longest_to(size, *image.shape[:2])
    top, left = (size - h) // 2, (size - w) // 2
    out = np.zeros((size, size, 3), np.float32)
    for c in range(3):
        channel = Image.fromarray(image[:, :, c].astype(np.float32) / 255)
        out[top : top + h, left : left + w, c] = np.asarray(channel.resize((w, h), Image.Resampling.BICUBIC))
    return normalise(out, by)


def as_floats(image: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W 3"]:
    """Bytes to [0,1], of a reward that has no published path of its own."""
    return image.astype(np.float32) / 255
