"""Which tokens of a prompt are weighted together."""

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from diffexp_jax.emoji.tokenizer import write_tokenizer
from diffexp_jax.formats import tokenizers
from diffexp_jax.formats.tokenizers import token_ids
from diffexp_jax.pipelines.stable_diffusion import load_tokenizer
from diffexp_jax.prompts import PROMPTS, PromptSet, units
from diffexp_jax.prompts.units import UNITS, unit_ids, units_of_text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def other():
    """A tokenizer of another kind, which ends a prompt as T5's does: a token is what blanks separate."""
    made = Tokenizer(WordLevel({"?": 0, "</s>": 1, "<pad>": 2}, unk_token="?"))
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"unk_token": "?", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=6, **names)


def ids_of(tokenizer, text, unit, phrases=("",)):
    """[(token, unit id)] of the prompt's tokens, without start, end and padding, which must be 0."""
    (row,) = unit_ids([tokenizer], PromptSet("test", (text,), (tuple(phrases),)), unit)
    assert row.shape == (32,)
    tokens = tokenizer.tokenize(text)[:30]
    assert row[0] == 0 and not row[1 + len(tokens) :].any()
    return [(token.removesuffix("</w>"), int(i)) for token, i in zip(tokens, row[1:], strict=False)]


@pytest.mark.parametrize(
    "unit, expected",
    [
        ("word", [("a", 1), ("dog", 2), (",", 0), ("riding", 3), ("a", 4), ("bike", 5), ("!", 0)]),
        ("token", [("a", 1), ("dog", 2), (",", 0), ("riding", 3), ("a", 4), ("bike", 5), ("!", 0)]),
        ("phrase", [("a", 0), ("dog", 1), (",", 0), ("riding", 2), ("a", 2), ("bike", 2), ("!", 0)]),
    ],
)
def test_literal(tokenizer, unit, expected):
    assert ids_of(tokenizer, "a dog, riding a bike!", unit, ("dog", "riding a bike")) == expected


def test_a_word_of_several_tokens_is_one_unit(tokenizer):
    words = ids_of(tokenizer, "a xylophone plays", "word")
    assert len(words) > 3 and words[0] == ("a", 1)
    pieces = [i for _, i in words[1:]]
    first = pieces.index(3)
    assert first > 1 and pieces[:first] == [2] * first and set(pieces[first:]) == {3}
    tokens = ids_of(tokenizer, "a xylophone plays", "token")
    assert [i for _, i in tokens] == list(range(1, len(tokens) + 1))


@pytest.mark.parametrize(
    "text, n_words",
    [
        ("don't", 1),
        ("the dog’s ball", 3),
        ("a well-known cat", 3),
        ("cat - dog", 2),
        ("3,000 km", 3),  # two numbers to the pattern; the comma is none
        ("snake_case", 2),
        ("CAPITALS too", 2),
        ("café au lait", 3),
        ("...", 0),
        ("", 0),
        ("🐶 dog", 1),
    ],
)
def test_what_a_word_is(tokenizer, text, n_words):
    ids = [i for _, i in ids_of(tokenizer, text, "word")]
    assert max(ids, default=0) == n_words
    assert set(ids) - {0} == set(range(1, n_words + 1))
    assert ids == sorted(ids) or 0 in ids


def test_phrases_are_found_in_their_order(tokenizer):
    found = ids_of(tokenizer, "dog bike dog bike dog", "phrase", ("dog", "dog"))
    assert [i for _, i in found] == [1, 0, 2, 0, 0]
    assert [i for _, i in ids_of(tokenizer, "a dog", "phrase", ("cat", "dog"))] == [0, 1]  # one is not in the text


@pytest.mark.parametrize("unit", UNITS)
def test_a_cut_prompt_has_the_units_that_are_left(tokenizer, unit):
    text = " ".join(["dog", "bike"] * 20)  # 40 tokens, 30 of which fit
    ids = ids_of(tokenizer, text, unit, text.split())
    assert [i for _, i in ids] == list(range(1, 31))


@pytest.mark.parametrize(
    "unit, first, second",
    [
        # a dog at 1 2 : 3 0 !, and: a dog at 12:30! </s> <pad>
        ("word", [1, 2, 3, 4, 4, 0, 5, 5, 0], [1, 2, 3, 4, 0, 0]),  # "12:30!" has two words and belongs to the first
        ("token", [1, 2, 3, 4, 5, 0, 6, 7, 0], [1, 2, 3, 4, 0, 0]),
        ("phrase", [0, 1, 0, 0, 0, 0, 2, 2, 0], [0, 1, 0, 2, 0, 0]),
    ],
)
def test_units_are_the_same_to_all_tokenizers(tokenizer, other, unit, first, second):
    """Numbered by spans of the text; each tokenizer's tokens find theirs."""
    text = "a dog at 12:30!"
    prompts = PromptSet("test", (text,), (("dog", "30"),))
    (row,) = unit_ids([tokenizer, other], prompts, unit)
    assert row.tolist() == [0, *first, *[0] * 22, *second]
    np.testing.assert_array_equal(row[:32], unit_ids([tokenizer], prompts, unit)[0])
    assert "".join(piece for piece, _ in units_of_text([tokenizer, other], text, row)) == text


def test_what_only_one_tokenizer_reads_has_units_too(tokenizer, other):
    """The shorter one cuts the prompt; numbers have no gaps."""
    text = " ".join(["dog"] * 8)
    for both in ([tokenizer, other], [other, tokenizer]):
        (row,) = unit_ids(both, PromptSet("test", (text,), ((text,),)), "word")
        of_first, of_other = np.split(row, [both[0].model_max_length])
        assert sorted((of_first.max(), of_other.max())) == [5, 8]
    (row,) = unit_ids([other, tokenizer], PromptSet("test", (text,), ((text,),)), "token")
    assert row.max() == 5 and row[6:].max() == 5  # what the first does not read is no token of its


@pytest.mark.parametrize("name", PROMPTS)
def test_every_built_in_prompt_has_its_units(tokenizer, name):
    prompts = PROMPTS[name]
    words, tokens, phrases = (unit_ids([tokenizer], prompts, unit) for unit in UNITS)
    np.testing.assert_array_equal(words.max(1), [len(text.split()) for text in prompts.texts])
    np.testing.assert_array_equal(words > 0, tokens > 0)
    np.testing.assert_array_equal(tokens.max(1), (tokens > 0).sum(1))
    np.testing.assert_array_equal(phrases.max(1), [len(found) for found in prompts.phrases])


@pytest.mark.parametrize(
    "text, unit, expected",
    [
        ("a dog, riding", "word", [("a", 1), (" ", 0), ("dog", 2), (", ", 0), ("riding", 3)]),
        ("a dog riding a bike!", "phrase", [("a ", 0), ("dog", 1), (" ", 0), ("riding a bike", 2), ("!", 0)]),
        ("", "word", []),
        ("?!", "word", [("?!", 0)]),
    ],
)
def test_units_of_text(tokenizer, text, unit, expected):
    (row,) = unit_ids([tokenizer], PromptSet("test", (text,), (("dog", "riding a bike"),)), unit)
    assert units_of_text([tokenizer], text, row) == expected


def test_of_a_very_long_prompt_only_what_the_tokenizer_reads_is_numbered(tokenizer):
    """As the beginning alone; and many prompts are read a few at once, with the same result."""
    text = "a dog " * 20
    short, long = PromptSet("x", (text,), ((text,),)), PromptSet("x", (text * 80_000,), ((text * 80_000,),))
    for unit in ("word", "token"):
        np.testing.assert_array_equal(unit_ids([tokenizer], long, unit), unit_ids([tokenizer], short, unit))
    ids, cut = token_ids(tokenizer, long.texts)
    np.testing.assert_array_equal(ids, token_ids(tokenizer, short.texts)[0])
    assert cut == list(long.texts)
    (numbers,) = unit_ids([tokenizer], long, "word")
    pieces = units_of_text([tokenizer], long.texts[0], numbers)
    assert pieces[:3] == [("a", 1), (" ", 0), ("dog", 2)] and sum(len(piece) for piece, _ in pieces) == 2**16


def test_many_prompts_are_read_a_few_at_once(tokenizer, monkeypatch):
    texts = tuple(f"a dog {'big ' * n}" for n in range(7))
    prompts = PromptSet("x", texts, tuple((text,) for text in texts))
    expected = unit_ids([tokenizer], prompts, "word")
    ids, cut = token_ids(tokenizer, texts)
    monkeypatch.setattr(units, "AT_ONCE", 3)
    monkeypatch.setattr(tokenizers, "AT_ONCE", 3)
    np.testing.assert_array_equal(unit_ids([tokenizer], prompts, "word"), expected)
    again, cut_again = token_ids(tokenizer, texts)
    np.testing.assert_array_equal(again, ids)
    assert cut == cut_again
