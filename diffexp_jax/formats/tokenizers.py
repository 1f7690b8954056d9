"""The tokenizers of diffusion models and of rewards, from the files that they are published in."""

import gzip
import html
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from diffexp_jax import InputError

OPEN_CLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"  # open_clip's own file: the merges, best first
_MERGES = 49152 - 256 - 2  # of them, those that CLIP uses: all but the single bytes and the two special tokens
_BERT_FILES = ("vocab.txt", "tokenizer.json")

Tokenize = Callable[[Sequence[str]], Int[np.ndarray, "B L"]]


def load_tokenizer(folder: Path):
    """The folder's CLIPTokenizer."""
    from transformers import CLIPTokenizer  # seconds to import: only where it is used

    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file() and not (folder / "tokenizer.json").is_file():
            raise InputError(f"{folder / name}: the file is missing")
    return CLIPTokenizer.from_pretrained(str(folder))


def token_ids(tokenizer, texts: Sequence[str]) -> tuple[Int[np.ndarray, "B L"], list[str]]:
    """Token ids padded to the tokenizer's length, and those of the texts that had to be cut."""
    length = tokenizer.model_max_length
    # not verbose: who asks warns of the texts that were cut
    full = tokenizer(list(texts), padding="max_length", max_length=length, verbose=False).input_ids
    cut = [text for text, ids in zip(texts, full, strict=True) if len(ids) > length]
    ids = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True).input_ids
    return np.asarray(ids, np.int32), cut


def open_clip(folder: Path, *, length: int = 77) -> Tokenize:
    """open_clip's tokenizer: CLIP's, but it cleans the text (`clean`) and pads with 0.

    Args:
      folder: holds CLIP's vocabulary, as transformers writes it (vocab.json and merges.txt, or tokenizer.json; in it
        or in its subfolder tokenizer/) or as open_clip ships it (bpe_simple_vocab_16e6.txt.gz).
      length: tokens of a prompt, start and end included; longer ones are cut.

    Raises:
      InputError: the folder holds none of them.
    """
    tokenizer = _clip_tokenizer(folder)

    def tokenize(texts: Sequence[str]) -> Int[np.ndarray, "B L"]:
        ids = tokenizer([clean(text) for text in texts], truncation=True, max_length=length).input_ids
        out = np.zeros((len(texts), length), np.int32)
        for row, known in zip(out, ids, strict=True):
            row[: len(known)] = known
        return out

    return tokenize


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


def bert(folder: Path, *, length: int = 35) -> Tokenize:
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

    def tokenize(texts: Sequence[str]) -> Int[np.ndarray, "B L"]:
        ids = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length).input_ids
        return np.asarray(ids, np.int32).reshape(-1, length)

    return tokenize
