"""Prompt sets: the built-in ones, files of every kind, and what is said about a bad one."""

import csv
import os
import pickle
import re

import pytest

from diffexp_jax.errors import InputError
from diffexp_jax.prompts import PROMPTS, files, load_prompts, one_prompt, short_name


@pytest.mark.parametrize(
    "name, size, first, last, last_phrases",
    [
        ("animals", 45, "cat", "kangaroo", ("kangaroo",)),
        ("animals_unseen", 6, "snail", "octopus", ("octopus",)),
        ("animals_with_article", 45, "a cat", "a kangaroo", ("kangaroo",)),
        ("animals_unseen_with_article", 6, "a snail", "an octopus", ("octopus",)),
        (
            "animal_activities",
            135,
            "a cat washing the dishes",
            "a kangaroo playing chess",
            ("kangaroo", "playing chess"),
        ),
        (
            "animal_activities_unseen",
            18,
            "a snail washing the dishes",
            "an octopus playing chess",
            ("octopus", "playing chess"),
        ),
        ("unseen_activities", 135, "a cat doing laundry", "a kangaroo playing soccer", ("kangaroo", "playing soccer")),
    ],
)  # fmt: skip
def test_built_in_sets(name, size, first, last, last_phrases):
    prompts = load_prompts(name)
    assert (prompts.name, len(prompts), len(set(prompts.texts))) == (name, size, size)
    assert (prompts.texts[0], prompts.texts[-1], prompts.phrases[-1]) == (first, last, last_phrases)


def test_order_of_the_paper():
    """A prompt's id is its index, and per-prompt statistics go by it: the order must not move."""
    assert load_prompts("animals").texts[:4] == ("cat", "dog", "horse", "monkey")
    assert load_prompts("animal_activities").texts[3:6] == (
        "a dog washing the dishes",
        "a dog riding a bike",
        "a dog playing chess",
    )
    assert load_prompts("unseen_activities").texts[:3] == (
        "a cat doing laundry",
        "a cat driving a car",
        "a cat playing soccer",
    )
    assert "ant" in load_prompts("animals").texts and "an ant" in load_prompts("animals_with_article").texts


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_phrases_are_substrings(prompts):
    assert len(prompts.phrases) == len(prompts.texts)
    for text, phrases in zip(prompts.texts, prompts.phrases, strict=True):
        assert phrases and all(phrase in text for phrase in phrases)


@pytest.mark.parametrize("name", PROMPTS)
def test_names_match_keys(name):
    assert PROMPTS[name].name == name


@pytest.mark.parametrize(
    "file, content, texts",
    [
        ("a.txt", "a dog\n\n  a red   car \r\na dog\n", ("a dog", "a red car", "a dog")),  # as often as there
        ("a.txt", "\ufeffa dog\rone\u2028line", ("a dog", "one line")),  # byte-order mark, old line ends
        ("a.TXT", "ein Bär", ("ein Bär",)),
        ("drawbench.csv", "Prompts,Category\nA red car.,Colors\n", ("A red car.",)),
        (
            "quoted.csv",
            'id,PROMPT\n1,"a dog, a cat"\n\n2,"a ""big""\ncow"\n3,\n',
            ("a dog, a cat", 'a "big" cow'),
        ),
        (
            "drawbench.tsv",
            "Category\tPrompt\nConflicting\tA pizza cooking an oven.\n",
            ("A pizza cooking an oven.",),
        ),
        # PartiPrompts: quotes belong to the prompt; spreadsheets: they wrap the cell.
        (
            "parti.tsv",
            'Prompt\tNote\n"G I G" on a wall\tx\na "Fly" sign\ty\n',
            ('"G I G" on a wall', 'a "Fly" sign'),
        ),
        ("sheet.tsv", 'prompt\n"a ""Fly"" sign"\n', ('a "Fly" sign',)),
        ("hpd.json", '["A man.", " ", "A man.", "a cow"]', ("A man.", "A man.", "a cow")),
        # one column: a comma can only be the prompt's
        ("one.csv", "prompt\na dog, riding a bike\na cat, asleep\n", ("a dog, riding a bike", "a cat, asleep")),
        ("one.csv", 'prompt\n"a dog, big"\na "big" cat, asleep\n', ("a dog, big", 'a "big" cat, asleep')),
        ("blank.csv", "prompt,n\n,\na dog,1\n ,\n", ("a dog",)),
        ("long.csv", "prompt\n" + "x" * 200_000, ("x" * 200_000,)),
        ("separators.csv", 'n,prompt\n1,"a\u2028dog\vhere"\n', ("a dog here",)),
    ],
)
def test_files(tmp_path, file, content, texts):
    (tmp_path / file).write_bytes(content.encode())
    prompts = load_prompts(tmp_path / file)
    assert prompts.texts == texts
    assert prompts.name == file.split(".")[0]
    assert load_prompts(str(tmp_path / file)) == prompts


@pytest.mark.parametrize(
    "text, phrases",
    [
        ("a dog", ("a dog",)),
        ("A horse riding an astronaut.", ("A horse riding an astronaut",)),
        ("A red car, 3,000 km away, sunset!", ("A red car", "3,000 km away", "sunset")),
        ("a dog, , a cat,", ("a dog", "a cat")),
        ("...", ("...",)),
    ],
)
def test_comma_phrases(text, phrases):
    assert files.comma_phrases(text) == phrases


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("gone.txt", None, "{path}: cannot read the prompt file: No such file or directory"),
        ("a.pdf", b"a dog", f"{{path}}: unknown kind of prompt file '.pdf'; accepted: {files.FORMATS}"),
        ("noending", b"a dog", f"{{path}}: unknown kind of prompt file ''; accepted: {files.FORMATS}"),
        ("a.txt", b"", "{path}: no prompts in the file; it needs at least one"),
        ("a.txt", b" \n\n", "{path}: no prompts in the file; it needs at least one"),
        ("a.csv", b"prompt\n", "{path}: no prompts in the file; it needs at least one"),
        ("a.json", b"[]", "{path}: no prompts in the file; it needs at least one"),
        ("a.txt", b"a dog\na \xff cat", "{path}: line 2 (byte 8) is not UTF-8; save the file as UTF-8"),
        (
            "a.csv",
            b"text,id\na dog,1\n",
            "{path}: the first line names no column 'prompt' or 'prompts' (any case); found: 'text', 'id'",
        ),
        (
            "a.tsv",
            b"",
            "{path}: the first line names no column 'prompt' or 'prompts' (any case); found: ''",
        ),
        (
            "a.csv",
            b"prompt,seed\na cat,4\na dog, riding a bike,3\n",
            "{path}: line 3 is of 3 cells, the first line of 2: 'prompt', 'seed'; a cell that holds a comma is "
            "written in quotes",
        ),
        (
            "a.csv",
            b'id,prompt\n1,"a\ndog"\n2\n',
            "{path}: line 4 is of 1 cells, the first line of 2: 'id', 'prompt'; a cell that holds a comma is "
            "written in quotes",
        ),
        ("a.tsv", b"prompt\tid\na dog\tx\ty\n", "{path}: line 2 is of 3 cells, the first line of 2: 'prompt', 'id'"),
        (
            "a.csv",
            b'prompt\n"a dog, a cat\na cow\n',  # would swallow the rest
            "{path}: line 2 is not CSV: unexpected end of data; wants a cell with commas or quotes in quotes, and "
            "quotes in it doubled",
        ),
        (
            "a.csv",
            b'n,prompt\n1,"Fly" sign\n',  # would lose its quotes
            "{path}: line 2 is not CSV: ',' expected after '\"'; wants a cell with commas or quotes in quotes, and "
            "quotes in it doubled",
        ),
        (
            "a.csv",
            b"prompt,Prompts\na,b\n",
            "{path}: the first line names the column of the prompts twice; found: 'prompt', 'Prompts'",
        ),
        ("a.json", b'["a dog",\n', "{path}: line 2 is not JSON: Expecting value"),
        ("a.json", b'{"prompt": "a dog"}', "{path}: holds JSON of type dict; accepted: a list of strings"),
        (
            "a.json",
            b'["a dog", 3]',
            "{path}: item 1 is of type int; accepted: a list of strings, or of objects with 'prompt'",
        ),
        ("a.json", b'[{"text": "a dog"}]', "{path}: item 0 is an object without 'prompt', a string; found: 'text'"),
        ("a.json", b'[{"prompt": 3}]', "{path}: item 0 is an object without 'prompt', a string; found: 'prompt'"),
        ("a.jsonl", b'"a dog"\n\n{"prompt": "a cat"', "{path}: line 3 is not JSON: Expecting ',' delimiter"),
        (
            "a.jsonl",
            b'"a dog"\n["a cat"]',
            "{path}: line 2 is of type list; accepted: a list of strings, or of objects with 'prompt'",
        ),
        ("a.jsonl", b"\n \n", "{path}: no prompts in the file; it needs at least one"),
    ],
)
def test_bad_files(tmp_path, file, content, message):
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_prompts(path)
    assert str(error.value) == message.format(path=path)


@pytest.mark.parametrize(
    "file, content, metadata",
    [
        ("a.csv", "n, prompt ,Kind\n3,a  dog,x\n4,a cat,\n", [{"n": "3", "Kind": "x"}, {"n": "4", "Kind": ""}]),
        ("a.tsv", "prompt\tn\na dog\t3\na cat\t4\n", [{"n": "3"}, {"n": "4"}]),
        ("a.json", '[{"prompt": "a dog", "n": [1, null]}, "a cat"]', [{"n": [1, None]}, {}]),
        ("a.jsonl", '{"n": 3, "prompt": "a dog"}\n\n"a cat"\n', [{"n": 3}, {}]),
        ("a.csv", "prompt\na dog\na cat\n", [{}, {}]),
        ("a.txt", "a dog\na cat", [{}, {}]),
    ],
)
def test_what_a_file_says_beside_a_prompt(tmp_path, file, content, metadata):
    (tmp_path / file).write_text(content)
    texts = load_prompts(tmp_path / file).texts
    assert texts == ("a dog", "a cat") and texts[0].split() == ["a", "dog"]
    assert [dict(getattr(text, "metadata", {})) for text in texts] == metadata
    again = pickle.loads(pickle.dumps(texts))
    assert again == texts and [getattr(text, "metadata", {}) for text in again] == metadata


def test_a_prompt_that_is_there_twice_keeps_its_id(tmp_path):
    """Each line is a row; what is known of a prompt goes by the first of its rows."""
    (tmp_path / "p.txt").write_text("a dog\na cat\na  dog\na dog\n")
    prompts = load_prompts(tmp_path / "p.txt")
    assert len(prompts) == len(prompts.phrases) == 4 and prompts.ids == (0, 1, 0, 0)


@pytest.mark.parametrize("spec", ["prompt:a \udcff dog", "a \udcff dog", "\udcff.txt"])
def test_arguments_that_are_no_utf8(spec):
    with pytest.raises(InputError, match=r"^prompts: .* holds U\+DCFF, half a character"):
        load_prompts(spec)
    with pytest.raises(InputError, match=r"^prompt: .* holds U\+DCFF, half a character"):
        one_prompt(spec)


def test_half_a_character_in_json(tmp_path):
    (tmp_path / "p.json").write_text('["a dog", "\\ud800 a cat"]')
    with pytest.raises(InputError, match=r"p.json: .*\\ud800.*surrogates not allowed"):
        load_prompts(tmp_path / "p.json")


def test_files_that_are_none_or_too_large(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match="pipe.txt: cannot read the prompt file: not a regular file"):
        files.read_prompts(tmp_path / "pipe.txt")
    with open(tmp_path / "p.txt", "w") as file:
        file.truncate(2**30)  # takes no place
    with pytest.raises(InputError, match="p.txt: 1,024 MB of prompts; wants at most 256 MB"):
        load_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize(
    "prompt", ["a dog\nin rain", "a\u2028b\vc\x0cd\x1e", 'a "big" dog, a cat', "a\rb\r\nc", "x" * 200_000, "", " a "]
)
def test_a_table_of_prompts_goes_round(tmp_path, prompt):
    """As scripts/sample.py writes it."""
    rows = [("image", "prompt"), ("0.png", prompt), ("1.png", "a cat")]
    with open(tmp_path / "prompts.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    assert files.read_named_prompts(tmp_path / "prompts.csv") == dict(rows)


MEANT = {"animal": "; did you mean 'animals' or 'animals_unseen'?", "Animals": "; did you mean 'animals'?"}


@pytest.mark.parametrize("name", ["animal", "cat", "", "  ", "Animals", "some/folder", ".."])
def test_unknown_name(name):
    with pytest.raises(InputError) as error:
        load_prompts(name)
    assert str(error.value) == (
        f"unknown prompt set {name!r}; accepted: animals, animals_unseen, animals_with_article, "
        "animals_unseen_with_article, animal_activities, animal_activities_unseen, unseen_activities, prompt:TEXT, "
        f"a prompt of several words, or the path of a file: {files.FORMATS}{MEANT.get(name, '')}"
    )


def test_folder_is_no_prompt_file(tmp_path):
    (tmp_path / "set.txt").mkdir()
    with pytest.raises(InputError, match="cannot read the prompt file: Is a directory"):
        load_prompts(tmp_path / "set.txt")


# ------------------------------------------------------------------------------------------------------- rows of a file

# As they are published: DrawBench with a category that ends in a blank, PartiPrompts with quotes of the prompt's own.
DRAWBENCH = (
    "Prompts,Category\r\n"
    "A red colored car.,Colors\r\n"
    "A horse riding an astronaut.,Conflicting\r\n"
    '"A cube, made of brick.",Gary Marcus et al. \r\n'
    '"Photo of a ""cat""",Reddit\r\n'
    "A pizza cooking an oven.,Conflicting\r\n"
    "Hyper-realistic photo.,DALL-E\r\n"
)
PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings\n"
    '"Fly" sign on a wall\tArts\tImagination\t\n'
    "a tornado made of sharks\tAnimals\tImagination\tx\n"
)


@pytest.fixture
def published(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DrawBench.csv").write_bytes(DRAWBENCH.encode())
    (tmp_path / "PartiPrompts.tsv").write_text(PARTI)
    (tmp_path / "a.txt").write_text("a dog\n")


CONFLICTING = ("A horse riding an astronaut.", "A pizza cooking an oven.")


@pytest.mark.parametrize(
    "spec, name, texts",
    [
        ("DrawBench.csv:Category=Conflicting", "DrawBench-category-Conflicting", CONFLICTING),
        ("DrawBench.csv: CATEGORY = Conflicting ", "DrawBench-category-Conflicting", CONFLICTING),
        (
            "DrawBench.csv:Category=Conflicting|Gary Marcus et al. |Reddit",
            "DrawBench-category-Conflicting-Gary_Marcus_et_al.-Reddit",
            (CONFLICTING[0], "A cube, made of brick.", 'Photo of a "cat"', CONFLICTING[1]),  # the file's order
        ),
        (
            "DrawBench.csv:category=Gary Marcus et al.",
            "DrawBench-category-Gary_Marcus_et_al.",
            ("A cube, made of brick.",),
        ),
        (
            "PartiPrompts.tsv:Challenge=Imagination",
            "PartiPrompts-challenge-Imagination",
            ('"Fly" sign on a wall', "a tornado made of sharks"),
        ),
        ("./PartiPrompts.tsv:challenge=Basic", "PartiPrompts-challenge-Basic", ("bond",)),
        ("PartiPrompts.tsv:Note=", "PartiPrompts-note-", ('"Fly" sign on a wall',)),  # an empty cell
    ],
)
def test_rows_of_a_file(published, spec, name, texts):
    prompts = load_prompts(spec)
    assert (prompts.name, prompts.texts) == (name, texts)


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            "DrawBench.csv:Kategorie=Colors",
            "DrawBench.csv: no column 'Kategorie'; found: 'Prompts', 'Category'",
        ),
        (
            "DrawBench.csv:Category=Conflicting|colors",
            "DrawBench.csv: no row has Category='colors'; found: 'Colors', 'Conflicting', 'Gary Marcus et al.', "
            "'Reddit', 'DALL-E'",
        ),
        ("DrawBench.csv:Category=Colors|", "DrawBench.csv: no row has Category=''; found: 'Colors', 'Conflicting', "),
        (
            "PartiPrompts.tsv:Note=y",
            "PartiPrompts.tsv: no row has Note='y'; found: 'Biology-inspired concepts with multip...', '', 'x'",
        ),
        (
            "DrawBench.csv:Gary Marcus",  # no prompt of several words
            "DrawBench.csv: filter 'Gary Marcus'; wants FILE.csv:COLUMN=VALUE, several values joined by |",
        ),
        ("what a.csv: says", "what a.csv: filter ' says'; wants FILE.csv:COLUMN=VALUE"),
        ("DrawBench.csv:=Colors", "DrawBench.csv: filter '=Colors'; wants FILE.csv:COLUMN=VALUE"),
        ("gone.csv:Category=Colors", "gone.csv: cannot read the prompt file: No such file or directory"),
        ("a.txt:Category=Colors", "a.txt: a .txt file has no columns to filter by; accepted: .csv, .tsv"),
    ],
)
def test_bad_filters(published, spec, message):
    with pytest.raises(InputError) as error:
        load_prompts(spec)
    assert str(error.value).startswith(message)


def test_errors_show_some_of_many_values(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,n\n" + "".join(f"p{n},{n}\n" for n in range(1000)))
    with pytest.raises(InputError) as error:
        load_prompts(f"{tmp_path / 'a.csv'}:n=x")
    assert str(error.value).endswith("found: '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', and 990 more")


def test_a_file_may_be_called_like_a_filter(tmp_path):
    (tmp_path / "a.csv:b=c.txt").write_text("a dog\n")
    assert load_prompts(tmp_path / "a.csv:b=c.txt").texts == ("a dog",)


# ------------------------------------------------------------------------------------------------------- single prompts


@pytest.mark.parametrize(
    "spec, name, text, phrases",
    [
        (
            "a dolphin riding a bike",
            "a_dolphin_riding_a_bike",
            "a dolphin riding a bike",
            ("a dolphin riding a bike",),
        ),
        ("prompt:cat", "cat", "cat", ("cat",)),
        ("prompt: a  big\tcat ", "a_big_cat", "a big cat", ("a big cat",)),
        ("A red car.", "A_red_car.", "A red car.", ("A red car",)),
        ("prompt:what a.csv: says", "what_a.csv__says-5b34d9e3", "what a.csv: says", ("what a.csv: says",)),
        ("a dog/cat, old", "a_dog_cat__old-7215f48d", "a dog/cat, old", ("a dog/cat", "old")),
    ],
)
def test_single_prompts(spec, name, text, phrases):
    prompts = load_prompts(spec)
    assert (prompts.name, prompts.texts) == (name, (text,))
    assert prompts.phrases == (phrases,)


def test_a_file_goes_before_a_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my prompts.txt").write_text("a dog\n")
    (tmp_path / "my prompts").write_text("a dog\n")
    assert load_prompts("my prompts.txt").texts == ("a dog",)
    with pytest.raises(InputError, match="my prompts: unknown kind of prompt file ''"):
        load_prompts("my prompts")
    with pytest.raises(InputError, match="my prompt.txt: cannot read the prompt file: No such file or directory"):
        load_prompts("my prompt.txt")
    with pytest.raises(InputError, match="^prompt:TEXT: has no text$"):
        load_prompts("prompt: ")


def test_names_differ_and_belong_in_metrics_and_files():
    words = ["a b", "a_b", "a/b", "a-b", "a b ", "ab" * 60, "ab" * 60 + "c", "é"]
    names = [short_name(*some) for some in [*((word,) for word in words), ("a", "b"), ("x", "a", "b"), ("b", "a")]]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w.-]{1,90}", name) for name in names)
