"""A prompt set ready to sample and to score: what a model and the rewards read of its prompts."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from diffexp_jax.pipelines import Conditioning
from diffexp_jax.prompts import PromptSet
from diffexp_jax.rewards import Reward
from diffexp_jax.sampler import Sampler


class Task(NamedTuple):
    """A prompt set, encoded; arrays are on the host, a row per prompt."""

    prompts: PromptSet
    cond: Conditioning
    tokens: Mapping[str, Any]  # by the names of the rewards that are to score it

    @classmethod
    def of(cls, sampler: Sampler, rewards: Mapping[str, Reward], prompts: PromptSet) -> "Task":
        """Prompts as the model and the rewards, by name, read them."""
        tokens = {name: reward.tokenize(prompts.texts) for name, reward in rewards.items()}
        return cls(prompts, sampler.encode(prompts), tokens)

    @property
    def name(self) -> str:
        return self.prompts.name

    @property
    def texts(self) -> tuple[str, ...]:
        return self.prompts.texts

    def rows(self, rows: Int[np.ndarray, " N"]) -> "Task":
        """These prompts of it, in this order; some may be there several times."""
        p = self.prompts
        chosen = PromptSet(p.name, tuple(p.texts[i] for i in rows), tuple(p.phrases[i] for i in rows))
        return Task(chosen, *jax.tree.map(lambda x: x[rows], (self.cond, self.tokens)))

    def repeated(self, n: int) -> "Task":
        """Each prompt n times, one after the other: a row for each image."""
        return self.rows(np.repeat(np.arange(len(self.prompts)), n))

    def grid(self, n: int) -> "Task":
        """n evenly spaced prompts, of a few several each, to look at and not to score."""
        chosen = self.rows(np.linspace(0, len(self.prompts) - 1, n).round().astype(int))
        return Task(dataclasses.replace(chosen.prompts, name="grid"), chosen.cond, {})
