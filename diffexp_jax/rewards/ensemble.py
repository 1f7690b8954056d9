"""A weighted sum of rewards, each of which is reported on its own too."""

from collections.abc import Mapping, Sequence

from diffexp_jax import InputError
from diffexp_jax.rewards.reward import Reward

# Weights of DRaFT (Clark et al. 2024) and PRDP (Deng et al. 2024): PickScore 10, HPSv2 2, Aesthetic 0.05. Their 10 is
# of PickScore's cosine, about 0.2: the logit is 100 times that, and with 10 it would leave nothing to the others.
WEIGHTS = {
    "pickscore": 0.1,
    "pickscore_26": 2.6,
    "pickscore_cosine": 10.0,
    "hpsv2": 2.0,
    "aesthetic": 0.05,
    "emoji_aesthetic": 0.05,
}


def ensemble(rewards: Mapping[str, Reward], weights: Sequence[float] = ()) -> Reward:
    """sum_i weight_i r_i; the parts are the r_i, unweighted, under their names, and theirs as name/part.

    Args:
      rewards: by name, in the order of the weights.
      weights: one per reward; none: of `WEIGHTS`, and 1 where it knows none.

    Raises:
      InputError: another number of weights than of rewards.
    """
    weights = tuple(weights) or tuple(WEIGHTS.get(name, 1.0) for name in rewards)
    if len(weights) != len(rewards):
        raise InputError(f"{len(weights)} weights for {len(rewards)} rewards ({'+'.join(rewards)}); wants one for each")

    def combined(scores):
        total = sum(weight * scores[name][0] for name, weight in zip(rewards, weights, strict=True))
        parts = {name: own for name, (own, _) in scores.items()}
        parts |= {f"{name}/{part}": x for name, (_, inner) in scores.items() for part, x in inner.items()}
        return total, parts

    return Reward(
        params={name: reward.params for name, reward in rewards.items()},
        tokenize=lambda texts: {name: reward.tokenize(texts) for name, reward in rewards.items()},
        score=lambda params, images, tokens: combined(
            {name: reward.score(params[name], images, tokens[name]) for name, reward in rewards.items()}
        ),
        prepare=lambda image: {name: reward.prepare(image) for name, reward in rewards.items()},
        rate=lambda params, pixels, tokens: combined(
            {name: reward.rate(params[name], pixels[name], tokens[name]) for name, reward in rewards.items()}
        ),
    )
