"""The emoji world's tokenizers, of the captions, in transformers' format: CLIP's byte-level BPE, and T5's unigrams."""

import json
import math
from collections import Counter
from pathlib import Path

from diffexp_jax.emoji import scenes

MAX_LENGTH = 32  # tokens of a prompt, start and end included
START, END = "<|startoftext|>", "<|endoftext|>"  # END also pads, as in Stable Diffusion
WORD_END = "</w>"


def write_tokenizer(folder: Path, length: int = MAX_LENGTH) -> None:
    """Writes the files that `transformers.CLIPTokenizer.from_pretrained(folder)` reads, for prompts of `length` tokens.

    Every word of the captions is one token; any other text falls apart into shorter pieces, down to bytes.
    Ids run as in CLIP: 256 bytes, 256 bytes that end a word, the merges in the order of learning, start, end.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # seconds to import

    words = Counter(word for caption in scenes.captions() for word in caption.split())
    merges = learn_merges(words)
    tokens = [*bytes_to_unicode().values()]  # in the order of CLIP's vocabulary, which is GPT-2's
    tokens += [symbol + WORD_END for symbol in tokens]
    tokens += [*map("".join, merges), START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "vocab.json", json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges)]))
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=2))
    _write(folder / "tokenizer_config.json", json.dumps(config | special, indent=2))


def write_t5_tokenizer(folder: Path, length: int) -> None:
    """Writes the files that `transformers.T5Tokenizer.from_pretrained(folder)` reads, for prompts of `length` tokens.

    A unigram model (Kudo 2018) of the captions' words. Any other text falls apart into characters; those outside of
    ASCII are unknown.
    """
    from transformers import T5Tokenizer  # seconds to import

    words = Counter(word for caption in scenes.captions() for word in caption.split())
    pieces = [("\u2581" + word, math.log(n / words.total())) for word, n in sorted(words.items())]
    characters = ["\u2581", *map(chr, range(ord("!"), ord("~") + 1))]
    known = {piece for piece, _ in pieces}
    pieces += [(character, -20.0) for character in characters if character not in known]
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    T5Tokenizer(vocab=special + pieces, extra_ids=0, model_max_length=length).save_pretrained(folder)


def learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016), run until every word is one symbol.

    Args:
      words: ASCII words and how often each occurs.

    Returns:
      The pairs of symbols to join, the most frequent first; among equals the first in the alphabet.
    """
    spelled = {word: (*word[:-1], word[-1] + WORD_END) for word in words}
    merges = []
    while any(len(symbols) > 1 for symbols in spelled.values()):
        counts = Counter()
        for word, symbols in spelled.items():
            for pair in zip(symbols, symbols[1:], strict=False):
                counts[pair] += words[word]
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelled = {word: _join(symbols, best) for word, symbols in spelled.items()}
    return merges


def _join(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Joins each occurrence of the pair, from left to right."""
    joined, i = [], 0
    while i < len(symbols):
        step = 2 if symbols[i : i + 2] == pair else 1
        joined.append("".join(symbols[i : i + step]))
        i += step
    return tuple(joined)


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
