"""Reward fine-tuning algorithms, one file each.

An algorithm sees a model and a reward only as the functions of `Policy`, and prompts only as a `Batch`. It does not
know of exploration: that changes the guidance in the steps and the embeddings in `Batch.context`, nothing else.

To add one: write `name.py` with a `Method`, a dataclass of its settings, and enter it in `METHODS`
(docs/understand/adding.md).
"""

from diffexp_jax.algorithms.algorithm import Algorithm, Batch, Inputs, Method, Needs, Policy, Samples, Setup
from diffexp_jax.algorithms.alignprop import AlignProp
from diffexp_jax.algorithms.awm import AWM
from diffexp_jax.algorithms.ddpo import DDPO
from diffexp_jax.algorithms.dpok import DPOK
from diffexp_jax.algorithms.draft import DRaFT
from diffexp_jax.algorithms.entropy import Entropy
from diffexp_jax.algorithms.nft import NFT
from diffexp_jax.algorithms.prdp import PRDP
from diffexp_jax.algorithms.rwr import RWR
from diffexp_jax.algorithms.seiko import SEIKO

__all__ = ["METHODS", "Algorithm", "Batch", "Inputs", "Method", "Needs", "Policy", "Samples", "Setup"]

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (AlignProp, DDPO, DRaFT, DPOK, PRDP, RWR, NFT, AWM, Entropy, SEIKO)
}
