"""The user's own rewards: functions of JAX, plain Python in threads on the host."""

import re
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sample_rewards
from PIL import Image
from tqdm import tqdm

from diffexp_jax import command
from diffexp_jax.errors import BadRewardError, InputError, RewardError
from diffexp_jax.experiment import Experiment
from diffexp_jax.prompts import load_prompts
from diffexp_jax.rewards import jpeg, load_reward, parsed_spec
from diffexp_jax.rewards.reward import no_tokens
from diffexp_jax.rewards.scoring import make_scorer
from diffexp_jax.settings import checked

IMAGES = np.random.default_rng(0).integers(256, size=(5, 16, 16, 3)).astype(np.uint8)
TEXTS = ["a dog", "an ant", "a dog", "a cat riding a bike", "a bee"]


def scores_of(spec, images=IMAGES, texts=TEXTS, **options):
    reward = load_reward(spec, **options)
    scores, parts = reward.start(images, reward.tokenize(texts))()
    assert parts == {}
    return scores


# --------------------------------------------------------------------------------------------------------------- Python


def test_a_function_in_python():
    expected = [image.mean() / 255 + 0.01 * len(text) for image, text in zip(IMAGES, TEXTS, strict=True)]
    scores = scores_of("python:sample_rewards:bright_and_long")
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_tokens_stand_for_the_texts():
    """Also of calls of `tokenize` before and after."""
    reward = load_reward("python:sample_rewards:bright_and_long")
    first, second = reward.tokenize(TEXTS), reward.tokenize(["a whale", "a dog"])
    assert first.dtype == np.int32 and first.tolist() == [0, 1, 0, 2, 3] and second.tolist() == [4, 0]
    black = np.zeros((2, 16, 16, 3), np.uint8)
    np.testing.assert_allclose(reward.start(black, second)()[0], [0.07, 0.05], rtol=1e-6)
    np.testing.assert_allclose(reward.start(black, first[2:4])()[0], [0.05, 0.19], rtol=1e-6)


def test_calls_run_in_threads(monkeypatch):
    """Three begin before any of them ends; images may be made there too."""
    together, names = threading.Barrier(3, timeout=20), set()

    def meet(images, prompts):
        together.wait()
        names.add(threading.current_thread().name)
        return images.mean((1, 2, 3))

    monkeypatch.setattr(sample_rewards, "meet", meet, raising=False)
    reward = load_reward("python:sample_rewards:meet", workers=3)
    waits = [reward.start(lambda: IMAGES, reward.tokenize(TEXTS)) for _ in range(3)]
    for wait in waits:
        np.testing.assert_allclose(wait()[0], IMAGES.mean((1, 2, 3)), rtol=1e-6)
    assert names == {"reward python:sample_rewards:meet"}


@pytest.mark.parametrize(
    "name, said",
    [
        ("columns", r"returned float64 of shape \[5, 1\]; wants 5 floats: \[5\] \(sample_rewards.py:\d+\)$"),
        ("too_few", r"returned float64 of shape \[4\]; wants 5 floats"),
        ("words", r"returned <U19 of shape \[5\]; wants 5 floats"),
        ("not_finite", "returned 1 of 5 scores that are not finite"),
        ("raises", r"KeyError: 'no such\\nserver' \(sample_rewards.py:\d+\)$"),
        ("times_out", r"TimeoutError: the server says no \(sample_rewards.py:\d+\)$"),
        ("hangs", r"no scores after 0.2 s \(host_reward.timeout\)"),
    ],
)
def test_a_reward_that_fails(name, said):
    began = time.monotonic()
    with pytest.raises(RewardError, match=f"^reward python:sample_rewards:{name}: {said}"):
        scores_of(f"python:sample_rewards:{name}", timeout=0.2)
    assert time.monotonic() - began < sample_rewards.SLEEP / 2


WORKS = ("instance", "partial", "short", "changes_its_input", "tensors", "jax_array", "pair", "prints")


@pytest.mark.parametrize("name", WORKS)
def test_whatever_gives_a_number_for_each_image(name):
    """An instance, a partial, a lambda; torch's and JAX's arrays; a pair of scores and what it says beside them."""
    if name == "tensors":
        pytest.importorskip("torch")
    reward, images = load_reward(f"python:faulty_rewards:{name}"), IMAGES.copy()
    tokens = reward.tokenize(TEXTS)
    scores, parts = reward.start(images, tokens)()
    np.testing.assert_allclose(scores, IMAGES.mean((1, 2, 3)), rtol=4e-3 if name == "jax_array" else 1e-6)
    np.testing.assert_array_equal(images, IMAGES)  # a function gets a copy
    if name == "pair":
        assert parts.keys() == {"info/red", "info/constant"}
        np.testing.assert_allclose(parts["info/red"], IMAGES[..., 0].mean((1, 2)), rtol=1e-6)
        np.testing.assert_array_equal(parts["info/constant"], np.full(5, 3.0))
    else:
        assert parts == {}


def test_what_a_reward_prints_does_not_break_the_bar(capfd):
    """It stands above the bar, in whole lines, whichever thread prints it."""

    def main():
        with tqdm(total=1, file=sys.stderr) as bar:
            bar.display()
            scores_of("python:faulty_rewards:prints")
        print("the end", end="")

    command.guarded(main)
    out, err = capfd.readouterr()
    assert out == "half a line, then the rest\nthe end"
    assert len(re.findall(r"\r +\r", err)) >= 1  # the bar was cleared for the line


def test_a_list_of_tensors():
    pytest.importorskip("torch")
    np.testing.assert_allclose(scores_of("python:faulty_rewards:list_of_tensors"), IMAGES.mean((1, 2, 3)), rtol=4e-3)


@pytest.mark.parametrize(
    "name, said",
    [
        ("dictionary", "returned a dict of 'scores'; wants 5 floats"),
        ("nothing", "returned None; wants 5 floats"),
        ("complex_numbers", r"returned complex128 of shape \[5\]; wants 5 floats"),
        ("ragged", "returned a list of 2; wants 5 floats"),
        ("huge", "returned a list of 5; wants 5 floats"),
        ("too_large", "returned 5 of 5 scores that are not finite"),
        ("masked", "returned 1 of 5 scores that are not finite"),
        ("returns_a_coroutine", "returned a coroutine; wants 5 floats"),
        ("leaves", "SystemExit: 3"),
        ("interrupts", "KeyboardInterrupt"),
        ("raises_what_is_no_exception", "Odd: odd"),
    ],
)
def test_a_function_that_is_no_reward(name, said):
    """Bad input at its first call (exit code 2), with the place in the user's file; nobody waits for its time limit."""
    line = rf"^reward python:faulty_rewards:{name}: {said}.* \(faulty_rewards.py:\d+\)$"
    with pytest.raises(BadRewardError, match=line) as error:
        scores_of(f"python:faulty_rewards:{name}")
    assert isinstance(error.value, InputError) and isinstance(error.value, RewardError)


@pytest.mark.parametrize("name", ["with_metadata", "with_metadata_by_name"])
def test_what_a_prompts_file_says_beside_it(name, tmp_path, make_config):
    """The rest of each row goes to a reward that asks for it, also of prompts that are alike, and in a sum."""
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a dog", "count": 2}\n{"prompt": "a  dog", "count": 3}\n"a cat"\n{"prompt": "a bee"}\n'
    )
    prompts = load_prompts(tmp_path / "p.jsonl")
    spec = f"python:faulty_rewards:{name}+jax:sample_rewards:brightness"
    reward = load_reward(spec, weights=(1.0, 0.0))
    tokens = reward.tokenize(prompts.texts)
    rows = np.array([3, 1, 0, 2])
    scores, _ = reward.start(IMAGES[:4], jax.tree.map(lambda x: x[rows], tokens))()
    np.testing.assert_array_equal(scores, [-1, 3, 2, -1])
    experiment = Experiment.build(checked(make_config("ddpo", {"reward": spec, "prompts": str(tmp_path / "p.jsonl")})))
    scores, _ = experiment.trained.start(IMAGES[:4], experiment.train.tokens[experiment.reward])()
    np.testing.assert_array_equal(scores, [2, 3, -1, -1])


def test_one_that_has_given_scores_before_is_a_failure_of_the_run(monkeypatch):
    calls = iter([[1.0] * 5, None])
    monkeypatch.setattr(sample_rewards, "then_none", lambda images, prompts: next(calls), raising=False)
    reward = load_reward("python:sample_rewards:then_none")
    reward.start(IMAGES, reward.tokenize(TEXTS))()
    with pytest.raises(RewardError, match="returned None") as error:
        reward.start(IMAGES, reward.tokenize(TEXTS))()
    assert not isinstance(error.value, InputError)


def test_what_a_reward_says_beside_its_scores(monkeypatch):
    """Means of the names that its first call gave, as parts; in sums below the reward's name."""
    infos = iter([{"a": [1.0] * 2}, {"b": 7.0}, {"a": 5.0, "b": 7.0}])
    monkeypatch.setattr(sample_rewards, "says", lambda images, prompts: ([0.0] * 2, next(infos)), raising=False)
    reward = load_reward("python:sample_rewards:says", workers=1)
    found = [reward.start(IMAGES[:2], reward.tokenize(TEXTS[:2]))()[1] for _ in range(3)]
    np.testing.assert_array_equal([parts["info/a"] for parts in found], [[1, 1], [np.nan, np.nan], [5, 5]])
    assert all(parts.keys() == {"info/a"} for parts in found)
    spec = "python:faulty_rewards:pair+jax:faulty_rewards:gives_a_pair"
    total = load_reward(spec)
    scores = make_scorer(total, batch=2)(list(IMAGES), total.tokenize(TEXTS))
    np.testing.assert_allclose(scores["pair/info/red"], IMAGES[..., 0].mean((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(scores["gives_a_pair/info/red"], IMAGES[..., 0].mean((1, 2)) / 255, rtol=1e-5)
    assert {name for name in scores if "gives_a_pair/" in name} == {
        f"gives_a_pair/info/{x}" for x in ("red", "constant")
    }


def test_official_scores_of_pictures_of_several_sizes():
    images = [IMAGES[0], IMAGES[1], np.zeros((4, 6, 3), np.uint8), IMAGES[2]]
    for spec in ("jpeg_incompressibility", "jpeg_compressibility"):
        reward = load_reward(spec)
        scores = make_scorer(reward, batch=2)(images, reward.tokenize(TEXTS[:4]))
        assert scores.keys() == {""}
        expected = [getattr(jpeg, spec.removeprefix("jpeg_"))(image[None], [""])[0] for image in images]
        np.testing.assert_allclose(scores[""], expected, rtol=1e-6)


def test_jpeg(tmp_path):
    """Kilobytes of the file; noise is larger than a colour."""
    flat = np.full_like(IMAGES[0], 128)
    sizes = jpeg.incompressibility(np.stack([IMAGES[0], flat]), TEXTS[:2])
    for size, image in zip(sizes, (IMAGES[0], flat), strict=True):
        Image.fromarray(image).save(tmp_path / "x.jpg", quality=95)
        assert size == (tmp_path / "x.jpg").stat().st_size / 1000
    assert sizes[0] > 1.3 * sizes[1]
    np.testing.assert_array_equal(jpeg.compressibility(IMAGES, TEXTS), -jpeg.incompressibility(IMAGES, TEXTS))


# ------------------------------------------------------------------------------------------------------------------ JAX


def test_a_function_of_jax():
    reward = load_reward("jax:sample_rewards:brightness")
    tokens, images = reward.tokenize(TEXTS), IMAGES / np.float32(255)
    score = jax.jit(lambda x: reward.score(reward.params, x, tokens)[0])
    np.testing.assert_allclose(score(images), images.mean((1, 2, 3)), rtol=1e-5)
    gradient = jax.grad(lambda x: score(x)[1])(images)
    np.testing.assert_allclose(gradient.sum((1, 2, 3)), [0, 1, 0, 0, 0], rtol=1e-5)
    official = make_scorer(reward, batch=2)(list(IMAGES), tokens)
    np.testing.assert_allclose(official[""], images.mean((1, 2, 3)), rtol=1e-5)


def test_a_reward_with_parameters():
    found, given = load_reward("jax:sample_rewards:bright_and_long_jax"), sample_rewards.bright_and_long_jax
    images, tokens = IMAGES / np.float32(255), given.tokenize(TEXTS)
    np.testing.assert_array_equal(found.tokenize(TEXTS), tokens)
    assert found.params is given.params
    np.testing.assert_array_equal(*(reward.score(given.params, images, tokens)[0] for reward in (found, given)))


def test_a_function_of_jax_that_returns_another_shape():
    reward = load_reward("jax:sample_rewards:one_number")
    with pytest.raises(
        InputError, match=r"reward jax:sample_rewards:one_number: returned shape \[\] for 5 images; wants"
    ):
        jax.jit(reward.score)({}, jnp.zeros((5, 4, 4, 3)), reward.tokenize(TEXTS))


def test_a_list_of_numbers_of_jax():
    reward, images = load_reward("jax:faulty_rewards:gives_a_list"), jnp.asarray(IMAGES / np.float32(255))
    scores, _ = jax.jit(reward.score)({}, images, reward.tokenize(TEXTS))
    np.testing.assert_allclose(scores, images.mean((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize(
    "name, said",
    [
        ("numpy_inside", "TracerArrayConversionError: .*wants jax.numpy in place of numpy"),
        ("branches", "TracerBoolConversionError: .*wants jax.numpy"),
        ("assigns", "TypeError: JAX arrays are immutable"),
        ("leaves_while_traced", "SystemExit: no licence"),
        ("gives_none", r"returned None; wants 5 numbers: \[5\]"),
        ("gives_a_dict", r"returned a dict of 'scores'; wants 5 numbers: \[5\]"),
        ("gives_complex", r"returned complex64 of shape \[5\]; wants 5 numbers"),
        ("gives_columns", r"returned shape \[5, 3\] for 5 images; wants \[5\]"),
        ("faulty_reward", "TypeError: "),
        ("bare_scores", r"returned float32 of shape \[5\]; wants scores and a dict of their parts"),
    ],
)
def test_a_function_of_jax_that_is_no_reward(name, said):
    """One line with the place in the user's file, however deep in programs it is traced."""
    reward = load_reward(f"jax:faulty_rewards:{name}")

    @jax.jit
    @jax.grad
    def gradient(images):
        _, scores = jax.lax.scan(lambda c, _: (c, reward.score({}, images, no_tokens(TEXTS))[0]), 0.0, None, length=1)
        return scores.sum()

    line = rf"^reward jax:faulty_rewards:{name}: (?s:{said}).* \(faulty_rewards.py:\d+\)"
    with pytest.raises(BadRewardError, match=line) as error:
        gradient(jnp.zeros((5, 4, 4, 3)))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------- specs


@pytest.mark.parametrize(
    "spec, said",
    [
        (
            "jax:faulty_rewards:with_prompts",
            r"takes \(images, prompts\); it is called as f\(images\); a program of JAX has",
        ),
        (
            "python:faulty_rewards:images_alone",
            r"takes \(images\); it is called as f\(images, prompts, metadata\) or f",
        ),
        ("python:faulty_rewards:three", r"takes \(images, prompts, extra\); it is called as"),
        ("python:faulty_rewards:waits", "is async; wants a plain function that returns scores"),
        ("python:faulty_rewards:yields", "is a generator; wants a plain function that returns scores"),
        ("python:faulty_rewards:Brightness", "is a class; wants a plain function that returns scores"),
        ("jax:faulty_rewards:Brightness", "is a class; wants a plain function that returns scores"),
        ("jax:faulty_rewards:instance", r"takes \(images, prompts\); it is called as f\(images\)"),
    ],
)
def test_functions_that_cannot_be_called_so(spec, said):
    """Known before anything else is loaded."""
    with pytest.raises(InputError, match=rf"^reward {spec}: {said}.* \(faulty_rewards.py:\d+\)$"):
        load_reward(spec)


def test_a_reward_of_jax_is_no_python():
    with pytest.raises(InputError, match="is a Reward of JAX; wants jax:sample_rewards:bright_and_long_jax"):
        load_reward("python:sample_rewards:bright_and_long_jax")


@pytest.mark.parametrize(
    "code, said",
    [
        ("1 / 0", r"ZeroDivisionError: division by zero \(NAME.py:1\)"),
        ("def f(:", r"SyntaxError: invalid syntax \(NAME.py, line 1\)"),
        ("import sys; sys.exit('no licence')", r"SystemExit: no licence \(NAME.py:1\)"),
        ("import os.path.no_such", "ModuleNotFoundError: No module named 'os.path.no_such'"),
        ("class Odd(BaseException): pass\nraise Odd('x')", r"Odd: x \(NAME.py:2\)"),
        (
            "import argparse; argparse.ArgumentParser(prog='p').parse_args(['--x'])",
            r"SystemExit: 2 \(NAME.py:1\); it said: p: error: unrecognized arguments: --x; what ends a program",
        ),
        ("def __getattr__(name):\n    raise KeyError(name)", r"KeyError: 'f' \(NAME.py:2\)"),
    ],
)
def test_modules_that_cannot_be_imported(tmp_path, monkeypatch, capfd, code, said):
    name = f"module_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=f"^reward '{name}:f': importing {name}: {said.replace('NAME', name)}"):
        load_reward(f"python:{name}:f")
    assert capfd.readouterr() == ("", "")


def test_what_a_module_writes_to_stderr(tmp_path, monkeypatch, capfd):
    """While it is imported, and later by a logger that it made then."""
    (tmp_path / "has_a_logger.py").write_text(
        "import logging\nlogger = logging.getLogger('r')\nlogger.addHandler(logging.StreamHandler())\n"
        "logger.warning('imported')\n"
        "def f(images, prompts):\n    logger.warning('called')\n    return [1.0] * len(images)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    np.testing.assert_array_equal(scores_of("python:has_a_logger:f"), np.ones(5))
    assert capfd.readouterr().err == "imported\ncalled\n"


@pytest.mark.parametrize(
    "spec, said",
    [
        ("python:sample_rewards", "'sample_rewards': wants MODULE:FUNCTION"),
        ("jax::f", "':f': wants MODULE:FUNCTION"),
        ("python:no_such_module:f", "importing no_such_module: ModuleNotFoundError: No module named"),
        ("python:sample_rewards:no_such", "sample_rewards has no function 'no_such'"),
        ("jax:sample_rewards:NUMBER", "sample_rewards has no function 'NUMBER'"),
        ("textnorm(python:sample_rewards:words)", "the reward is plain Python; wants one that is computed in JAX"),
        ("sample_rewards:brightness", "unknown reward 'sample_rewards'; accepted: .*python:MODULE:FUNCTION"),
    ],
)
def test_bad_specs(spec, said):
    with pytest.raises(InputError, match=said):
        load_reward(spec)


@pytest.mark.parametrize("options", [{"timeout": 0.0}, {"workers": 0}])
def test_bad_settings(options):
    with pytest.raises(InputError, match="host_reward: timeout=.*wants seconds > 0 and at least 1 worker"):
        load_reward("jpeg_compressibility", **options)


def test_names():
    assert parsed_spec("python:pkg.sample_rewards:sharp").name == "sharp"
    assert parsed_spec("jax:sample_rewards:brightness+emoji_pickscore").name == "brightness+emoji_pickscore"
    assert parsed_spec("jpeg_compressibility").name == "jpeg_compressibility"


def test_a_sum_with_a_function_of_jax():
    reward = load_reward("emoji_aesthetic+jax:sample_rewards:brightness", weights=(0.5, 2.0))
    images = np.random.default_rng(1).uniform(size=(2, 64, 64, 3)).astype(np.float32)
    total, parts = jax.jit(reward.score)(reward.params, images, reward.tokenize(TEXTS[:2]))
    np.testing.assert_allclose(parts["brightness"], images.mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(total, 0.5 * parts["emoji_aesthetic"] + 2 * parts["brightness"], rtol=1e-5)


def test_a_sum_with_plain_python():
    """Reported in bytes on the published path; the host's half and the program's are added."""
    reward = load_reward("jpeg_compressibility+jax:sample_rewards:brightness", weights=(0.5, 2.0))
    scores = make_scorer(reward, batch=2)(list(IMAGES), reward.tokenize(TEXTS))
    kilobytes = jpeg.compressibility(IMAGES, TEXTS)
    np.testing.assert_allclose(scores["jpeg_compressibility"], kilobytes, rtol=1e-6)
    np.testing.assert_allclose(scores["brightness"], IMAGES.mean((1, 2, 3)) / 255, rtol=1e-5)
    np.testing.assert_allclose(scores[""], 0.5 * kilobytes + 2 * scores["brightness"], rtol=1e-5)


def test_a_sum_of_plain_python_alone():
    reward = load_reward("jpeg_compressibility+python:sample_rewards:bright_and_long", weights=(1.0, 10.0))
    scores = make_scorer(reward, batch=3)(list(IMAGES), reward.tokenize(TEXTS))
    expected = jpeg.compressibility(IMAGES, TEXTS) + 10 * np.array(sample_rewards.bright_and_long(IMAGES, TEXTS))
    np.testing.assert_allclose(scores[""], expected, rtol=1e-5)
    assert scores.keys() == {"", "jpeg_compressibility", "bright_and_long"}
