"""What a reward is."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int


class Reward(NamedTuple):
    """How well images fit their prompts; `params` is an argument of `score`, never closed over.

    `tokenize` runs on the host: a prompt per image -> integers, all that `score` wants to know of the texts.
    `score(params, images, tokens)` is pure: images in [0,1] -> the reward in float32, and the parts that it
    is made of by their names ({} if it has none).
    """

    params: Any
    tokenize: Callable[[Sequence[str]], Int[np.ndarray, "B L"]]
    score: Callable[
        [Any, Float[Array, "B H W 3"], Int[Array, "B L"]],
        tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]],
    ]
