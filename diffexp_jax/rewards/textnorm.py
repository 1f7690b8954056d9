"""TextNorm (Kim et al. 2024, arXiv 2404.01863): a reward made relative to contrastive prompts, against over-optimising.

A picture that any prompt would be rewarded for earns little; one that fits its own prompt better than prompts that
differ in one thing earns much.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from diffexp_jax.emoji.names import ACTIVITIES, ANIMALS
from diffexp_jax.errors import InputError
from diffexp_jax.formats.files import read_json
from diffexp_jax.rewards.reward import Reward

Contrast = Callable[[str], Sequence[str]]  # of a prompt, those that it is set against

_OTHER_ANIMALS = 5  # contrastive prompts that change the animal
_ANIMAL = re.compile(rf"\b(?:(an?) )?({'|'.join(ANIMALS)})\b", re.IGNORECASE)


def textnorm(reward: Reward, contrast: Contrast, *, temperature: float = 1.0) -> Reward:
    """exp(r(x, c) / tau) / sum over c' in {c} and C(c) of exp(r(x, c') / tau): between 0 and 1.

    Parts: "raw", the reward r(x, c) itself. The image's tower runs once for all prompts.

    Args:
      reward: r, which must read prompts.
      contrast: C, the contrastive prompts of a prompt.
      temperature: tau, in the reward's units: what difference of r counts.

    Raises:
      InputError: the reward is plain Python, or the temperature not positive; later, of `tokenize`, a prompt has no
        contrastive prompts.
    """
    if reward.start:
        raise InputError("textnorm: the reward is plain Python; wants one that is computed in JAX")
    if not temperature > 0:
        raise InputError(f"textnorm: temperature {temperature}: wants more than 0")

    def tokenize(texts: Sequence[str]):
        rows = [[text, *contrast(text)] for text in texts]
        longest = max(map(len, rows), default=1)
        valid = np.array([[k < len(row) for k in range(longest)] for row in rows], bool).reshape(-1, longest)
        flat = reward.tokenize([text for row in rows for text in row + row[:1] * (longest - len(row))])
        if all(leaf.size == 0 for leaf in jax.tree.leaves(flat)) and texts:
            raise InputError("textnorm: the reward reads no prompts, so there is nothing to set them against")
        return {"texts": jax.tree.map(lambda x: x.reshape(len(texts), longest, *x.shape[1:]), flat), "valid": valid}

    def normalised(score_of, tokens):
        """`score_of` takes one prompt for each image; vmap runs once what does not depend on the prompts."""
        raw = jax.vmap(score_of, in_axes=1, out_axes=1)(tokens["texts"])  # [B, 1 + K]
        share = jax.nn.softmax(raw / temperature, axis=1, where=tokens["valid"])
        return share[:, 0], {"raw": raw[:, 0]}

    def score(params, images, tokens):
        return normalised(lambda one: reward.score(params, images, one)[0], tokens)

    def score_prepared(params, pixels, tokens):
        return normalised(lambda one: reward.score_prepared(params, pixels, one)[0], tokens)

    def text_features(params, tokens):
        return reward.text_features(params, jax.tree.map(lambda x: x[:, 0], tokens["texts"]))

    kept = {"embed": reward.embed, "features": reward.features, "blocks": reward.blocks}
    kept |= {"text_features": reward.text_features and text_features}
    return Reward(reward.params, tokenize, score, reward.prepare, score_prepared, **kept)


def swapped(text: str) -> list[str]:
    """Contrastive prompts of an animal and its activity: every other activity, and the next animals of the list.

    "a dog riding a bike" -> "a dog washing the dishes", ..., "a horse riding a bike", ...

    Raises:
      InputError: the prompt names no animal of the paper's, or several.
    """
    found = list(_ANIMAL.finditer(text))
    if len(found) != 1:
        raise InputError(f"textnorm: no contrastive prompts for {text!r:.100}; give a json file of them")
    match, animal = found[0], found[0][2].lower()
    before, after = text[: match.start()], text[match.end() :]
    doing = next((activity for activity in ACTIVITIES if activity in after), None)
    others = [] if doing is None else [text.replace(doing, other) for other in ACTIVITIES if other != doing]
    first = ANIMALS.index(animal) + 1
    for other in (ANIMALS[(first + i) % len(ANIMALS)] for i in range(_OTHER_ANIMALS)):
        article = "" if match[1] is None else "an " if other[0] in "aeiou" else "a "
        others.append(f"{before}{article}{other}{after}")
    return others


def from_file(path: Path) -> Contrast:
    """Contrastive prompts of a json file {prompt: [prompt, ...]}.

    Raises:
      InputError: the file is missing or has another form; later, of the function, a prompt that it does not hold.
    """
    table: Mapping[str, Sequence[str]] = read_json(path)
    for text, others in table.items():
        if not isinstance(others, list) or not others or not all(isinstance(other, str) for other in others):
            raise InputError(f"{path}: {text!r:.100}: wants a list of prompts, at least one")

    def contrast(text: str) -> Sequence[str]:
        if text not in table:
            raise InputError(f"{path}: has no contrastive prompts for {text!r:.100}")
        return table[text]

    return contrast
