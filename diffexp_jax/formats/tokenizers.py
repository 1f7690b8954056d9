"""The tokenizers of diffusion models and of rewards, from the files that they are published in."""

import gzip
import html
import itertools
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int

from diffexp_jax import InputError

OPEN_CLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"  # open_clip's own file: the merges, best first
_MERGES = 49152 - 256 - 2  # of them, those that CLIP uses: all but the single bytes and the two special tokens
_SURROGATE = re.compile("[\ud800-\udfff]")
_BERT_FILES = ("vocab.txt", "tokenizer.json")

LONGEST = 2**16  # characters of a text that are looked at: no tokenizer here reads more of it
AT_ONCE = 4096  # texts: their tokens take kilobytes each while they are Python's own numbers

Encode = Callable[[Sequence[str]], tuple[Int[np.ndarray, "B L"], list[str]]]  # the ids, and the texts that were cut


def check_text(text: str, where: str) -> str:
    """The text, where it is one: a lone surrogate is half a character, which no tokenizer and no file can hold.

    Raises:
      InputError: it has one; `where` begins the message.
    """
    if (match := _SURROGATE.search(text)) is not None:
        code = f"U+{ord(match[0]):04X}"
        raise InputError(f"{where}: {text[:40]!r} holds {code}, half a character (a lone surrogate); wants UTF-8 text")
    return text


def load_tokenizer(folder: Path, **settings):
    """The folder's CLIPTokenizer; `settings` go before those of its tokenizer_config.json."""
    from transformers import CLIPTokenizer  # seconds to import: only where it is used

    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file() and not (folder / "tokenizer.json").is_file():
            raise InputError(f"{folder / name}: the file is missing")
    return CLIPTokenizer.from_pretrained(str(folder), **settings)


def token_ids(tokenizer, texts: Sequence[str]) -> tuple[Int[np.ndarray, "B L"], list[str]]:
    """Token ids padded to the tokenizer's length, and those of the texts that had to be cut."""
    length = tokenizer.model_max_length
    out, cut = np.zeros((len(texts), length), np.int32), []
    for start in range(0, len(texts), AT_ONCE):
        some = [text[:LONGEST] for text in texts[start : start + AT_ONCE]]
        cut += itertools.compress(texts[start:], longer_than(tokenizer, some, length))
        ids = tokenizer(some, padding="max_length", max_length=length, truncation=True).input_ids
        out[start : start + len(some)] = ids
    return out, cut


def longer_than(tokenizer, texts: Sequence[str], length: int) -> list[bool]:
    """Whether each of the texts has more tokens than that, start and end included."""
    some = [text for text in texts if len(text.encode()) > length - 2]  # a token is a byte at least
    # not verbose: who asks warns of the texts that are cut
    full = tokenizer(some, verbose=False).input_ids if some else []
    long = {text for text, ids in zip(some, full, strict=True) if len(ids) > length}
    return [text in long for text in texts]


def open_clip(folder: Path, *, length: int = 77) -> Encode:
    """open_clip's tokenizer: CLIP's, but it cleans the text (`clean`) and pads with 0.

    Args:
      folder: holds CLIP's vocabulary, as transformers writes it (vocab.json and merges.txt, or tokenizer.json; in it
        or in its subfolder tokenizer/) or as open_clip ships it (bpe_simple_vocab_16e6.txt.gz).
      length: tokens of a prompt, start and end included; longer ones are cut.

    Raises:
      InputError: the folder holds none of them.
    """
    tokenizer = _clip_tokenizer(folder)

    def encode(texts: Sequence[str]) -> tuple[Int[np.ndarray, "B L"], list[str]]:
        out, cut = np.zeros((len(texts), length), np.int32), []
        for start in range(0, len(texts), AT_ONCE):
            some = [clean(text[:LONGEST]) for text in texts[start : start + AT_ONCE]]
            cut += [
                text for text, long in zip(texts[start:], longer_than(tokenizer, some, length), strict=False) if long
            ]
            ids = tokenizer(some, truncation=True, max_length=length).input_ids
            for row, known in zip(out[start:], ids, strict=False):
                row[: len(known)] = known
        return out, cut

    return encode


def clean(text: str) -> str:
    """The text as open_clip reads it: broken and curly characters repaired, html unescaped, lower case."""
    import ftfy  # only HPSv2 needs it

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def _clip_tokenizer(folder: Path):
    from transformers import CLIPTokenizer  # seconds to import: only where it is used
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    for candidate in (folder, folder / "tokenizer"):
        if (candidate / "tokenizer.json").is_file() or (candidate / "vocab.json").is_file():
            return load_tokenizer(candidate)
        if (path := candidate / OPEN_CLIP_VOCABULARY).is_file():
            lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : 1 + _MERGES]
            merges = [tuple(line.split()) for line in lines if line]
            symbols = bytes_to_unicode().values()  # in the order of CLIP's vocabulary, which is GPT-2's
            tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges)]
            tokens += ["<|startoftext|>", "<|endoftext|>"]
            return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    raise InputError(f"{folder}: no CLIP vocabulary; wants vocab.json and merges.txt, or {OPEN_CLIP_VOCABULARY}")


def bert(folder: Path, *, length: int = 35) -> Encode:
    """BERT's lower-case tokenizer with the two tokens that BLIP appends, [DEC] and [ENC]; pads with 0 and cuts.

    Args:
      folder: holds vocab.txt or tokenizer.json of bert-base-uncased.
      length: tokens of a prompt, [CLS] and [SEP] included.

    Raises:
      InputError: the folder holds neither.
    """
    from transformers import BertTokenizer

    path = next((folder / name for name in _BERT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: no BERT vocabulary; wants {' or '.join(_BERT_FILES)} of bert-base-uncased")
    if path.suffix == ".txt":
        tokenizer = BertTokenizer(vocab=str(path))
    else:
        tokenizer = BertTokenizer.from_pretrained(str(folder))
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)

    tokenizer.model_max_length = length
    return partial(token_ids, tokenizer)
