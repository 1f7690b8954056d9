"""Images in [0,1] -> what a CLIP tower reads, differentiably."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffexp_jax import InputError

# OpenAI's statistics of red, green and blue, which every published CLIP kept.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_SLACK = 1e-3  # how far outside [0,1] rounding may bring a pixel


def normalise(images: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Pixels in [0,1] to zero mean and unit deviation, by CLIP's statistics."""
    return (images - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)


def resize_and_crop(images: Float[Array, "B H W 3"], size: int) -> Float[Array, "B size size 3"]:
    """The shortest side to `size` pixels (bicubic, antialiased), then the square in the centre.

    Sizes are rounded as CLIPImageProcessor does it. Values may overshoot [0,1] a little, as bicubic ones do
    that are not rounded to bytes. Images that have the size already are left alone.
    """
    b, h, w, c = images.shape
    if h != w or h != size:
        shortest = min(h, w)
        h, w = int(size * h / shortest), int(size * w / shortest)
        images = jax.image.resize(images, (b, h, w, c), "bicubic", antialias=True)
    top, left = (h - size) // 2, (w - size) // 2
    return images[:, top : top + size, left : left + size]


def clip_pixels(images: Float[Array, "B H W 3"], size: int) -> Float[Array, "B size size 3"]:
    """Both of the above: the pixels that `CLIP.embed_image` wants."""
    return normalise(resize_and_crop(images, size))


def check_images(images: np.ndarray, where: str) -> None:
    """Checks images from outside, on the host, before they are scored.

    Args:
      images: whatever was read.
      where: the file or folder that they come from, for the error.

    Raises:
      InputError: not a floating-point array [N,H,W,3] with every value in [0,1].
    """
    if images.ndim != 4 or images.shape[-1] != 3 or not np.issubdtype(images.dtype, np.floating):
        found = f"{images.dtype} {list(images.shape)}"
        raise InputError(f"{where}: wants images as floats [N,H,W,3] in [0,1], found {found}")
    low, high = (images.min(), images.max()) if images.size else (0.0, 1.0)
    if not (low >= -_SLACK and high <= 1 + _SLACK):  # also true of NaN
        raise InputError(f"{where}: wants pixels in [0,1], found {low:.4g} to {high:.4g}")
