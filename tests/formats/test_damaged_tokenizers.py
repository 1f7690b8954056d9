"""Damaged files of tokenizers: one line that names the file, never a traceback, never other tokens."""

import gzip
import json
import shutil
from functools import partial

import pytest

from diffexp_jax.emoji.tokenizer import write_tokenizer
from diffexp_jax.errors import InputError
from diffexp_jax.formats import tokenizers
from diffexp_jax.formats.tokenizers import check_size, load_tokenizer

pytest.importorskip("transformers")
PROBE = ["a dog riding a bike, washing the dishes", "Zebra 12 \u00e9"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with vocab.json and merges.txt, and one with tokenizer.json."""
    folders = {name: tmp_path_factory.mktemp(name) / "tokenizer" for name in ("parts", "one")}
    write_tokenizer(folders["parts"])
    load_tokenizer(folders["parts"]).save_pretrained(folders["one"])
    return folders


@pytest.fixture
def parts(whole, tmp_path):
    return shutil.copytree(whole["parts"], tmp_path / "tokenizer")


def damaged(path, old: str, new: str):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def lines(path, change) -> None:
    path.write_text("\n".join(change(path.read_text().split("\n"))))


@pytest.mark.parametrize("keep", [0, 1, 2, 40, -2])
def test_merges_that_are_cut_at_the_end_of_a_line(parts, keep):
    """As an interrupted download leaves them: the library reads them, as another tokenizer."""
    lines(parts / "merges.txt", lambda x: x[:keep])
    with pytest.raises(InputError, match=r"merges\.txt: \d+ merges are missing, that of |merges.txt: merge 1 is ''"):
        load_tokenizer(parts)


def test_merges_that_are_cut_in_tokenizer_json(whole, tmp_path):
    folder = shutil.copytree(whole["one"], tmp_path / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"tokenizer\.json: 1 merges are missing"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "name, old, new, says",
    [
        ("merges.txt", "d o\n", "d o\nd o\n", "merges.txt: a merge is there twice"),
        ("merges.txt", "d o\n", "d q\n", "merges.txt: the merge 'd' 'q': the vocabulary .vocab.json. lacks one"),
        ("merges.txt", "d o\n", "d o x\n", "merges.txt: merge [0-9]+ is 'd o x'; wants two tokens"),
        ("merges.txt", "d o\n", "\n", "merges.txt: merge [0-9]+ is ''; wants two tokens"),
        ("vocab.json", "dog</w>", "dig</w>", "merges.txt: the merge .*: the vocabulary .vocab.json. lacks one"),
        ("vocab.json", '"!": 0', '"!": 1', "vocab.json: two tokens have the same id"),
        ("vocab.json", '"!": 0', '"!": -1', "vocab.json: wants a vocabulary"),
        ("vocab.json", '"!": 0', '"!": true', "vocab.json: wants a vocabulary"),
        ("vocab.json", '"!": 0', '"!": 100000', "a token of the tokenizer has the id 100000, and the network knows 0"),
        ("vocab.json", '"!": 0', '"! ": 0', "vocab.json: lacks '!', one of the symbols that stand for bytes"),
        ("vocab.json", "{", "[", "vocab.json: not readable as json"),
        (
            "tokenizer_config.json",
            "32",
            '"32"',
            "tokenizer_config.json.*the tokenizer's files are not",
        ),
        (
            "tokenizer_config.json",
            "32",
            "true",
            "tokenizer_config.json.*model_max_length is True; wants",
        ),
        ("tokenizer_config.json", "32", "2", "tokenizer_config.json.*model_max_length is 2; wants a whole number"),
        ("tokenizer_config.json", "32", "1e999", "tokenizer_config.json: not readable as json"),
        (
            "tokenizer_config.json",
            "32",
            "[" * 99 + "]" * 99,
            "tokenizer_config.json: not .*more than 64",
        ),
        ("special_tokens_map.json", '"<|endoftext|>"', "5", "special_tokens_map.json: the tokenizer's files are not"),
    ],
)
def test_a_damaged_file_is_named(parts, name, old, new, says):
    damaged(parts / name, old, new)
    with pytest.raises(InputError, match=says) as error:
        check_size(load_tokenizer(parts), 720, parts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
@pytest.mark.parametrize("content", [b"", b"\xff\xfe{", b"<html>", b"[1]", b"{"])
def test_a_file_of_something_else_is_named(parts, name, content):
    (parts / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}"):
        load_tokenizer(parts)


def test_a_token_that_is_not_the_network_s(parts):
    """A damaged special token becomes a new one, behind the last that the network knows."""
    size = len(load_tokenizer(parts))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        damaged(parts / name, '"bos_token": "<|startoftext|>"', '"bos_token": "<|stbrtoftext|>"')
    with pytest.raises(InputError, match=f"tokenizer: the tokenizer has {size + 1} tokens, and the network"):
        check_size(load_tokenizer(parts), size, parts)


# ------------------------------------------------------------------------------------------------------ what must load


def test_whole_ones_load_alike(whole):
    ids = [load_tokenizer(folder)(PROBE).input_ids for folder in whole.values()]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("kind", ["tokenizer.json", "added_tokens.json"])
def test_added_tokens(parts, tmp_path, kind):
    """As textual inversion adds them, saved by transformers 5 or 4."""
    tokenizer = load_tokenizer(parts)
    size = len(tokenizer)
    if kind == "tokenizer.json":
        tokenizer.add_tokens(["<cat-toy>"])
        tokenizer.save_pretrained(parts)
    else:
        (parts / kind).write_text(json.dumps({"<cat-toy>": size}))
    found = load_tokenizer(parts)
    assert len(found) == size + 1 and size in found("<cat-toy>").input_ids


def test_another_bpe(tmp_path):
    """Small ones, of a few letters, have tokens that no merge makes: nothing says that a merge is missing."""
    tokens = ["l", "o", "w</w>", "lo", "lowest</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nl o\n")
    assert load_tokenizer(tmp_path)("low").input_ids == [5, 3, 2, 6]


# ----------------------------------------------------------------------------------------------------------- of rewards


def small_vocabulary(folder, text: bytes) -> None:
    (folder / tokenizers.OPEN_CLIP_VOCABULARY).write_bytes(text)


def test_a_small_gzip_vocabulary(tmp_path):
    small_vocabulary(tmp_path, gzip.compress(b"version\nd o\ndo g</w>\n"))
    pytest.importorskip("ftfy")
    assert tokenizers.open_clip(tmp_path, size=516)(["dog"])[0][0, :3].tolist() == [514, 513, 515]
    with pytest.raises(InputError, match="the tokenizer has 516 tokens, and the network knows 49,408"):
        tokenizers.open_clip(tmp_path, size=49408)


packed = partial(gzip.compress, mtime=0)  # no time of day in it: workers must name the same tests


@pytest.mark.parametrize(
    "content, says",
    [
        (b"d o\n", "not readable as a gzip file of text .Not a gzipped file"),
        (b"", "merge 1 is|not readable|no CLIP|has 514"),
        (packed(b"version\nd o\n" * 1000)[:-9], "not readable as a gzip file of text .Compressed file ended"),
        (packed(b"version\nd o\n")[:10] + b"\xff" * 20, "not readable as a gzip file of text"),
        (packed(b"version\n\xff\xff"), "not readable as a gzip file of text .'utf-8' codec"),
        (packed(b"version\nd o\nd o\n"), "a merge is there twice"),
        (packed(b"version\nd o\nx\n"), "merge 2 is 'x'; wants two tokens"),
        (packed(bytes(2**24 + 1)), "not readable as a gzip file of text .longer than 16 MB"),
    ],
)
def test_a_damaged_gzip_vocabulary(tmp_path, content, says):
    """The last one is a bomb: what is beyond the bound is not unpacked."""
    small_vocabulary(tmp_path, content)
    with pytest.raises(InputError, match=rf"bpe_simple_vocab_16e6\.txt\.gz: ({says})|the tokenizer has 514") as error:
        tokenizers.open_clip(tmp_path, size=49408)
    assert "\n" not in str(error.value)


BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s"]


def bert_vocabulary(folder, tokens) -> None:
    (folder / "vocab.txt").write_bytes("\n".join([*tokens, ""]).encode())


def test_a_bert_vocabulary(tmp_path):
    bert_vocabulary(tmp_path, BERT)
    assert tokenizers.bert(tmp_path, size=10)(["a dogs"])[0][0, :5].tolist() == [2, 5, 6, 7, 3]


@pytest.mark.parametrize(
    "tokens, says",
    [
        (BERT[:-1], "the tokenizer has 9 tokens, and the network knows 10"),
        ([*BERT[:-1], "dog"], "a token is there twice"),
        ([], "lacks .PAD., .UNK., .CLS."),
        (BERT[5:], "lacks .PAD., .UNK., .CLS."),
        (["[PAD]", "[UNK]", "[CLX]", *BERT[3:]], "lacks .CLS.; wants"),
    ],
)
def test_a_damaged_bert_vocabulary(tmp_path, tokens, says):
    bert_vocabulary(tmp_path, tokens)
    with pytest.raises(InputError, match=rf"vocab\.txt: {says}"):
        tokenizers.bert(tmp_path, size=10)


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json"])
def test_a_bert_file_of_something_else(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match=name):
        tokenizers.bert(tmp_path, size=10)
