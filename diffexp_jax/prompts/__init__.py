"""Prompt sets: what to fine-tune and evaluate on. `load_prompts` says how one is named.

To add a set, write its words in a file beside this one and enter it in `PROMPTS`.
"""

import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffexp_jax import paths
from diffexp_jax.errors import InputError, did_you_mean
from diffexp_jax.formats.tokenizers import check_text
from diffexp_jax.prompts import activities, animals, files


@dataclass(frozen=True)
class PromptSet:
    """Prompts, a row for each line of what the user gave: a prompt that is there twice has two rows."""

    name: str  # in the names of metrics and files
    texts: tuple[str, ...]  # [N]
    phrases: tuple[tuple[str, ...], ...]  # [N][1..], substrings of the text that prompt weighting may choose

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def ids(self) -> tuple[int, ...]:
        """[N] of each row the first with its text: what a prompt's own statistics go by."""
        first: dict[str, int] = {}
        return tuple(first.setdefault(text, row) for row, text in enumerate(self.texts))


def animal_prompts(
    name: str, nouns: tuple[str, ...], doing: tuple[str, ...] = (), *, article: bool = True
) -> PromptSet:
    """Every animal, alone ("a dog", "dog") or with every activity ("a dog riding a bike"), which runs fastest."""
    phrases = tuple((noun, activity) for noun in nouns for activity in doing) or tuple((noun,) for noun in nouns)
    first = animals.with_article if article else str
    texts = tuple(" ".join((first(noun), *activity)) for noun, *activity in phrases)
    return PromptSet(name, texts, phrases)


PROMPTS = {
    # bare names, as in DDPO and DiffExp
    "animals": animal_prompts("animals", animals.SEEN, article=False),
    "animals_unseen": animal_prompts("animals_unseen", animals.UNSEEN, article=False),
    # as the captions that the emoji model was trained on
    "animals_with_article": animal_prompts("animals_with_article", animals.SEEN),
    "animals_unseen_with_article": animal_prompts("animals_unseen_with_article", animals.UNSEEN),
    "animal_activities": animal_prompts("animal_activities", animals.SEEN, activities.SEEN),
    "animal_activities_unseen": animal_prompts("animal_activities_unseen", animals.UNSEEN, activities.SEEN),
    "unseen_activities": animal_prompts("unseen_activities", animals.SEEN, activities.UNSEEN),
}

BARE_NAMES = ("animals", "animals_unseen")  # the sets that are no captions

ACCEPTED = f"{', '.join(PROMPTS)}, prompt:TEXT, a prompt of several words, or the path of a file: {files.FORMATS}"


def load_prompts(spec: str | Path) -> PromptSet:
    """The prompts that a spec names, the first of these that fits:

    - the name of a built-in set;
    - "prompt:TEXT": one prompt, which may be a single word;
    - "FILE": the prompts of a file (see `files.FORMATS`), named after it;
    - "FILE.csv:COLUMN=VALUE|VALUE" (or .tsv): those of the rows that have one of the values in the column;
    - several words that are no file: one prompt.

    A prompt that a file holds several times is there as often: it is drawn, sampled and counted so often.

    Raises:
      InputError: none of these, or not a readable file of prompts, or one without such rows.
    """
    spec = check_text(str(spec), "prompts")
    if (prompts := PROMPTS.get(spec)) is not None:
        return prompts
    kind, _, text = spec.partition(":")
    if kind == "prompt":
        return one_prompt(text)
    path, rows = (Path(spec), None) if os.path.isfile(spec) else files.split_filter(spec)
    if path.suffix.lower() in files.ENDINGS:
        path = paths.local("prompts", path)
    if path.suffix.lower() not in files.ENDINGS and not os.path.isfile(path):
        if len(spec.split()) > 1:
            return one_prompt(spec)
        if not path.suffix:
            raise InputError(f"unknown prompt set {spec!r}; accepted: {ACCEPTED}{did_you_mean(spec, PROMPTS)}")
    texts = files.read_prompts(path, rows)
    name = path.stem if rows is None else f"{path.stem}-{short_name(rows.column.lower(), *rows.values)}"
    return PromptSet(name, texts, tuple(files.comma_phrases(text) for text in texts))


def as_prompt_set(prompts: str | Sequence[str] | PromptSet) -> PromptSet:
    """A str is what `load_prompts` reads; several are prompts themselves, of one set.

    Raises:
      InputError: as `load_prompts`; or there are none.
    """
    if isinstance(prompts, PromptSet):
        return prompts
    if isinstance(prompts, str):
        return load_prompts(prompts)
    texts = tuple(check_text(text, "prompts") for text in prompts)
    if not texts:
        raise InputError("prompts: has none; wants at least one")
    return PromptSet("prompts", texts, tuple(files.comma_phrases(text) for text in texts))


def load_prompt_sets(specs: Sequence[str]) -> list[PromptSet]:
    """Several, each with a name of its own: its results are stored under it.

    Raises:
      InputError: as `load_prompts`; or two have the same name.
    """
    sets = [load_prompts(spec) for spec in specs]
    first: dict[str, str] = {}
    for prompts, spec in zip(sets, specs, strict=True):
        if prompts.name in first:
            both = f"{first[prompts.name]!r} and {spec!r}"
            raise InputError(f"prompt sets {both}: both are named {prompts.name!r}; wants each name once")
        first[prompts.name] = spec
    return sets


def one_prompt(text: str) -> PromptSet:
    """A set of one prompt, named after it; white space inside it is made single spaces."""
    text = " ".join(check_text(text, "prompt").split())
    if not text:
        raise InputError("prompt:TEXT: has no text")
    return PromptSet(short_name(text), (text,), (files.comma_phrases(text),))


def short_name(*words: str) -> str:
    """The words joined by "-", with "_" for what does not belong in the names of metrics and files, and cut if long.

    Other words make another name: where these cannot be read back from it, it ends with their checksum.
    """
    name = "-".join(re.sub(r"[^\w.]", "_", word) for word in words)[:80]
    if name.replace("_", " ") != "-".join(words):
        name += f"-{zlib.crc32('|'.join(words).encode()):08x}"
    return name
