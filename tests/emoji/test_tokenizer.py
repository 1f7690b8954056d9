"""The emoji world's tokenizer files, as transformers reads them."""

import json
from collections import Counter

import pytest

from diffexp_jax.emoji import scenes, tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "made"
    tokenizer.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def clip_tokenizer(folder):
    return transformers.CLIPTokenizer.from_pretrained(folder)


def test_ids_run_as_in_clip(folder, clip_tokenizer):
    vocab = json.loads((folder / "vocab.json").read_text())
    assert [vocab[token] for token in ("!", "a", "Ń", "!</w>", "a</w>", "Ń</w>")] == [
        0,
        64,
        255,
        256,
        320,
        511,
    ]
    assert vocab["in"] == 512  # the first merge: of "washing", "riding", "playing", "doing", "driving"
    assert vocab["<|startoftext|>"] == len(vocab) - 2
    assert vocab["<|endoftext|>"] == len(vocab) - 1
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert len(clip_tokenizer) == len(vocab)


def test_special_tokens(clip_tokenizer):
    start, end = len(clip_tokenizer) - 2, len(clip_tokenizer) - 1
    ids = [getattr(clip_tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")]
    assert ids == [start, end, end, end]


def test_every_word_of_the_captions_is_one_token(clip_tokenizer):
    start, end = clip_tokenizer.bos_token_id, clip_tokenizer.eos_token_id
    captions = scenes.captions()
    for caption, ids in zip(captions, clip_tokenizer(captions).input_ids, strict=True):
        assert (ids[0], ids[-1]) == (start, end)
        assert clip_tokenizer.convert_ids_to_tokens(ids[1:-1]) == [f"{word}</w>" for word in caption.split()]


def test_padding_and_truncation_to_32(clip_tokenizer):
    assert clip_tokenizer.model_max_length == 32
    padded = clip_tokenizer(["a dog", ""], padding="max_length").input_ids
    start, end = clip_tokenizer.bos_token_id, clip_tokenizer.eos_token_id
    a, dog = clip_tokenizer.convert_tokens_to_ids(["a</w>", "dog</w>"])
    assert padded == [[start, a, dog] + [end] * 29, [start] + [end] * 31]
    cut = clip_tokenizer("a dog " * 40, padding="max_length", truncation=True).input_ids
    assert cut == [start] + [a, dog] * 15 + [end]


@pytest.mark.parametrize(
    "text, back",
    [
        ("A  DOG\nRiding a Bike", "a dog riding a bike"),
        ("ein Bär 🐻 im Wald!", "ein bär 🐻 im wald !"),
        ("Καλημέρα κόσμε, 漢字", "καλημέρα κόσμε , 漢字"),
        ("a dog's 12 bikes", "a dog 's 1 2 bikes"),
        ("\u200b\x00", "\u200b\x00"),
    ],
)
def test_any_text_survives(clip_tokenizer, text, back):
    """No token is unknown: bytes that no merge covers stand for themselves."""
    ids = clip_tokenizer(text).input_ids
    assert clip_tokenizer.eos_token_id not in ids[1:-1]
    assert clip_tokenizer.decode(ids, skip_special_tokens=True) == back


def test_merges_in_order_of_frequency():
    """ "ab" occurs three times; then "abc" twice, in one word; "b</w>" joins last."""
    assert tokenizer.learn_merges(Counter({"abc": 2, "ab": 1, "xb": 1})) == [
        ("a", "b"),
        ("ab", "c</w>"),
        ("a", "b</w>"),
        ("x", "b</w>"),
    ]


def test_deterministic(folder, tmp_path):
    tokenizer.write_tokenizer(tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_t5s_words_are_one_token_each(tmp_path):
    tokenizer.write_t5_tokenizer(tmp_path, length=12)
    t5 = transformers.T5Tokenizer.from_pretrained(tmp_path)
    captions = scenes.captions()
    for caption, ids in zip(captions, t5(captions).input_ids, strict=True):
        assert t5.convert_ids_to_tokens(ids) == [*(f"\u2581{word}" for word in caption.split()), "</s>"]
    tokens = t5.convert_ids_to_tokens(t5("a dog, 2 ox\u00e9n").input_ids)
    assert tokens == ["\u2581a", "\u2581dog", ",", "\u2581", "2", "\u2581", "o", "x", "<unk>", "n", "</s>"]
    assert t5("", padding="max_length").input_ids == [1] + [0] * 11
    assert len(t5("a dog " * 40, truncation=True).input_ids) == 12
