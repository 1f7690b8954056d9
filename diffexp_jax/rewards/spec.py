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
        """The spec as the user wrote it, without textnorm()."""
        return f"{self.name}:{self.location}" if self.location else self.name

    @property
    def reported(self) -> str:
        """What its scores are reported under; a function under its own name."""
        name = self.location.rpartition(":")[2] if self.name in FUNCTIONS else self.name
        return f"textnorm_{name}" if self.normed else name


class Spec(NamedTuple):
    """What a user wrote, and its parts in order."""

    text: str
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """What its scores are reported under: "hpsv2:a.pt+textnorm(pickscore:b)" -> "hpsv2+textnorm_pickscore"."""
        return "+".join(part.reported for part in self.parts)

    @property
    def without_locations(self) -> str:
        """The spec without its paths: "hpsv2:a.pt+python:m:f" -> "hpsv2+python:m:f"."""
        parts = [(part, part.bare if part.name in FUNCTIONS else part.name) for part in self.parts]
        return "+".join(f"textnorm({name})" if part.normed else name for part, name in parts)


def parse(text: str, names: Collection[str]) -> Spec:
    """The spec that the text is. `names` are those that a part may begin with.

    They tell a "+" between two parts from one in a path (LAION's file is called sac+logos+ava1-l14-linearMSE.pth).
    """
    known = "|".join(map(re.escape, (*names, *FUNCTIONS)))
    parts = []
    for part in re.split(rf"\+(?=textnorm\(|(?:{known})(?:[:+]|$))", text):
        wrapped = re.fullmatch(r"textnorm\((.*)\)", part)
        name, _, location = (wrapped[1] if wrapped else part).partition(":")
        parts.append(Part(name, location, bool(wrapped)))
    return Spec(text, tuple(parts))
