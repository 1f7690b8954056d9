"""What a reward is, and what a built-in one brings along."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, UInt8

Tokens = Any  # integers [B, ...], or a tree of them
Pixels = Any  # float arrays [B, ...], or a tree of them
Tokenize = Callable[[Sequence[str]], Tokens]
Scores = tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]
HostScores = tuple[Float[np.ndarray, " B"], dict[str, Float[np.ndarray, " B"]]]
HostFunction = Callable[..., Any]  # see `host_reward`

SHIPPED = Path(__file__).parents[1] / "emoji" / "assets"  # the weights of the emoji world's rewards


class Reward(NamedTuple):
    """How well images fit their prompts; `params` is an argument of the functions, never closed over.

    `tokenize` runs on the host: a prompt per image -> integers, all that is wanted of the texts.
    `score(params, images, tokens)` is pure and differentiable: images in [0,1] -> the reward in float32, and the parts
    that it is made of by their names ({} if it has none). Training and its curve use it.
    `prepare(image)` and `score_prepared(params, pixels, tokens)` are the same on the published path, which reads bytes:
    on the host an image of any size -> what the networks read of it (stack these), then the networks. Evaluation
    reports it.
    `start(images, tokens)` is for what cannot be in a program, as plain Python cannot: it begins to score a batch on
    the host, and gives a function that waits for the scores and their parts. They are added to those of the program,
    which are zeros where the host scores everything (`host.py`). Such a reward has no gradient.
    `embed(params, pixels)`, of what `prepare` gives, are the image's features where the reward has some: to compare
    images with each other. None: it has none.
    """

    params: Any
    tokenize: Tokenize
    score: Callable[[Any, Float[Array, "B H W 3"], Tokens], Scores]
    prepare: Callable[[UInt8[np.ndarray, "H W 3"]], Pixels]
    score_prepared: Callable[[Any, Pixels, Tokens], Scores]
    start: Callable[..., Callable[[], HostScores]] | None = None
    embed: Callable[[Any, Pixels], Float[Array, "B P"]] | None = None
    target: float | None = None  # see `Builtin`


class Builtin(NamedTuple):
    """A reward that a name stands for; a line of the table in `rewards/__init__.py`.

    `load(path, dtype=)` reads its weights, which are at `path` where the package ships them.
    `shapes(dtype)` is the published one with shapes in place of weights, for a dry run; None: its files must be there.
    `weight` is what it is multiplied by in a sum, unless the user says otherwise.
    `target` is what AlignProp pulls it to, where that is published.
    `function` is given instead of `load` where it is plain Python, as in python:MODULE:FUNCTION.
    """

    load: Callable[..., Reward] | None = None
    path: Path | None = None
    shapes: Callable[..., Reward] | None = None
    weight: float = 1.0
    target: float | None = None
    function: HostFunction | None = None


def of_pixels(
    params: Any,
    *,
    tokenize: Tokenize,
    pixels: Callable[[Float[Array, "B H W 3"]], Pixels],
    prepare: Callable[[UInt8[np.ndarray, "H W 3"]], Pixels],
    score_prepared: Callable[[Any, Pixels, Tokens], Scores],
    embed: Callable[[Any, Pixels], Float[Array, "B P"]] | None = None,
) -> Reward:
    """A reward whose two paths differ in how they make pixels: `pixels` on the device, `prepare` on the host."""

    def score(params, images, tokens):
        return score_prepared(params, pixels(images), tokens)

    return Reward(params, tokenize, score, prepare, score_prepared, embed=embed)


def no_tokens(texts: Sequence[str]):
    """What a reward that reads no prompts wants of them."""
    return np.zeros((len(texts), 0), np.int32)


def zero_tokens(length: int) -> Tokenize:
    """A tokenizer where there is no vocabulary: zeros of the right shape."""
    return lambda texts: np.zeros((len(texts), length), np.int32)
