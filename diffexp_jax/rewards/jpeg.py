"""File size as JPEG: the rewards of DDPO (Black et al. 2024, section 5) that need no network."""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from diffexp_jax.rewards.reward import Builtin

QUALITY = 95


def incompressibility(images: UInt8[np.ndarray, "N H W 3"], prompts: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Kilobytes (1000 bytes) of each image as a JPEG of quality 95; prompts are ignored."""
    del prompts
    return np.array([_size(image) for image in images]) / 1000.0


def compressibility(images: UInt8[np.ndarray, "N H W 3"], prompts: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Minus the kilobytes."""
    return -incompressibility(images, prompts)


def _size(image: UInt8[np.ndarray, "H W 3"]) -> int:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=QUALITY)
    return file.tell()


BUILTINS = {
    "jpeg_compressibility": Builtin("minus the kilobytes of the picture as a JPEG", function=compressibility),
    "jpeg_incompressibility": Builtin("the kilobytes of the picture as a JPEG", function=incompressibility),
}
