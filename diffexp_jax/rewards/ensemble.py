"""A weighted sum of rewards, each of which is reported on its own too."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp

from diffexp_jax.errors import InputError
from diffexp_jax.rewards.reward import HostScores, Reward, Scores


def ensemble(rewards: Mapping[str, Reward], weights: Sequence[float], *, uncertainty: float = 0.0) -> Reward:
    """sum_i weight_i r_i; the parts are the r_i, unweighted, under their names, and theirs as name/part.

    Args:
      rewards: by name, in the order of the weights.
      weights: one per reward.
      uncertainty: lambda of sum_i weight_i r_i - lambda var_i(r_i): what the rewards disagree about earns less (Kim et
        al. 2024). They then have one unit, as those of textnorm do. The variance is a part, "variance".

    Raises:
      InputError: another number of weights than of rewards, or the uncertainty of a reward that is plain Python.
    """
    weights = tuple(weights)
    if uncertainty and any(reward.start for reward in rewards.values()):
        raise InputError(f"{'+'.join(rewards)}: the variance of rewards wants all of them in JAX")
    if len(weights) != len(rewards):
        raise InputError(f"{len(weights)} weights for {len(rewards)} rewards ({'+'.join(rewards)}); wants one for each")
    weight_of = dict(zip(rewards, weights, strict=True))

    def combined(scores: Mapping[str, Scores]) -> Scores:
        total = sum(weight_of[name] * score for name, (score, _) in scores.items())
        parts = {name: score for name, (score, _) in scores.items()}
        parts |= {f"{name}/{part}": x for name, (_, inner) in scores.items() for part, x in inner.items()}
        if uncertainty:
            parts["variance"] = jnp.var(jnp.stack([score for score, _ in scores.values()]), axis=0)
            total -= uncertainty * parts["variance"]
        return total, parts

    def start(images, tokens) -> Callable[[], HostScores]:
        waits = {name: reward.start(images, tokens[name]) for name, reward in rewards.items() if reward.start}
        return lambda: combined({name: wait() for name, wait in waits.items()})

    return Reward(
        params={name: reward.params for name, reward in rewards.items()},
        tokenize=lambda texts: {name: reward.tokenize(texts) for name, reward in rewards.items()},
        score=lambda params, images, tokens: combined(
            {name: reward.score(params[name], images, tokens[name]) for name, reward in rewards.items()}
        ),
        prepare=lambda image: {name: reward.prepare(image) for name, reward in rewards.items()},
        score_prepared=lambda params, pixels, tokens: combined(
            {name: reward.score_prepared(params[name], pixels[name], tokens[name]) for name, reward in rewards.items()}
        ),
        start=start if any(reward.start for reward in rewards.values()) else None,
        blocks=blocks_of_all(rewards.values()),
        **by_first(rewards),
    )


def blocks_of_all(rewards: Iterable[Reward]) -> tuple[str, ...]:
    """`Reward.blocks` of a sum: names that mean blocks in each of its parts that has weights."""
    named = [reward.blocks for reward in rewards if jax.tree.leaves(reward.params)]
    return tuple(name for name in named[0] if all(name in names for names in named)) if named else ()


def by_first(rewards: Mapping[str, Reward]) -> dict[str, Callable | None]:
    """`Reward.embed`, `features` and `text_features` of a sum: those of its first part that has features of images."""
    name = next((name for name, reward in rewards.items() if reward.embed), None)
    if name is None:
        return {"embed": None, "features": None}
    reward = rewards[name]

    def text_features(params, tokens):
        return reward.text_features(params[name], tokens[name])

    return {
        "embed": lambda params, pixels: reward.embed(params[name], pixels[name]),
        "features": lambda params, images: reward.features(params[name], images),
        "text_features": reward.text_features and text_features,
    }
