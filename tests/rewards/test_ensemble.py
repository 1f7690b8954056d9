"""Several rewards at once, TextNorm, and the words that name them; and scripts/score.py."""

import csv
import json
from argparse import Namespace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffexp_jax import parallel
from diffexp_jax.chosen_rewards import load_rewards
from diffexp_jax.cli import score
from diffexp_jax.errors import InputError
from diffexp_jax.experiment import Experiment
from diffexp_jax.formats.pictures import read_picture
from diffexp_jax.rewards import BUILTINS, load_reward, spec
from diffexp_jax.rewards.ensemble import ensemble
from diffexp_jax.rewards.preprocess import as_floats
from diffexp_jax.rewards.reward import of_pixels
from diffexp_jax.rewards.scoring import batches_by_shape, make_scorer
from diffexp_jax.rewards.textnorm import from_file, swapped, textnorm
from diffexp_jax.settings import checked
from tests.support import ROOT


def constant(offset):
    """offset + the image's brightness x the length of its prompt; the part "length"."""

    def score_prepared(params, pixels, tokens):
        length = tokens[:, 0].astype(jnp.float32)
        return params["offset"] + pixels.mean((1, 2, 3)) * length, {"length": length}

    def tokenize(texts):
        return np.array([[len(text)] for text in texts], np.int32)

    params = {"offset": jnp.float32(offset)}
    return of_pixels(params, tokenize=tokenize, pixels=lambda x: x, prepare=as_floats, score_prepared=score_prepared)


def test_blocks_are_those_of_all_parts_with_weights():
    """A part of another kind may mean something else by the name."""
    first, second = (constant(1.0)._replace(blocks=blocks) for blocks in (("a", "b"), ("b", "c")))
    without = constant(1.0)._replace(params={}, blocks=())
    assert ensemble({"x": first, "y": second, "z": without}, [1, 1, 1]).blocks == ("b",)
    assert ensemble({"x": first, "y": constant(1.0)}, [1, 1]).blocks == ()
    assert ensemble({"z": without}, [1]).blocks == ()


def test_blocks_as_a_loop_give_the_same_rewards(make_config, tiny_clip):
    """Of a sum, and with textnorm, as a run's programs and its evaluation read them."""
    images = np.random.default_rng(0).uniform(size=(2, 16, 16, 3)).astype(np.float32)
    spec = f"pickscore:{tiny_clip}+textnorm(emoji_pickscore)"
    found = {}
    for way in ("false", "true"):
        experiment = Experiment.build(checked(make_config("ddpo", {"reward": spec, "model.scan_layers": way})))
        params = parallel.first(parallel.share(experiment.frozen.reward))
        names = {name for path, _ in jax.tree.leaves_with_path(params) for name in map(str, path) if "+'" in name}
        assert bool(names) == (way == "true")
        tokens = jax.tree.map(lambda x: x[:2], experiment.train.tokens[experiment.reward])
        found[way] = experiment.trained.score(params, images, tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found["true"], found["false"])


IMAGES = np.ones((2, 4, 4, 3), np.float32) * np.array([0.5, 1.0], np.float32)[:, None, None, None]
TEXTS = ["four", "sixsix"]


@pytest.mark.parametrize("weights", [(10.0, 1.0, 0.05), (2.0, 0.0, -3.0), (1, 1, 1)])
@pytest.mark.parametrize("path", ["score", "score_prepared"])
def test_the_parts_sum_to_the_whole(weights, path):
    rewards = {"pickscore_cosine": constant(0.25), "mine": constant(3), "aesthetic": constant(5)}
    reward = ensemble(rewards, weights)
    tokens, images = reward.tokenize(TEXTS), IMAGES
    if path == "score_prepared":
        prepared = [reward.prepare((image * 255).astype(np.uint8)) for image in IMAGES]
        images = jax.tree.map(lambda *x: np.stack(x), *prepared)
    total, parts = jax.jit(getattr(reward, path))(reward.params, images, tokens)
    np.testing.assert_allclose(parts["mine"], [3 + 2, 3 + 6], atol=0.05)
    np.testing.assert_array_equal(parts["mine/length"], [4, 6])
    np.testing.assert_allclose(total, sum(f * parts[name] for f, name in zip(weights, rewards, strict=True)), rtol=1e-6)
    assert len(parts) == 6


@pytest.mark.parametrize("path", ["score", "score_prepared"])
def test_what_rewards_disagree_about_earns_less(path):
    """r + 1, r + 3 and r + 5 of r = 2 and 6: the mean r + 3, the variance 8 / 3, of which a quarter is subtracted."""
    rewards = {"a": constant(1), "b": constant(3), "c": constant(5)}
    reward = ensemble(rewards, [1 / 3] * 3, uncertainty=0.25)
    images = {name: IMAGES for name in "abc"} if path == "score_prepared" else IMAGES
    total, parts = getattr(reward, path)(reward.params, images, reward.tokenize(TEXTS))
    np.testing.assert_allclose(parts["variance"], [8 / 3, 8 / 3], rtol=1e-6)
    np.testing.assert_allclose(total, [5 - 2 / 3, 9 - 2 / 3], rtol=1e-6)


def test_the_variance_is_of_textnorms_alone(make_config, tiny_clip):
    """A sum of others, and a single one, have none: the trained reward is refused, another is what it was."""
    norm = f"textnorm(pickscore:{tiny_clip})"
    two = f"{norm}+textnorm(clip_similarity:{tiny_clip})"
    found = load_reward(two, uncertainty=0.5)
    images = np.random.default_rng(0).uniform(size=(1, 16, 16, 3)).astype(np.float32)
    total, parts = jax.jit(found.score)(found.params, images, found.tokenize(["a dog"]))
    each = np.array([parts["textnorm_pickscore"], parts["textnorm_clip_similarity"]])
    np.testing.assert_allclose(total, each.mean(0) - 0.5 * each.var(0), rtol=1e-5)
    alone = load_reward(norm, uncertainty=0.5)
    assert jax.eval_shape(alone.score, alone.params, images, alone.tokenize(["a dog"]))[1].keys() == {"raw"}
    for reward in (norm, f"{norm}+clip_similarity:{tiny_clip}"):
        settings = checked(make_config("ddpo", {"reward": reward, "textnorm.uncertainty": 0.5}))
        with pytest.raises(InputError, match="textnorm.uncertainty=0.5: the reward .* has no variance among models"):
            load_rewards(settings)


def test_gradient_of_an_ensemble():
    reward = ensemble({"a": constant(1), "b": constant(2)}, (2.0, 3.0))
    tokens = reward.tokenize(TEXTS)
    gradient = jax.jit(jax.grad(lambda x: reward.score(reward.params, x, tokens)[0].sum()))(IMAGES)
    np.testing.assert_allclose(gradient.sum((1, 2, 3)), [5 * 4, 5 * 6], rtol=1e-6)


def test_shipped_ensemble():
    """By its spec, with the literature's weights and with others."""
    images = np.random.default_rng(0).uniform(size=(2, 64, 64, 3)).astype(np.float32)
    texts = ["a dog riding a bike", "an ant"]
    for weights, (first, second) in {(): (1.0, 0.05), (2.0, 3.0): (2.0, 3.0)}.items():
        reward = load_reward("emoji_pickscore+emoji_aesthetic", weights=weights)
        total, parts = jax.jit(reward.score)(reward.params, images, reward.tokenize(texts))
        assert parts.keys() == {"emoji_pickscore", "emoji_aesthetic"}
        expected = first * parts["emoji_pickscore"] + second * parts["emoji_aesthetic"]
        np.testing.assert_allclose(total, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "text, kwargs, message",
    [
        ("emoji_pickscore+emoji_judge", {"weights": (1.0,)}, "1 weights for 2 rewards .emoji_pickscore.emoji_judge."),
        ("emoji_judge", {"weights": (1.0,)}, "1 weights for one reward; wants none"),
        ("textnorm(emoji_pickscore)", {"temperature": 0.0}, "textnorm: temperature 0.0: wants more than 0"),
        ("textnorm(emoji_pickscore)", {"contrast": "no.json"}, "no.json: the file is missing"),
    ],
)
def test_bad_settings(text, kwargs, message):
    with pytest.raises(InputError, match=message):
        load_reward(text, **kwargs)


SPECS = {
    "hpsv2:P": (["hpsv2"], "hpsv2"),
    "hpsv2:P+aesthetic:Q+pickscore:R": (["hpsv2", "aesthetic", "pickscore"], "hpsv2+aesthetic+pickscore"),
    "aesthetic:a/sac+logos+ava1-l14.pth+emoji_judge": (["aesthetic", "emoji_judge"], "aesthetic+emoji_judge"),
    "textnorm(pickscore:R)": (["pickscore"], "textnorm_pickscore"),
    "textnorm(hpsv2:P)+pickscore_26:R": (["hpsv2", "pickscore_26"], "textnorm_hpsv2+pickscore_26"),
    "emoji_judge+textnorm(emoji_pickscore)": (
        ["emoji_judge", "emoji_pickscore"],
        "emoji_judge+textnorm_emoji_pickscore",
    ),
}


@pytest.mark.parametrize("text", SPECS)
def test_names(text):
    names, reported = SPECS[text]
    found = spec.parse(text, BUILTINS)
    assert [part.name for part in found.parts] == names and found.name == reported
    assert "+".join(f"textnorm({part.bare})" if part.normed else part.bare for part in found.parts) == text


def test_weights_of_the_literature():
    """DRaFT's and PRDP's 10, 2 and 0.05; the first is of a cosine, that of PickScore's logit a hundredth."""
    weights = {name: builtin.weight for name, builtin in BUILTINS.items() if builtin.weight != 1.0}
    cosines = {"pickscore_cosine": 10.0, "clip_similarity": 10.0, "hpsv2": 2.0}
    others = {"pickscore": 0.1, "pickscore_26": 2.6, "aesthetic": 0.05, "emoji_aesthetic": 0.05}
    assert weights == cosines | others


# ------------------------------------------------------------------------------------------------------------- textnorm


def test_textnorm_by_known_numbers():
    """r = brightness x length: prompts of 4 against 2 and 6 letters, and of 6 against 4; 0.5 and 1 bright; tau 2."""
    reward = textnorm(constant(7.0), {"four": ["12", "123456"], "sixsix": ["1234"]}.__getitem__, temperature=2.0)
    tokens = reward.tokenize(TEXTS)
    for scores, parts in (
        jax.jit(reward.score)(reward.params, IMAGES, tokens),
        jax.jit(reward.score_prepared)(reward.params, IMAGES, tokens),
    ):
        first = 1 / (1 + np.exp(-0.5) + np.exp(0.5))
        np.testing.assert_allclose(scores, [first, 1 / (1 + np.exp(-1))], rtol=1e-5)
        np.testing.assert_allclose(parts["raw"], [9, 13])


def test_textnorm_gradient_is_finite_and_right():
    reward = textnorm(constant(0.0), {"four": ["12", "123456"], "sixsix": ["1234"]}.__getitem__)
    tokens = reward.tokenize(TEXTS)
    gradient = jax.jit(jax.grad(lambda x: reward.score(reward.params, x, tokens)[0].sum()))(IMAGES).sum((1, 2, 3))
    p = 1 / (1 + np.exp(2.0))  # of the other prompt, of the second image
    np.testing.assert_allclose(gradient[1], 2 * p * (1 - p), rtol=1e-4)
    assert np.isfinite(gradient).all()


def test_textnorm_of_the_shipped_reward():
    reward = load_reward("textnorm(emoji_pickscore)")
    images = np.random.default_rng(0).uniform(size=(2, 64, 64, 3)).astype(np.float32)
    scores, parts = jax.jit(reward.score)(reward.params, images, reward.tokenize(["a dog riding a bike", "an ant"]))
    assert ((scores > 0) & (scores < 1)).all()
    plain = load_reward("emoji_pickscore")
    raw, _ = jax.jit(plain.score)(plain.params, images, plain.tokenize(["a dog riding a bike", "an ant"]))
    np.testing.assert_allclose(parts["raw"], raw, rtol=1e-4)


def test_a_reward_without_prompts_has_no_contrast():
    with pytest.raises(InputError, match="textnorm: the reward reads no prompts"):
        load_reward("textnorm(emoji_aesthetic)").tokenize(["a dog"])


def test_swapped():
    others = swapped("A photo of a dog riding a bike.")
    assert others[:2] == ["A photo of a dog washing the dishes.", "A photo of a dog playing chess."]
    assert others[5:7] == ["A photo of a horse riding a bike.", "A photo of a monkey riding a bike."]
    assert len(others) == 10 and "A photo of a dog riding a bike." not in others
    assert swapped("an ant")[0] == "a butterfly" and len(swapped("an ant")) == 5
    assert swapped("beetle")[:2] == ["ant", "butterfly"]
    for text in ("a robot", "a cat and a dog"):
        with pytest.raises(InputError, match="no contrastive prompts for"):
            swapped(text)


def test_contrast_from_a_file(tmp_path):
    (tmp_path / "c.json").write_text('{"a": ["b", "c"]}')
    contrast = from_file(tmp_path / "c.json")
    assert contrast("a") == ["b", "c"]
    with pytest.raises(InputError, match="c.json: has no contrastive prompts for 'z'"):
        contrast("z")
    (tmp_path / "c.json").write_text('{"a": []}')
    with pytest.raises(InputError, match="c.json: 'a': wants a list of prompts, at least one"):
        from_file(tmp_path / "c.json")


# ----------------------------------------------------------------------------------------------------- scripts/score.py


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("b.png", (64, 64, 3)), ("a.jpg", (80, 64, 3)), ("c.PNG", (64, 70, 4))):
        Image.fromarray(rng.integers(0, 255, size, np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.md").write_text("no picture")
    return tmp_path


def arguments(folder: Path, **changes) -> Namespace:
    usual = dict(reward=["emoji_pickscore", "emoji_aesthetic"], images=[folder], prompts=folder / "p.txt", batch=2)
    return Namespace(**usual | dict(out=folder / "scores.csv", temperature=1.0, contrast=None, compare=False) | changes)


PROMPTS = {"a.jpg": "a dog", "b.png": "an ant, red", "c.PNG": "a cat"}


@pytest.mark.parametrize(
    "name, content",
    [
        ("p.txt", "\n".join(PROMPTS.values()) + "\n"),
        ("p.json", json.dumps(PROMPTS)),
        ("p.csv", "image,prompt\n" + "\n".join(f'{name},"{text}"' for name, text in PROMPTS.items())),
    ],
)
def test_prompt_files(pictures, name, content):
    (pictures / name).write_text(content)
    images = score.find_images([pictures])
    assert [path.name for path in images] == list(PROMPTS)
    assert score.find_prompts(pictures / name, images) == list(PROMPTS.values())


def test_score(pictures, capsys):
    prompts = PROMPTS
    (pictures / "p.txt").write_text("\n".join(prompts.values()))
    score.main(arguments(pictures))
    with open(pictures / "scores.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    assert list(rows[0]) == ["image", "prompt", "emoji_pickscore", "emoji_aesthetic"]
    assert {Path(row["image"]).name: row["prompt"] for row in rows} == prompts
    images = [read_picture(pictures / name).pixels for name in prompts]
    for name in ("emoji_pickscore", "emoji_aesthetic"):
        reward = load_reward(name)
        expected = make_scorer(reward, batch=3)(images, reward.tokenize(list(prompts.values())))[""]
        np.testing.assert_allclose([float(row[name]) for row in rows], expected, atol=1e-4)
    assert "emoji_aesthetic: mean" in capsys.readouterr().out


@pytest.fixture
def sampled(tmp_path):
    """What scripts/sample.py leaves of two prompts with --lora."""
    rng = np.random.default_rng(0)
    with open(tmp_path / "prompts.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "prompt"))
        for i, text in enumerate(("a dog", "a cat, big")):
            for name in (f"{i:04d}.png", f"{i:04d}-base.png"):
                Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / name)
                table.writerow((name, text))
    Image.fromarray(np.zeros((99, 99, 3), np.uint8)).save(tmp_path / "grid.png")
    return tmp_path


def test_score_what_was_sampled(sampled, capsys):
    """Without --prompts: the pictures that were asked for, not the grid, nor those beside them unless named."""
    score.main(arguments(sampled, reward=["emoji_pickscore"], prompts=None))
    assert "3 pictures passed over: grid.png, and those that are there to compare, which" in capsys.readouterr().out
    with open(sampled / "scores.csv", newline="") as table:
        rows = [(Path(row["image"]).name, row["prompt"]) for row in csv.DictReader(table)]
    assert rows == [("0000.png", "a dog"), ("0001.png", "a cat, big")]
    base = [sampled / "0000-base.png", sampled / "0001-base.png"]
    assert score.find_images(base) == base and score.known_prompts(None, base) == ["a dog", "a cat, big"]


def test_score_what_was_sampled_and_what_it_is_compared_with(sampled, capsys):
    """--compare: a mean for each kind; the grid is of no use."""
    score.main(arguments(sampled, reward=["jpeg_compressibility"], prompts=None, compare=True))
    said = capsys.readouterr().out
    assert "1 pictures passed over: grid.png\n" in said
    assert "jpeg_compressibility, base: mean " in said and "\njpeg_compressibility: mean " in said
    assert said.count(" 2 images") == 2
    with open(sampled / "scores.csv", newline="") as table:
        assert [Path(row["image"]).name for row in csv.DictReader(table)][:2] == ["0000-base.png", "0000.png"]


def test_a_picture_of_that_name_elsewhere_counts(pictures):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(pictures / "grid.png")
    assert "grid.png" in [path.name for path in score.find_images([pictures])]


def test_score_by_a_function_that_takes_any_size(pictures):
    """In batches of two: those that follow each other and are of one size."""
    score.main(arguments(pictures, reward=["jax:sample_rewards:brightness"], prompts=None))
    with open(pictures / "scores.csv", newline="") as table:
        found = {Path(row["image"]).name: float(row["brightness"]) for row in csv.DictReader(table)}
    for name, value in found.items():
        assert value == pytest.approx(read_picture(pictures / name).pixels[..., :3].mean() / 255, abs=1e-5)


def test_batches_by_shape():
    trees = [{"x": np.zeros(n)} for n in (1, 1, 1, 2, 1)]
    assert [len(batch) for batch in batches_by_shape(iter(trees), 2)] == [2, 1, 1, 1]
    assert list(batches_by_shape([], 2)) == []


def test_score_without_prompts(pictures):
    score.main(arguments(pictures, reward=["emoji_aesthetic"], prompts=None, images=[pictures / "b.png"]))
    with pytest.raises(InputError, match="--prompts is missing: the reward 'emoji_pickscore' reads prompts"):
        score.main(arguments(pictures, prompts=None))


@pytest.mark.parametrize(
    "changes, prompts, message",
    [
        ({}, "a\nb", "p.txt: 2 lines for 3 images; wants one for each"),
        ({}, None, "p.txt: cannot read the prompt file: No such file"),
        ({"batch": 0}, "a\nb\nc", "--batch 0: wants 1.."),
        ({"reward": ["beauty"]}, "a\nb\nc", "unknown reward 'beauty'"),
        ({"reward": ["emoji_judge", "emoji_judge"]}, "a\nb\nc", "names a reward twice"),
        ({"images": [Path("no")]}, "a\nb\nc", "--images no: no such file or folder"),
        ({"out": Path(__file__) / "y.csv"}, "a\nb\nc", "test_ensemble.py: cannot be written"),
        ({"out": ROOT}, "a\nb\nc", "is a folder; wants the .csv file to write"),
    ],
)
def test_score_mistakes(pictures, changes, prompts, message):
    if prompts is not None:
        (pictures / "p.txt").write_text(prompts)
    with pytest.raises(InputError, match=message) as error:
        score.main(arguments(pictures, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.json", '{"a.jpg": "x", "c.PNG": 3}', 'no prompt for "b.png", "c.PNG"'),
        ("p.csv", "a.jpg,x\nb.png,x,y", "p.csv: line 2: 3 cells; wants two columns, an image's name and its prompt"),
        ("p.csv", "a.jpg,x\na.jpg,y", "p.csv: line 2: another prompt for 'a.jpg'; wants one for each picture"),
        ("p.json", "[]", "p.json: holds JSON of type list; accepted: an object"),
        ("p.json", '{"a.jpg": "\\ud800"}', "p.json: .*surrogates not allowed"),
        ("p.doc", "x", "accepted: .txt .a line per image., .json or .csv"),
    ],
)
def test_score_prompt_files(pictures, name, content, message):
    (pictures / name).write_text(content)
    with pytest.raises(InputError, match=message):
        score.main(arguments(pictures, prompts=pictures / name))


def test_score_pictures_that_are_none(pictures):
    (pictures / "b.png").write_bytes(b"no")
    (pictures / "p.txt").write_text("a\nb\nc")
    with pytest.raises(InputError, match="b.png: not a readable picture"):
        score.main(arguments(pictures))
    (pictures / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no pictures in the folder; accepted: .apng, .avif"):
        score.main(arguments(pictures, images=[pictures / "empty"]))
    (pictures / "empty" / "x.heic").write_bytes(b"")
    with pytest.raises(InputError, match="; it holds x.heic$"):
        score.find_images([pictures / "empty"])


@pytest.fixture
def numbered(tmp_path):
    """0.png to 11.png, the brighter the higher; line n of lines.txt is "prompt n"."""
    for n in range(12):
        Image.fromarray(np.full((8, 8, 3), 20 * n, np.uint8)).save(tmp_path / f"{n}.png")
    (tmp_path / "lines.txt").write_text("".join(f"prompt {n}\n" for n in range(12)))
    return tmp_path


def test_pictures_and_lines_are_paired_by_number(numbered, capsys):
    changes = {"reward": ["jax:sample_rewards:brightness"], "prompts": numbered / "lines.txt"}
    score.main(arguments(numbered, **changes))
    assert "lines.txt: line 1 is for 0.png, ..., line 12 for 11.png" in capsys.readouterr().out
    with open(numbered / "scores.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    assert [(Path(row["image"]).name, row["prompt"]) for row in rows] == [
        (f"{n}.png", f"prompt {n}") for n in range(12)
    ]
    np.testing.assert_allclose([float(row["brightness"]) for row in rows], np.arange(12) * 20 / 255, atol=1e-5)
    named = sorted(numbered.glob("*.png"))  # as a shell gives them: 0, 1, 10, 11, 2
    with pytest.raises(InputError, match="is line 3 for 10.png, which --images names there. Give the folder"):
        score.main(arguments(numbered, **changes, images=named))
    assert score.find_prompts(numbered / "lines.txt", named[::-1])[0] == "prompt 0"  # an order of one's own


def test_what_is_passed_over_is_named(numbered, capsys):
    """Every ending that Pillow knows of the formats is found; files that are no pictures by their names are named."""
    for name in ("a.JPE", "b.jfif", "c.tiff", "d.apng"):
        Image.new("RGB", (8, 8)).save(numbered / name, "PNG")
    (numbered / "e.heic").write_bytes(b"")
    (numbered / "inner").mkdir()
    found = [path.name for path in score.find_images([numbered])]
    assert found == [*(f"{n}.png" for n in range(12)), "a.JPE", "b.jfif", "c.tiff", "d.apng"]
    said = "2 files and folders passed over, no pictures by their names: e.heic, inner\n"
    assert capsys.readouterr().out.endswith(said)


def test_what_is_odd_about_pictures_is_said_once(numbered, capsys):
    for name in ("2.png", "3.png"):
        Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(numbered / name)
    score.main(arguments(numbered, reward=["jax:sample_rewards:brightness"], prompts=None))
    out = capsys.readouterr().out
    assert out.count("note: ") == 1 and "note: 2 of 12 pictures (2.png, 3.png) are transparent: " in out


def test_large_pictures_are_read_one_by_one(numbered, monkeypatch):
    paths = score.find_images([numbered])
    assert list(score.batches(paths, 5)) == [slice(0, 5), slice(5, 10), slice(10, 12)]
    monkeypatch.setattr(score.pictures, "MOST_PIXELS", 2 * 64)
    assert list(score.batches(paths[:5], 5)) == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_a_name_that_is_no_utf8(tmp_path):
    path = tmp_path / "a\udcff.png"
    Image.new("RGB", (8, 8)).save(path)
    score.main(arguments(tmp_path, reward=["jax:sample_rewards:brightness"], prompts=None, images=[path]))
    assert "a\\udcff.png,,0.000000" in (tmp_path / "scores.csv").read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------- prompts that are cut


def test_prompts_that_a_reward_cuts_are_named_once(tiny_clip, caplog):
    """With the reward and what it reads; also where the reward is part of another."""
    long = "a dog " + "riding a bike " * 20
    reward = load_reward(f"jpeg_compressibility+textnorm(pickscore:{tiny_clip})")
    for _ in range(2):
        reward.tokenize(["a dog", long])
    said = [record.getMessage() for record in caplog.records if "tokens of a prompt" in record.getMessage()]
    contrasts = len(swapped(long))
    assert len(said) == 1 and f"reward pickscore:{tiny_clip}: reads 32 tokens of a prompt; prompts are cut" in said[0]
    assert repr(f"{long[:57]}...") in said[0] and said[0].endswith(f" and {contrasts - 2:,} others")
    other = load_reward(f"pickscore:{tiny_clip}")
    other.tokenize(["a cat"])
    other.tokenize([long])
    assert "prompt is cut to that: 'a dog riding" in caplog.records[-1].getMessage()
    with pytest.raises(InputError, match=r"reward pickscore:.* holds U\+D800, half a character"):
        other.tokenize(["\ud800 a dog"])
