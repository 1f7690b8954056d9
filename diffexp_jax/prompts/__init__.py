"""Prompt sets: what to fine-tune and evaluate on. Built in by name (`PROMPTS`), or any file of prompts.

To add a set, write its words in a file beside this one and enter it in `PROMPTS`.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from diffexp_jax import InputError
from diffexp_jax.prompts import activities, animals, files


@dataclass(frozen=True)
class PromptSet:
    """Prompts with the integer ids 0..N-1: a prompt's id is its index."""

    name: str
    texts: tuple[str, ...]  # [N], no two alike
    phrases: tuple[tuple[str, ...], ...]  # [N][1..], substrings of the text that prompt weighting may choose

    def __len__(self) -> int:
        return len(self.texts)


def animal_prompts(name: str, nouns: tuple[str, ...], doing: tuple[str, ...] = ()) -> PromptSet:
    """Every animal, alone ("a dog") or with every activity ("a dog riding a bike"), the activity running fastest."""
    phrases = tuple((noun, activity) for noun in nouns for activity in doing) or tuple((noun,) for noun in nouns)
    texts = tuple(" ".join((animals.with_article(noun), *activity)) for noun, *activity in phrases)
    return PromptSet(name, texts, phrases)


PROMPTS = {
    "animals": animal_prompts("animals", animals.SEEN),
    "animals_unseen": animal_prompts("animals_unseen", animals.UNSEEN),
    "animal_activities": animal_prompts("animal_activities", animals.SEEN, activities.SEEN),
    "animal_activities_unseen": animal_prompts("animal_activities_unseen", animals.UNSEEN, activities.SEEN),
    "unseen_activities": animal_prompts("unseen_activities", animals.SEEN, activities.UNSEEN),
}


def load_prompts(name_or_path: str | Path) -> PromptSet:
    """A built-in set by its name, or the prompts of a file (see `files.FORMATS`), named after the file.

    Raises:
      InputError: neither a built-in name nor a readable file of prompts.
    """
    if (prompts := PROMPTS.get(str(name_or_path))) is not None:
        return prompts
    path = Path(name_or_path)
    if not path.suffix and not os.path.isfile(path):
        raise InputError(
            f"unknown prompt set {str(name_or_path)!r}; accepted: {', '.join(PROMPTS)}, "
            f"or the path of a file: {files.FORMATS}"
        )
    texts = files.read_prompts(path)
    return PromptSet(path.stem, texts, tuple(files.comma_phrases(text) for text in texts))
