"""Reward fine-tuning algorithms, one file each.

An algorithm sees a model and a reward only as the functions of `Policy`, and prompts only as a `Batch`. It does not
know of exploration: that changes the guidance in the steps and the embeddings in `Batch.context`, nothing else.

To add one: write `name.py` with a `METHOD`, enter it in `METHODS`, and give it a section of settings and a config
(docs/adding.md).
"""

from diffexp_jax.algorithms import alignprop, ddpo, dpok, draft
from diffexp_jax.algorithms.algorithm import AXIS, Algorithm, Batch, Inputs, Method, Needs, Policy, Samples, Setup

__all__ = ["AXIS", "METHODS", "Algorithm", "Batch", "Inputs", "Method", "Needs", "Policy", "Samples", "Setup"]

METHODS: dict[str, Method] = {
    method.name: method for method in (alignprop.METHOD, ddpo.METHOD, draft.METHOD, dpok.METHOD)
}
