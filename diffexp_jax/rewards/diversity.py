"""How much a prompt's images differ from each other, by the features that a reward has of them. Plain numpy."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

FEATURES = "features"  # what they are called among the values of `Evaluator.evaluate`


def measures(features: tuple[str, Callable] | None, n: int) -> dict[str, Callable]:
    """What `Evaluator.evaluate` is to take of n images a prompt: nothing where no reward has features, or of one image.

    Args:
      features: `Scorers.features`.
    """
    return {FEATURES: features[1]} if features and n > 1 else {}


def of_prompts(features: Float[np.ndarray, "N P"], n: int) -> dict[str, Float[np.ndarray, "_"]]:
    """{"diversity/distance", "diversity/vendi"} of each prompt; the features are of n images a prompt, prompt by
    prompt."""
    by_prompt = features.reshape(-1, n, features.shape[-1])
    found = {"distance": mean_pairwise_distance, "vendi": vendi_score}
    return {f"diversity/{name}": np.array([f(x) for x in by_prompt]) for name, f in found.items()}


def cosine_kernel(features: Float[np.ndarray, "N P"]) -> Float[np.ndarray, "N N"]:
    """The cosine of every pair."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return unit @ unit.T


def mean_pairwise_distance(features: Float[np.ndarray, "N P"]) -> float:
    """Mean of 1 - cosine over all pairs of different images: 0 where all are alike. Wants at least two."""
    n = len(features)
    return float(1.0 - (cosine_kernel(features).sum() - n) / (n * (n - 1)))


def vendi_score(features: Float[np.ndarray, "N P"]) -> float:
    """How many different images there are, 1 to N: exp of the entropy of the eigenvalues of K / N, K the cosine kernel.

    Friedman and Dieng 2023.
    """
    shares = np.linalg.eigvalsh(cosine_kernel(features.astype(np.float64)) / len(features))
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))
