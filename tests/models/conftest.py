"""What the tests of networks share."""

import jax
import numpy as np
import pytest

from diffexp_jax.formats import convert
from tests.support.lora_unet import CONTEXT, T, X, unet


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    shapes = convert.abstract_params(unet, X, T, CONTEXT)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32) / 5, shapes)
