"""What a user writes for a reward: NAME, NAME:PATH, textnorm(NAME:PATH), several joined by "+", or a function.

A function is jax:MODULE:FUNCTION or python:MODULE:FUNCTION.
"""

import re
from collections.abc import Collection
from typing import NamedTuple

FUNCTIONS = ("jax", "python")  # the kinds of the user's own


class Part(NamedTuple):
    """One of the rewards that a spec joins."""

    name: str  # of the table, or one of FUNCTIONS
    location: str  # what follows its ":"; "" if nothing does
    normed: bool  # in textnorm(...)

    @property
    def bare(self) -> str:
        """As the user wrote it, without textnorm()."""
        return f"{self.name}:{self.location}" if self.location else self.name

    @property
    def reported(self) -> str:
        """What its scores are reported under; a function under its own name."""
        name = self.location.rpartition(":")[2] if self.name in FUNCTIONS else self.name
        return f"textnorm_{name}" if self.normed else name


def parse(spec: str, names: Collection[str]) -> list[Part]:
    """The parts of a spec, in order. `names` are those that a part may begin with.

    They tell a "+" between two parts from one in a path (LAION's file is called sac+logos+ava1-l14-linearMSE.pth).
    """
    known = "|".join(map(re.escape, (*names, *FUNCTIONS)))
    parts = []
    for text in re.split(rf"\+(?=textnorm\(|(?:{known})(?:[:+]|$))", spec):
        wrapped = re.fullmatch(r"textnorm\((.*)\)", text)
        name, _, location = (wrapped[1] if wrapped else text).partition(":")
        parts.append(Part(name, location, bool(wrapped)))
    return parts
