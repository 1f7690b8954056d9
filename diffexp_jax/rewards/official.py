"""Scores for reports: images as bytes, on each reward's published path, which has no gradient."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float, UInt8

from diffexp_jax.rewards.reward import Reward


def make_official_scorer(
    reward: Reward, *, batch: int
) -> Callable[[Sequence[UInt8[np.ndarray, "_ _ 3"]], Sequence[str]], dict[str, Float[np.ndarray, " N"]]]:
    """A function (images, their prompts) -> {"": the reward, part: each of its parts}, at most `batch` at a time.

    The images may differ in size. A last, smaller batch is filled up, so that everything compiles once.
    """
    rate = jax.jit(reward.rate)

    def score(images, texts):
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images, {len(texts)} prompts")
        tokens, done = reward.tokenize(texts), []
        for start in range(0, len(images), batch):
            rows = np.arange(start, start + batch).clip(max=len(images) - 1)
            pixels = [reward.prepare(images[row]) for row in rows[: len(images) - start]]
            pixels += pixels[-1:] * (batch - len(pixels))
            stacked = jax.tree.map(lambda *x: np.stack(x), *pixels)
            own = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], tokens)
            total, parts = rate(reward.params, stacked, own)
            done.append({name: np.asarray(x)[: len(images) - start] for name, x in ({"": total} | parts).items()})
        return {name: np.concatenate([scores[name] for scores in done]) for name in (done[0] if done else ())}

    return score
