"""The settings that methods from images alone share, and what they come to."""

from dataclasses import dataclass
from typing import Any

from diffexp_jax.algorithms.algorithm import Method, Setup
from diffexp_jax.limits import setting, whole


@dataclass(frozen=True, kw_only=True)
class DenoisingMethod(Method):
    """A method by the loss of pretraining, on the images that were sampled (`denoising.py`)."""

    updates: int = setting(1, "optimizer updates in a pass, each on batch.samples / updates images", whole(1, 4096))
    inner_epochs: int = setting(
        1, "passes over an iteration's images, each at other timesteps and noise", whole(1, 4096)
    )
    guided: bool = setting(
        False,
        "whether the guided output is what is trained",
        about="""
        False, as published: the output for the prompt alone, whatever guidance samples, for half of the work.
        """,
    )

    @property
    def trains_guided(self) -> bool:
        return self.guided

    def keywords(self, setup: Setup) -> dict[str, Any]:
        """What the function of every such method takes by keyword: the settings above, and the split of the samples."""
        return {
            "n_updates": self.updates,
            "inner_epochs": self.inner_epochs,
            "guided": self.guided,
            "n_chunks": setup.n_chunks,
            "group": setup.group,
        }
