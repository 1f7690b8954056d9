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


def unit_ids(tokenizers: Sequence[Any], prompts: PromptSet, unit: str) -> Int[np.ndarray, "P L"]:
    """Numbers the units of every prompt 1, 2, ... token by token; start, end, padding and punctuation are 0.

    A unit is a span of the text, numbered once, so it is the same unit to every tokenizer: "12:30" are two words, also
    where a tokenizer makes one token of it. A token that overlaps several units belongs to the first of them.

    Args:
      tokenizers: fast transformers tokenizers (they say which characters each token covers). Their tokens follow each
        other in a row, each tokenizer's padded to its model_max_length.
      unit: "word" (all tokens of a word together), "token" (each token of the first tokenizer on its own, with what the
        others make of its characters), or "phrase" (the prompt set's phrases; words outside every phrase are 0).
    """
    ids = np.zeros((len(prompts), sum(tokenizer.model_max_length for tokenizer in tokenizers)), np.int32)
    some = (slice(start, start + AT_ONCE) for start in range(0, len(ids), AT_ONCE))
    covered = (row for rows in some for row in zip(*(_tokens(t, prompts.texts[rows]) for t in tokenizers), strict=True))
    for row, (text, phrases, tokens) in enumerate(zip(prompts.texts, prompts.phrases, covered, strict=True)):
        text = text[:LONGEST]
        spans = list(_phrase_spans(text, phrases) if unit == "phrase" else (m.span() for m in _WORD.finditer(text)))
        read = max(end for of_one in tokens for _, end in of_one)
        spans = [span for span in spans if span[0] < read]  # the tokenizers cut what follows
        numbers = [_numbers(of_one, spans) for of_one in tokens]
        if unit == "token":
            content = numbers[0] > 0
            spans = [span for span, counts in zip(tokens[0], content, strict=True) if counts]
            # the first's by position: two of its tokens may share a character
            numbers = [np.cumsum(content) * content, *(_numbers(of_one, spans) for of_one in tokens[1:])]
        ids[row] = _consecutive(np.concatenate(numbers))
    return ids


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """For each text the characters that each token covers; special ones cover none, (0, 0)."""
    encoded = tokenizer(
        [text[:LONGEST] for text in texts],
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    return [
        [(0, 0) if one else span for span, one in zip(spans, special, strict=True)]
        for spans, special in zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    ]


def _numbers(tokens: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Int[np.ndarray, "L"]:
    """For each token the number of the first span that it overlaps, counted from 1; 0 where there is none."""
    hits = ((n for n, (first, last) in enumerate(spans, 1) if start < last and first < end) for start, end in tokens)
    return np.array([next(found, 0) for found in hits], np.int32)


def units_of_text(tokenizers: Sequence[Any], text: str, ids: Int[np.ndarray, "L"]) -> list[tuple[str, int]]:
    """The prompt cut where its units begin and end: [(text, number of the unit, 0 for none)], joined it is the prompt.

    Of a very long one it is as much as is looked at (`tokenizers.LONGEST`).

    Args:
      tokenizers: those of `unit_ids`.
      ids: the prompt's row of `unit_ids`.
    """
    text = text[:LONGEST]
    offsets = [span for tokenizer in tokenizers for span in _tokens(tokenizer, [text])[0]]
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


def _consecutive(ids: Int[np.ndarray, "L"]) -> Int[np.ndarray, "L"]:
    """Renumbers ids 1..n without gaps (truncation can drop units)."""
    return np.where(ids > 0, np.searchsorted(np.unique(ids[ids > 0]), ids) + 1, 0)
