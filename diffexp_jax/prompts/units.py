"""Which tokens of a prompt are weighted together (the i of Eq. 8)."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from diffexp_jax.formats.tokenizers import AT_ONCE, LONGEST
from diffexp_jax.prompts import PromptSet

UNITS = ("word", "token", "phrase")

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")


def unit_ids(tokenizer: Any, prompts: PromptSet, unit: str) -> Int[np.ndarray, "P L"]:
    """Numbers the units of every prompt 1, 2, ... token by token; start, end, padding and punctuation are 0.

    Args:
      tokenizer: a fast transformers tokenizer (it says which characters each token covers).
      unit: "word" (all tokens of a word together), "token" (each on its own), or "phrase" (the prompt set's phrases;
        words outside every phrase are 0).
    """
    ids = np.zeros((len(prompts.texts), tokenizer.model_max_length), np.int32)
    tokens = (token for start in range(0, len(ids), AT_ONCE) for token in _tokens(tokenizer, prompts, start))
    for row, (text, phrases, covered) in enumerate(zip(prompts.texts, prompts.phrases, tokens, strict=True)):
        text = text[:LONGEST]
        spans = list(_phrase_spans(text, phrases) if unit == "phrase" else (m.span() for m in _WORD.finditer(text)))
        read = max(end for (_, end), _ in covered)
        spans = [span for span in spans if span[0] < read]  # the tokenizer cuts what follows
        for position, ((start, end), special) in enumerate(covered):
            hits = [n for n, (first, last) in enumerate(spans, 1) if start < last and first < end]
            if hits and not special:
                ids[row, position] = hits[0]
        if unit == "token":
            content = ids[row] > 0
            ids[row, content] = np.arange(1, content.sum() + 1)
    return _consecutive(ids)


def _tokens(tokenizer: Any, prompts: PromptSet, start: int) -> Iterator[list[tuple[tuple[int, int], int]]]:
    """Of each of some prompts: which characters a token covers, and whether it is a special one, token by token."""
    encoded = tokenizer(
        [text[:LONGEST] for text in prompts.texts[start : start + AT_ONCE]],
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    for spans, special in zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True):
        yield list(zip(spans, special, strict=True))


def units_of_text(tokenizer: Any, text: str, ids: Int[np.ndarray, "L"]) -> list[tuple[str, int]]:
    """The prompt cut where its units begin and end: [(text, number of the unit, 0 for none)], joined it is the prompt.

    Of a very long one it is as much as is looked at (`tokenizers.LONGEST`).

    Args:
      ids: the prompt's row of `unit_ids`.
    """
    text = text[:LONGEST]
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    offsets = tokenizer(text, return_offsets_mapping=True, **options)["offset_mapping"]
    letters = np.zeros(len(text), np.int32)  # a unit's number for each
    for unit in np.unique(ids[ids > 0]):
        spans = [span for span, number in zip(offsets, ids, strict=True) if number == unit]
        letters[min(start for start, _ in spans) : max(end for _, end in spans)] = unit
    ends = [*(np.flatnonzero(np.diff(letters)) + 1).tolist(), len(text)]
    return [(text[start:end], int(letters[start])) for start, end in zip([0, *ends], ends, strict=False) if end > start]


def _phrase_spans(text: str, phrases: Sequence[str]) -> Iterator[tuple[int, int]]:
    end = 0
    for phrase in phrases:
        start = text.find(phrase, end)
        if start >= 0:
            end = start + len(phrase)
            yield start, end


def _consecutive(ids: Int[np.ndarray, "P L"]) -> Int[np.ndarray, "P L"]:
    """Renumbers each row's ids 1..n without gaps (truncation can drop units)."""
    out = np.zeros_like(ids)
    for row in range(len(ids)):
        used = np.unique(ids[row][ids[row] > 0])
        out[row] = np.where(ids[row] > 0, np.searchsorted(used, ids[row]) + 1, 0)
    return out
