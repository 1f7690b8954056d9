"""What pictures say without a reward: signs of over-optimisation. Plain numpy."""

import numpy as np
from jaxtyping import Float, UInt8

_LUMA = (0.2126, 0.7152, 0.0722)  # Rec. 709: the share of red, green and blue
_NEAR = 16  # of 255, in every channel: colours that count as the background's
_BIN = 32  # of 255: border colours are counted in cubes of this side


def luminance(images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N"]:
    """Mean luma (Rec. 709) of each image, 0 black to 1 white."""
    return (images @ np.array(_LUMA) / 255).mean((1, 2))


def saturation(images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N"]:
    """Mean saturation of each image, (max - min) / max of a pixel's channels: 0 grey to 1."""
    highest, lowest = images.max(-1).astype(float), images.min(-1).astype(float)
    return ((highest - lowest) / np.maximum(highest, 1.0)).mean((1, 2))


def background_share(images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N"]:
    """The share of each image's pixels that have the background's colour, within 16 of 255 in every channel.

    That colour is the mean of the border's pixels in the fullest of 8 x 8 x 8 cubes of colours.
    """
    return np.array([_one_background_share(image) for image in images])


def _one_background_share(image: UInt8[np.ndarray, "H W 3"]) -> float:
    border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]]).astype(int)
    cubes, index = np.unique(border // _BIN, axis=0, return_inverse=True)
    fullest = np.bincount(index.ravel(), minlength=len(cubes)).argmax()
    colour = border[index.ravel() == fullest].mean(0)
    return float((np.abs(image - colour).max(-1) <= _NEAR).mean())
