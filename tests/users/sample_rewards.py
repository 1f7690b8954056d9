"""Rewards of a user's, named by sample_rewards:FUNCTION in the tests."""

import itertools
import os
import time

import jax.numpy as jnp
import numpy as np

from diffexp_jax.rewards.preprocess import as_floats
from diffexp_jax.rewards.reward import of_pixels

SLEEP = 30.0  # seconds: longer than any timeout of the tests


def brightness(images):
    """For jax: [B,H,W,3] in [0,1]."""
    return images.mean((1, 2, 3))


def corner(images):
    """For jax: one number of an image, which differs much between images."""
    return images[:, 0, 0, 0]


def brightness_of_bytes(images, prompts):
    """For python: bytes [B,H,W,3]; in percent, 0 for grey."""
    return 100.0 * (images.mean((1, 2, 3)) / 255 - 0.5)


def undefined(images):
    """For jax: not a number for any image, though it has a gradient."""
    return images.mean((1, 2, 3)) * jnp.nan


FACTOR = [1.0]


def scaled_brightness(images):
    """For jax; the factor is part of the program."""
    return FACTOR[0] * images.mean((1, 2, 3))


def bright_and_long(images, prompts):
    """For python: what `bright_and_long_jax` says."""
    assert images.dtype == np.uint8 and images.shape[1:] == (16, 16, 3) and len(images) == len(prompts)
    return [image.mean() / 255 + 0.01 * len(prompt) for image, prompt in zip(images, prompts, strict=True)]


bright_and_long_jax = of_pixels(
    {"factor": jnp.float32(0.01)},
    tokenize=lambda texts: np.array([[len(text)] for text in texts], np.int32),
    pixels=lambda images: images,
    prepare=as_floats,
    score_prepared=lambda params, images, n: (images.mean((1, 2, 3)) + params["factor"] * n[:, 0], {}),
)


def one_number(images):
    return images.mean()


def columns(images, prompts):
    return np.ones((len(images), 1))


def too_few(images, prompts):
    return np.ones(len(images) - 1)


def words(images, prompts):
    return list(prompts)


def not_finite(images, prompts):
    return np.where(np.arange(len(images)) == 1, np.nan, 1.0)


def raises(images, prompts):
    raise KeyError("no such\nserver")


def times_out(images, prompts):
    raise TimeoutError("the server says no")


def hangs(images, prompts):
    time.sleep(SLEEP)
    return np.ones(len(images))


CALLS = itertools.count(1)
FAILS_AT = [0]  # the call that fails


def fails_once(images, prompts):
    if next(CALLS) == FAILS_AT[0]:
        raise ConnectionError("the server has gone")
    return bright_and_long(images, prompts)


NUMBER = 3.0  # not a function


def fails_on_a_host(images, prompts):
    """Once, in call FAILING_CALL of the host FAILING_HOST, both of the environment."""
    this = os.environ.get("FAILING_HOST"), int(os.environ.get("FAILING_CALL", 0))
    if this == (os.environ.get("JAX_PROCESS_ID"), next(CALLS)):
        raise ConnectionError("the server has gone")
    return bright_and_long(images, prompts)
