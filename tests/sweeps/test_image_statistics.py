"""Signs of over-optimisation, on pictures whose numbers are known."""

import numpy as np
import pytest

from diffexp_jax.sweeps import image_statistics as statistics


def plain(*colour) -> np.ndarray:
    return np.full((1, 8, 8, 3), colour, np.uint8)


@pytest.mark.parametrize(
    "colour, luminance, saturation",
    [
        ((0, 0, 0), 0.0, 0.0),
        ((255, 255, 255), 1.0, 0.0),
        ((255, 0, 0), 0.2126, 1.0),
        ((0, 255, 0), 0.7152, 1.0),
        ((0, 0, 255), 0.0722, 1.0),
        ((200, 100, 150), (0.2126 * 200 + 0.7152 * 100 + 0.0722 * 150) / 255, 0.5),
    ],
)
def test_luminance_and_saturation(colour, luminance, saturation):
    assert statistics.luminance(plain(*colour)) == pytest.approx([luminance])
    assert statistics.saturation(plain(*colour)) == pytest.approx([saturation])


def test_a_mean_over_the_pixels_of_each_image():
    images = np.concatenate([plain(255, 0, 0), plain(0, 0, 0)])
    images[0, :, :4] = 255  # half white
    assert statistics.luminance(images) == pytest.approx([(1 + 0.2126) / 2, 0.0])
    assert statistics.saturation(images) == pytest.approx([0.5, 0.0])


def test_background_share():
    """A black square of 4 x 4 on pink of 8 x 8, with a blue edge, smaller than the pink one; noise is pink."""
    image = plain(250, 200, 210)
    image[0, 2:6, 2:6] = 0
    image[0, :, 0] = (0, 0, 255)
    image[0, 1, 1] = (240, 210, 215)
    image[0, 1, 2] = (220, 200, 210)  # 30 from it: another colour
    assert statistics.background_share(image) == pytest.approx([(64 - 16 - 8 - 1) / 64])
    assert statistics.background_share(plain(1, 2, 3)) == pytest.approx([1.0])
