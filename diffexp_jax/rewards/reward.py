"""What a reward is, and what a built-in one brings along."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from diffexp_jax.formats.tokenizers import Encode, check_text

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
    reports it. That of `load_reward` takes [H,W,4] too, a picture with transparency.
    `start(images, tokens)` is for what cannot be in a program, as plain Python cannot: it begins to score a batch on
    the host, and gives a function that waits for the scores and their parts. They are added to those of the program,
    which are zeros where the host scores everything (`host.py`). Such a reward has no gradient.
    `embed(params, pixels)`, of what `prepare` gives, are the image's features where the reward has some: to compare
    images with each other. `features(params, images)` are the same of images in [0,1], differentiable, as `score` reads
    them: to learn a reward from. `text_features(params, tokens)` are those of the prompts, in the same space. None: it
    has none.
    """

    params: Any
    tokenize: Tokenize
    score: Callable[[Any, Float[Array, "B H W 3"], Tokens], Scores]
    prepare: Callable[[UInt8[np.ndarray, "H W 3"]], Pixels]
    score_prepared: Callable[[Any, Pixels, Tokens], Scores]
    start: Callable[..., Callable[[], HostScores]] | None = None
    embed: Callable[[Any, Pixels], Float[Array, "B P"]] | None = None
    features: Callable[[Any, Float[Array, "B H W 3"]], Float[Array, "B P"]] | None = None
    text_features: Callable[[Any, Tokens], Float[Array, "B P"]] | None = None
    target: float | None = None  # see `Builtin`
    blocks: tuple[str, ...] = ()  # names of its networks' blocks, whose parameters may be stacked: see `blocks.stacked`


class Builtin(NamedTuple):
    """A reward that a name stands for; a line of the table in `rewards/__init__.py`.

    `about` says in a line what it is, for `--list`.
    `load(path, dtype=)` reads its weights, which are at `path` where the package ships them.
    `shapes(dtype)` is the published one with shapes in place of weights, for a dry run; None: its files must be there.
    `weight` is what it is multiplied by in a sum, unless the user says otherwise.
    `target` is what AlignProp pulls it to, where that is published.
    `function` is given instead of `load` where it is plain Python, as in python:MODULE:FUNCTION.
    `on_white` is whether it reads a transparent picture on white, else without its transparency, see `flattened`.
    """

    about: str
    load: Callable[..., Reward] | None = None
    path: Path | None = None
    shapes: Callable[..., Reward] | None = None
    weight: float = 1.0
    target: float | None = None
    function: HostFunction | None = None
    on_white: bool = False


def of_pixels(
    params: Any,
    *,
    tokenize: Tokenize,
    pixels: Callable[[Float[Array, "B H W 3"]], Pixels],
    prepare: Callable[[UInt8[np.ndarray, "H W 3"]], Pixels],
    score_prepared: Callable[[Any, Pixels, Tokens], Scores],
    embed: Callable[[Any, Pixels], Float[Array, "B P"]] | None = None,
    text_features: Callable[[Any, Tokens], Float[Array, "B P"]] | None = None,
    blocks: tuple[str, ...] = (),
) -> Reward:
    """A reward whose two paths differ in how they make pixels: `pixels` on the device, `prepare` on the host."""

    def score(params, images, tokens):
        return score_prepared(params, pixels(images), tokens)

    def features(params, images):
        return embed(params, pixels(images))

    features_of = {"embed": embed, "features": embed and features, "text_features": text_features}
    return Reward(params, tokenize, score, prepare, score_prepared, blocks=blocks, **features_of)


@dataclass(frozen=True)
class Cutting:
    """A `Tokenize` that reads so many tokens of a prompt: it warns of each prompt that is longer, once."""

    encode: Encode
    reward: str = "of this model"  # its name in the warning
    _said: set[str] = field(default_factory=set)

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "B L"]:
        ids, cut = self.encode([check_text(text, f"reward {self.reward}") for text in texts])
        if new := [text for text in dict.fromkeys(cut) if text not in self._said]:
            self._said.update(new)
            shown = ", ".join(repr(text if len(text) <= 60 else f"{text[:57]}...") for text in new[:3])
            more = f" and {len(new) - 3:,} others" if len(new) > 3 else ""
            n, its = ids.shape[1], "prompt is" if len(new) == 1 else "prompts are"
            logging.warning(
                "reward %s: reads %d tokens of a prompt; %s cut to that: %s%s", self.reward, n, its, shown, more
            )
        return ids

    def named(self, reward: str) -> "Cutting":
        """A copy whose warnings name this reward."""
        return replace(self, reward=reward, _said=set())


def flattened(image: UInt8[np.ndarray, "H W _"], *, on_white: bool) -> UInt8[np.ndarray, "H W 3"]:
    """The colours of a picture [H,W,3], or of one with transparency [H,W,4]: left out, or the picture put on white."""
    if image.shape[2] == 3 or not on_white:
        return image[..., :3]
    over = Image.fromarray(image)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB"))


def no_tokens(texts: Sequence[str]):
    """What a reward that reads no prompts wants of them."""
    return np.zeros((len(texts), 0), np.int32)


def zero_tokens(length: int) -> Tokenize:
    """A tokenizer where there is no vocabulary: zeros of the right shape."""
    return lambda texts: np.zeros((len(texts), length), np.int32)
