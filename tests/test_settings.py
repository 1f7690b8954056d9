"""Settings: every number has a range that is checked before anything is loaded; config.json is read as it should be."""

import ast
import json

import pytest
from flax.traverse_util import flatten_dict

from configs import base
from diffexp_jax import backend, command, sampling, settings
from diffexp_jax.algorithms import METHODS
from diffexp_jax.errors import InputError
from diffexp_jax.limits import Number, check_number, positive, whole
from diffexp_jax.run import workdir
from diffexp_jax.settings import Settings, by_key, parsed
from diffexp_jax.sweeps import plan, results
from tests.support.tiny import as_flags

DEFAULTS = flatten_dict(base.default().to_dict(), sep=".")
TABLE = {key: known.accepted for key, known, _ in by_key(Settings()) if isinstance(known.accepted, Number)}
OPTIONAL = {"model.image_size", "model.t5_tokens", "exploration.iterations", "cpu_devices"}  # None
OPTIONAL |= {"hosts.number", "hosts.index", "eval.steps", "eval.eta", "eval.guidance"}
OPTIONAL |= {"model.scheduler.steps_offset", "model.scheduler.shift"}
SEVERAL = {"reward_weights", "exploration.weight_range", "sampling.noise_steps"}
WORDS = {"alignprop.reward_target"}  # a word or a number; the method reads it


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


NUMERIC = {key for key, value in DEFAULTS.items() if is_number(value)} | OPTIONAL | SEVERAL


def test_every_number_has_a_range():
    assert TABLE.keys() == NUMERIC
    for key, accepted in TABLE.items():
        if is_number(DEFAULTS[key]):
            assert accepted.accepts(DEFAULTS[key]), key
            assert accepted.whole == isinstance(DEFAULTS[key], int), key


def config_with(key: str, value):
    config = base.default()
    config.algorithm = key.split(".")[0] if key.split(".")[0] in METHODS else "ddpo"
    with config.unlocked():
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = value
    return config


@pytest.mark.parametrize("value", ["nan", "inf", "1e9", "up"])
def test_a_target_that_makes_no_sense(value):
    config = config_with("alignprop.truncation_k", 1)
    config.alignprop.reward_target = value
    with pytest.raises(InputError, match="alignprop.reward_target="):
        settings.checked(config)


@pytest.mark.parametrize(
    "cores, changes, devices",
    [
        (2, {}, 2),
        (6, {}, 4),  # 64 samples in two updates
        (16, {}, 8),
        (16, {"ddpo.updates": 1, "batch.samples": 12}, 6),
        (2, {"batch.samples_per_forward": 5, "batch.samples": 20}, 2),
        (4, {"batch.samples_per_forward": 5, "batch.samples": 24}, 4),  # 3 for each update: all at once
        (4, {"cpu_devices": 3}, 3),
        (4, {"model.path": "some/where"}, 1),  # its size is not known
    ],
)
def test_devices_of_a_cpu(monkeypatch, cores, changes, devices):
    monkeypatch.setattr(backend, "cores", lambda: cores)
    config = config_with("seed", 0)
    config.update_from_flattened_dict(changes)
    assert settings.cpu_devices(parsed(config)) == devices


def test_a_shipped_model_is_given_captions(caplog):
    """Bare names are for Stable Diffusion; a run is told so, before anything is loaded."""
    names = ("animals", "animals_with_article", "animals_unseen")
    settings.warn_of_bare_names("hub:a/b", names)
    assert not caplog.text
    settings.warn_of_bare_names("emoji", names)
    assert caplog.text.count("bare names") == 2 and "wants animals_unseen_with_article" in caplog.text


def test_devices_of_a_cpu_for_a_large_model(monkeypatch, tmp_path):
    """Two copies at most of a model that takes an eighth of the memory."""
    monkeypatch.setattr(backend, "cores", lambda: 8)
    monkeypatch.setattr(backend, "host_memory", lambda: 8000)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.safetensors").write_bytes(bytes(1000))
    config = config_with("model.path", str(tmp_path))
    assert settings.cpu_devices(parsed(config)) == 2


def test_what_seeds_mean():
    """2^32 would be 0 again, and a longer one no number for jax."""
    settings.checked(config_with("seed", 2**32 - 1))
    for seed in (2**32, 10**40):
        with pytest.raises(InputError, match="seed=.*wants 0..4294967295"):
            settings.checked(config_with("seed", seed))


def test_ranges_literal():
    assert whole(1, 3).accepts(3) and not whole(1, 3).accepts(2.0) and not whole(1, 3).accepts(True)
    assert not positive().accepts(0.0) and positive().accepts(1e-30)
    assert Number(0.0, 1.0, below=True).accepts(0) and not Number(0.0, 1.0, below=True).accepts(1.0)
    assert not any(Number(0.0, 1.0).accepts(x) for x in (10**400, float("nan"), float("inf")))
    assert not Number(0.0, float("inf")).accepts(float("inf"))
    assert whole(8, 64, optional=True, multiple=8).accepts(None) and not whole(8, 64, multiple=8).accepts(12)
    for accepted, said in (
        (whole(1, 1000), "steps=0: wants 1..1000"),
        (positive(1.0), "steps=0: wants more than 0, at most 1"),
        (Number(0.5, 1.0, below=True), "steps=0: wants at least 0.5, less than 1"),
        (whole(8, 64, multiple=8), "steps=0: wants a multiple of 8, 8..64"),
    ):
        with pytest.raises(InputError) as error:
            check_number("steps=", 0, accepted)
        assert str(error.value) == said
    with pytest.raises(InputError, match="steps=1.5: wants a whole number, 1..3"):
        check_number("steps=", 1.5, whole(1, 3))


def test_what_follows_from_settings():
    """Of 100 iterations, two updates of three epochs each; 64 samples, of which two devices handle 8 at once."""
    changes = {"algorithm": "ddpo", "ddpo.inner_epochs": 3, "batch.samples_per_forward": 8, "reward_dtype": "bfloat16"}
    changes |= {"reward": "emoji_judge+emoji_pickscore", "eval.rewards": ("emoji_judge", "emoji_judge+emoji_pickscore")}
    found = settings.changed(Settings(), changes)
    assert (found.method.name, found.optimizer_updates, found.exploring_iterations) == ("ddpo", 600, 75)
    split = found.split_among(2)
    assert (split.updates, split.chunks, split.per_forward) == (2, 4, 8)
    assert found.trained_reward.name == "emoji_judge+emoji_pickscore"
    assert [spec.name for spec in found.reported_rewards] == ["emoji_judge+emoji_pickscore", "emoji_judge"]
    quiet = settings.changed(found, {"eval.every": 0, "exploration.iterations": 7, "model.dtype": "float16"})
    assert len(quiet.reported_rewards) == 1 and quiet.exploring_iterations == 7
    assert (str(quiet.dtype), quiet.full_float32, str(found.dtype), found.full_float32) == (
        "float16",
        False,
        "float32",
        True,
    )
    assert settings.as_dict(found)["ddpo"]["inner_epochs"] == 3 and found.methods["dpok"].inner_epochs == 1
    with pytest.raises(InputError, match=f"algorithm='nope': accepted: {', '.join(METHODS)}"):
        _ = settings.changed(Settings(), {"algorithm": "nope"}).method


@pytest.mark.parametrize(
    "key, fitting, others",
    [
        ("optim.lr", [1, 1e-3], [None, True, "1", (1.0,)]),
        ("iterations", [0, -3], [1.0, None, False, "1"]),
        ("log.wandb", [True], [1, None, "True"]),
        ("model.image_size", [None, 64], [64.0, "64", True]),
        ("eval.prompts", [(), ["a"], ("a", "b")], ["a", (1,), None, {"a": 1}]),
        ("exploration.weight_range", [(1, 2.0), [1.0]], [("a", "b"), 1.0]),
        ("reward", ["", "a"], [None, 1]),
    ],
)
def test_types_of_settings(key, fitting, others):
    known = {name: setting for name, setting, _ in by_key(Settings())}[key]
    assert all(map(known.fits, fitting)) and not any(map(known.fits, others))


def test_keys_that_no_setting_has():
    for key, said in (
        ("optim.momentum", "config: no setting has the key optim.momentum"),
        ("ddpo.clipp", "ddpo: the key='clipp': accepted: updates, inner_epochs, clip, "),
        ("eval.prompts", r"eval.prompts=\('a', 1\): wants a tuple, as \('animal_activities', "),
    ):
        with pytest.raises(InputError, match=said):
            settings.changed(Settings(), {key: ("a", 1)})


def test_tables_of_keys_have_keys_of_settings():
    """Those that say what may change when a run goes on, what tells runs apart, and what overrides a scheduler."""
    keys = settings.flat(Settings())
    known = {*keys, *(key.rpartition(".")[0] for key in keys), *METHODS}
    for table in (workdir._FREE, workdir._IDENTIFIED, plan._ELSEWHERE, results.SHOWN, results._UNTOLD, command.LISTS):
        assert set(table) <= known, table
    assert {f"model.scheduler.{key}" for key in sampling.SETTINGS} == {
        k for k in keys if k.startswith("model.scheduler.")
    }


def test_a_config_without_a_key():
    config = base.default()
    config.algorithm = "ddpo"
    del config.optim["eps"]
    with pytest.raises(InputError, match=r"config: has no key optim.eps; configs/base.py has them all"):
        settings.checked(config)


# --------------------------------------------------------------------------------------------------------- config.json


@pytest.fixture
def stored(tmp_path):
    """stored(change) writes a config.json that `change` has changed, and gives its path."""

    def write(change):
        content = json.loads(json.dumps(base.default().to_dict()))
        content["algorithm"] = "ddpo"
        path = tmp_path / "config.json"
        path.write_text(json.dumps(change(content)))
        return path

    return write


def test_a_config_comes_back_as_it_was(stored):
    config, new = settings.read_config(stored(lambda c: c))
    expected = base.default()
    expected.algorithm = "ddpo"
    assert settings.flat(config) == flatten_dict(expected.to_dict(), sep=".") and new == []


def without(*keys):
    def change(content):
        for key in keys:
            section, _, name = key.rpartition(".")
            del (content[section] if section else content)[name]
        return content

    return change


def test_what_an_older_version_did_not_know(stored):
    path = stored(without("exploration.iterations", "host_reward", "log.wandb"))
    config, new = settings.read_config(path)
    assert new == ["exploration.iterations", "host_reward.timeout", "host_reward.workers", "log.wandb"]
    assert config.host_reward.timeout == DEFAULTS["host_reward.timeout"]


def changed(key, value):
    def change(content):
        section, _, name = key.rpartition(".")
        (content[section] if section else content)[name] = value
        return content

    return change


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: [c], "wants a json object, found a list"),
        (lambda c: 3, "wants a json object, found a int"),
        (lambda c: c | {"optim": 3}, "no run has the keys optim"),
        (lambda c: c | {"ddpo": {"recompute_log_prob": True}}, "no run has the keys ddpo.recompute_log_prob"),
        (changed("optim.lr", "fast"), 'optim.lr="fast": wants a float, as 0.0003'),
        (changed("optim.lr", None), "optim.lr=null: wants a float"),
        (changed("iterations", 1.5), "iterations=1.5: wants a int, as 100"),
        (changed("iterations", True), "iterations=true: wants a int"),
        (changed("log.tensorboard", 1), "log.tensorboard=1: wants a bool"),
        (changed("model.image_size", "large"), 'model.image_size="large": wants another type'),
        (changed("eval.prompts", 3), "eval.prompts=3: wants a tuple"),
        (changed("reward", ["a"]), 'reward=["a"]: wants a str'),
    ],
)
def test_configs_that_no_run_wrote(stored, change, said):
    path = stored(change)
    with pytest.raises(InputError) as error:
        settings.read_config(path)
    assert str(error.value).startswith(str(path)) and said in str(error.value), error.value


# --------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("text", ["  ", "\ud800", "a\udcff"], ids=["blank", "half a pair", "no UTF-8"])
def test_negative_prompts_that_are_no_text(text):
    with pytest.raises(InputError, match="^sampling.negative_prompt='.*': wants words .of valid UTF-8., or nothing$"):
        settings.checked(config_with("sampling.negative_prompt", text))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("animals", ("animals",)),
        ("animals,animals_unseen", ("animals", "animals_unseen")),
        ("hpsv2:w,imagereward:w", ("hpsv2:w", "imagereward:w")),
        ("a cat, big,animals", ("a cat, big", "animals")),
        ("a.csv:Category=A b.|C,animals", ("a.csv:Category=A b.|C", "animals")),
        ("", ()),
    ],
)
def test_lists_of_words(text, expected):
    assert command.split_list(text) == expected
    joined = command._with_lists(["x", f"--config.eval.prompts={text}"])[1].partition("=")[2]
    apart = command._with_lists(["x", "--config.eval.prompts", text])[2]
    assert ast.literal_eval(joined) == ast.literal_eval(apart) == expected
    literal = as_flags({"eval.prompts": expected})
    assert command._with_lists(literal) == literal


@pytest.mark.parametrize(
    "key, near",
    [
        ("optim.learning_rate", "optim.lr"),
        ("lr", "optim.lr"),
        ("batch_size", "batch.samples"),
        ("guidance_scale", "sampling.guidance"),
        ("sampling.step", "sampling.steps"),
        ("explorations.w_low", "exploration.w_low"),
        ("train.xyzzy", None),
    ],
)
def test_names_that_no_setting_has(key, near):
    said = command._unknown_key(["train", f"--config.{key}=1"], KeyError(key))
    assert said == f"no such key {key!r}" + (f"; did you mean {near!r}?" if near else "")
