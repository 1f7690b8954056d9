"""Prompt sets: the built-in ones, files of every kind, and what is said about a bad one."""

import pytest

from diffexp_jax import InputError
from diffexp_jax.prompts import PROMPTS, files, load_prompts


@pytest.mark.parametrize(
    "name, size, first, last, last_phrases",
    [
        ("animals", 45, "a cat", "a kangaroo", ("kangaroo",)),
        ("animals_unseen", 6, "a snail", "an octopus", ("octopus",)),
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
    assert load_prompts("animals").texts[:4] == ("a cat", "a dog", "a horse", "a monkey")
    assert load_prompts("animal_activities").texts[3:6] == (
        "a dog washing the dishes",
        "a dog riding a bike",
        "a dog playing chess",
    )
    assert "an ant" in load_prompts("animals").texts


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
        ("a.txt", "a dog\n\n  a red   car \r\na dog\n", ("a dog", "a red car")),
        ("a.txt", "\ufeffa dog\rone\u2028line", ("a dog", "one line")),  # byte-order mark, old line ends
        ("a.TXT", "ein Bär", ("ein Bär",)),
        ("drawbench.csv", "Prompts,Category\nA red car.,Colors\n", ("A red car.",)),
        (
            "quoted.csv",
            'id,PROMPT\n1,"a dog, a cat"\n\n2,"a ""big""\ncow"\n3\n',
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
        ("hpd.json", '["A man.", " ", "A man.", "a cow"]', ("A man.", "a cow")),
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
            b"prompt\n" + b"x" * 200_000,
            "{path}: line 2 is not CSV: field larger than field limit (131072)",
        ),
        ("a.json", b'["a dog",\n', "{path}: line 2 is not JSON: Expecting value"),
        ("a.json", b'{"prompt": "a dog"}', "{path}: holds JSON of type dict; accepted: a list of strings"),
        ("a.json", b'["a dog", 3]', "{path}: item 1 is of type int; accepted: a list of strings"),
    ],
)
def test_bad_files(tmp_path, file, content, message):
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_prompts(path)
    assert str(error.value) == message.format(path=path)


@pytest.mark.parametrize("name", ["animal", "", "Animals", "some/folder", ".."])
def test_unknown_name(name):
    with pytest.raises(InputError) as error:
        load_prompts(name)
    assert str(error.value) == (
        f"unknown prompt set {name!r}; accepted: animals, animals_unseen, animal_activities, "
        f"animal_activities_unseen, unseen_activities, or the path of a file: {files.FORMATS}"
    )


def test_folder_is_no_prompt_file(tmp_path):
    (tmp_path / "set.txt").mkdir()
    with pytest.raises(InputError, match="cannot read the prompt file: Is a directory"):
        load_prompts(tmp_path / "set.txt")
