"""What a reward is."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, UInt8

Tokens = Any  # integers [B, ...], or a tree of them
Pixels = Any  # float arrays [B, ...], or a tree of them
Tokenize = Callable[[Sequence[str]], Tokens]
Scores = tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]


class Reward(NamedTuple):
    """How well images fit their prompts; `params` is an argument of the functions, never closed over.

    `tokenize` runs on the host: a prompt per image -> integers, all that is wanted of the texts.
    `score(params, images, tokens)` is pure and differentiable: images in [0,1] -> the reward in float32, and the parts
    that it is made of by their names ({} if it has none). Training and its curve use it.
    `prepare(image)` and `rate(params, pixels, tokens)` are the same on the published path, which reads bytes: on the
    host an image of any size -> what the networks read of it (stack these), then the networks. Evaluation reports it.
    A reward in plain Python has none of these three but `start(images, tokens)`, see `host.py`.
    """

    params: Any
    tokenize: Callable[[Sequence[str]], Tokens]
    score: Callable[[Any, Float[Array, "B H W 3"], Tokens], Scores] | None = None
    prepare: Callable[[UInt8[np.ndarray, "H W 3"]], Pixels] | None = None
    rate: Callable[[Any, Pixels, Tokens], Scores] | None = None
    start: Callable[..., Callable[[], Float[np.ndarray, " B"]]] | None = None


def of_pixels(
    params: Any,
    *,
    tokenize: Callable[[Sequence[str]], Tokens],
    pixels: Callable[[Float[Array, "B H W 3"]], Pixels],
    prepare: Callable[[UInt8[np.ndarray, "H W 3"]], Pixels],
    rate: Callable[[Any, Pixels, Tokens], Scores],
) -> Reward:
    """A reward whose two paths differ in how they make pixels: `pixels` on the device, `prepare` on the host."""

    def score(params, images, tokens):
        return rate(params, pixels(images), tokens)

    return Reward(params, tokenize, score, prepare, rate)
