"""The tokenizers of diffusion models and of rewards, from the files that they are published in."""

import gzip
import html
import itertools
import re
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from diffexp_jax.errors import InputError, first_line
from diffexp_jax.formats import bpe
from diffexp_jax.formats.files import read_json
from diffexp_jax.formats.json_text import MOST_BYTES

OPEN_CLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"  # open_clip's own file: the merges, best first
_MERGES = 49152 - 256 - 2  # of them, those that CLIP uses: all but the single bytes and the two special tokens
_SURROGATE = re.compile("[\ud800-\udfff]")
_BERT_FILES, _BERT_SPECIAL = ("vocab.txt", "tokenizer.json"), ("cls", "sep", "pad")
_BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

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
    """The folder's CLIPTokenizer; `settings` go before those of its tokenizer_config.json.

    Raises:
      InputError: a file is missing or damaged, or the files are not of one tokenizer.
    """
    from transformers import CLIPTokenizer  # seconds to import: only where it is used
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    files = bpe.read_files(folder)
    bpe.check(files)
    tokenizer = _made(bpe.names_of(folder), lambda: CLIPTokenizer.from_pretrained(str(folder), **settings))
    bpe.check_whole(files, tuple(bytes_to_unicode().values()), min(tokenizer.bos_token_id, tokenizer.eos_token_id))
    return tokenizer


def load_t5_tokenizer(folder: Path, *, size: int, length: int):
    """The folder's T5 tokenizer. It ends a prompt with </s>, and begins it with nothing.

    Args:
      folder: holds tokenizer.json; spiece.model alone, which other programs read, does not do.
      size: how many tokens the network knows. The published tokenizer has 28 less: networks' tables are filled up.
      length: tokens of a prompt, its end included.

    Raises:
      InputError: the file is missing or damaged, or a token is none of the network's.
    """
    from transformers import T5Tokenizer  # seconds to import: only where it is used

    path = folder / bpe.WHOLE
    if not path.is_file():
        raise InputError(f"{folder}: no {bpe.WHOLE}; wants T5's tokenizer as transformers writes it, in that file")
    bpe.check_settings(folder)
    read_json(path)
    make = partial(T5Tokenizer.from_pretrained, str(folder), model_max_length=length)
    tokenizer = _made(str(path), make, ("eos", "pad"))
    _check_ids(tokenizer, size, path)
    return tokenizer


def check_size(tokenizer, size: int, where: Path) -> None:
    """Raises InputError where a tokenizer has not as many tokens as the network embeds: `size`.

    Nothing would fail later: an id outside of the embedding's table is silently read as its last row.
    """
    if len(tokenizer) != size:
        raise InputError(f"{where}: the tokenizer has {len(tokenizer):,} tokens, and the network knows {size:,}")
    _check_ids(tokenizer, size, where)


def _check_ids(tokenizer, size: int, where: Path) -> None:
    if (last := max(tokenizer.get_vocab().values())) >= size:
        raise InputError(f"{where}: a token of the tokenizer has the id {last}, and the network knows 0 to {size - 1}")


def _made(where: str, make: Callable[[], Any], special: Sequence[str] = ("bos", "eos", "pad")) -> Any:
    """The tokenizer that `make` gives, once it is known to work.

    Args:
      special: what transformers calls the tokens that begin a prompt, if one does, end it, and pad it.

    Raises:
      InputError: it does not; the message begins with `where`.
    """
    try:
        tokenizer = make()
        ids = tokenizer("").input_ids
    except Exception as error:  # of many types: the library's parts each have their own
        raise InputError(f"{where}: the tokenizer's files are not readable ({first_line(error)})") from None
    tokens = [getattr(tokenizer, f"{name}_token_id") for name in special]
    if None in tokens:
        raise InputError(f"{where}: the tokenizer has no {special[tokens.index(None)]}_token")
    if ids != tokens[:-1]:
        wanted = " and ".join({"bos": "start", "cls": "start"}.get(name, "end") for name in special[:-1])
        raise InputError(f"{where}: the tokenizer makes {ids!r:.60} of an empty prompt; wants its {wanted}")
    length = tokenizer.model_max_length
    if type(length) is not int or length < 3:
        raise InputError(f"{where}: the tokenizer's model_max_length is {length!r:.40}; wants a whole number from 3 on")
    return tokenizer


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
    # a token is a character at least, where none is taken apart as "™" is: to T5 it is "TM"
    some = [text for text in texts if len(text) > length - 2 or not text.isascii()]
    # not verbose: who asks warns of the texts that are cut
    full = tokenizer(some, verbose=False).input_ids if some else []
    long = {text for text, ids in zip(some, full, strict=True) if len(ids) > length}
    return [text in long for text in texts]


def open_clip(folder: Path, *, length: int = 77, size: int | None = None) -> Encode:
    """open_clip's tokenizer: CLIP's, but it cleans the text (`clean`) and pads with 0.

    Args:
      folder: holds CLIP's vocabulary, as transformers writes it (vocab.json and merges.txt, or tokenizer.json; in it
        or in its subfolder tokenizer/) or as open_clip ships it (bpe_simple_vocab_16e6.txt.gz).
      length: tokens of a prompt, start and end included; longer ones are cut.
      size: how many tokens the network knows; None: it is not checked.

    Raises:
      InputError: the folder holds none of them, or it is damaged, or of another size.
    """
    tokenizer = _clip_tokenizer(folder)
    if size is not None:
        check_size(tokenizer, size, folder)

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
            merges = bpe.merges_of(path, _lines_of_gzip(path)[1 : 1 + _MERGES])
            symbols = bytes_to_unicode().values()  # in the order of CLIP's vocabulary, which is GPT-2's
            tokens = [*symbols, *(f"{symbol}{bpe.WORD_END}" for symbol in symbols), *map("".join, merges)]
            tokens += bpe.SPECIAL
            vocabulary = {token: i for i, token in enumerate(tokens)}
            bpe.check(bpe.Files(path, path, vocabulary, merges))
            return _made(str(path), partial(CLIPTokenizer, vocab=vocabulary, merges=merges))
    raise InputError(f"{folder}: no CLIP vocabulary; wants vocab.json and merges.txt, or {OPEN_CLIP_VOCABULARY}")


def _lines_of_gzip(path: Path) -> list[str]:
    """The lines of a compressed text. Raises InputError where it is broken, or longer than any vocabulary."""
    try:
        with gzip.open(path) as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"longer than {MOST_BYTES // 2**20} MB")
        return data.decode("utf-8").removesuffix("\n").split("\n")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: not readable as a gzip file of text ({error})") from None


def bert(folder: Path, *, length: int = 35, size: int | None = None) -> Encode:
    """BERT's lower-case tokenizer with the two tokens that BLIP appends, [DEC] and [ENC]; pads with 0 and cuts.

    Args:
      folder: holds vocab.txt or tokenizer.json of bert-base-uncased.
      length: tokens of a prompt, [CLS] and [SEP] included.
      size: how many tokens the network knows, with these two; None: it is not checked.

    Raises:
      InputError: the folder holds neither, or it is damaged, or of another size.
    """
    from transformers import BertTokenizer

    path = next((folder / name for name in _BERT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: no BERT vocabulary; wants {' or '.join(_BERT_FILES)} of bert-base-uncased")
    if path.suffix == ".txt":
        tokens = bpe.text_lines(path)
        if len(set(tokens)) < len(tokens):
            raise InputError(f"{path}: a token is there twice")
        if missing := [token for token in _BERT_TOKENS if token not in tokens]:
            raise InputError(f"{path}: lacks {', '.join(missing)}; wants the vocabulary of bert-base-uncased")
        tokenizer = _made(str(path), lambda: BertTokenizer(vocab=str(path)), _BERT_SPECIAL)
    else:
        bpe.check_settings(folder)
        read_json(path)
        tokenizer = _made(bpe.names_of(folder), lambda: BertTokenizer.from_pretrained(str(folder)), _BERT_SPECIAL)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if size is not None:
        check_size(tokenizer, size, path)

    tokenizer.model_max_length = length
    return partial(token_ids, tokenizer)
