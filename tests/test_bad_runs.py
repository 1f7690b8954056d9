"""Settings, prompt files and models that a run cannot be made of: one clear line, exit code 2, nothing half-written."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffexp_jax import backend, chosen_rewards, command, sampler, train
from diffexp_jax.experiment import Experiment
from diffexp_jax.settings import checked


@pytest.mark.parametrize(
    "algorithm, key, value, said",
    [
        ("alignprop", "algorithm", "ppo", "algorithm='ppo': accepted: alignprop, ddpo"),
        ("alignprop", "model.dtype", "float8", "model.dtype='float8': accepted: auto, float32, bfloat16, float16"),
        ("alignprop", "model.image_size", 100, "model.image_size=100: wants a multiple of 8, 8..8192"),
        ("alignprop", "model.remat", "all", "model.remat='all': accepted: none, step, block"),
        ("alignprop", "model.vae_slice", 0, "model.vae_slice=0: wants 1..10000000"),
        ("ddpo", "ddpo.old_log_prob", "yes", "old_log_prob='yes': accepted: auto, sampled, recomputed, current"),
        ("ddpo", "model.matmul_precision", "fp8", "model.matmul_precision='fp8': accepted: auto, default, bfloat16"),
        ("ddpo", "reward_dtype", "auto", "reward_dtype='auto': accepted: float32, bfloat16, float16"),
        ("ddpo", "eval.reward_dtype", "half", "eval.reward_dtype='half': accepted: float32, bfloat16, float16"),
        ("alignprop", "iterations", 0, "iterations=0: wants 1..10000000"),
        ("alignprop", "sampling.steps", 0, "sampling.steps=0: wants 1..1000"),
        ("ddpo", "sampling.steps", 1001, "sampling.steps=1001: wants 1..1000"),
        ("ddpo", "sampling.eta", 0.0, "sampling.eta=0: ddpo needs steps with noise"),
        ("ddpo", "sampling.eta", 15.0, "sampling.eta=15.0: wants 0..10"),
        ("ddpo", "sampling.window", 9, "sampling.window=9: 4 of sampling.steps=4 may add noise"),
        ("ddpo", "sampling.noise_steps", (4, 9), "sampling.noise_steps=4,9: none of sampling.steps=4 adds noise"),
        ("dpok", "sampling.window", 2, "sampling.window=2: dpok's value function is of each step; wants 0, or"),
        ("alignprop", "sampling.noise", "ode", "sampling.noise='ode': accepted: sde, dance, cps, precise"),
        ("ddpo", "exploration.t_thresh", -1, "exploration.t_thresh=-1: wants 0..1000"),
        ("ddpo", "exploration.t_thresh", 1001, "exploration.t_thresh=1001: wants 0..1000"),
        ("ddpo", "exploration.weight_range", (2.0, 1.0), "weight_range=(2.0, 1.0): wants (low, high) with low <= high"),
        ("ddpo", "exploration.weight_range", (1.0,), "weight_range=(1.0,): wants (low, high)"),
        ("ddpo", "exploration.weight_range", ("a", "b"), "exploration.weight_range=a: wants 0..100"),
        ("ddpo", "exploration.unit", "sentence", "exploration.unit='sentence': accepted: word, token, phrase"),
        ("ddpo", "exploration.fraction", 1.5, "exploration.fraction=1.5: wants 0..1"),
        ("alignprop", "alignprop.truncation", "all", "'all': accepted: uniform, per_step, fixed, none"),
        ("alignprop", "alignprop.truncation_k", 5, "alignprop.truncation_k=5: wants 1..4"),
        ("alignprop", "batch.samples", 0, "batch.samples=0: wants 1..1048576"),
        (
            "alignprop",
            "batch.samples_per_forward",
            3,
            "wants batch.samples_per_forward to divide 8, or batch.samples a multiple of ",
        ),
        ("ddpo", "ddpo.updates", 3, "batch.samples=8: wants a multiple of devices x updates = 1 x 3"),
        ("ddpo", "ddpo.stats_min_count", 5, "ddpo.stats_min_count=5: wants 1..4"),
        ("ddpo", "eval.every", -1, "eval.every=-1: wants 0..10000000"),
        ("ddpo", "lora.rank", 0, "lora.rank=0: wants 1..1024"),
        ("ddpo", "lora.targets", ("text_encoder",), "lora.targets='text_encoder': the text encoders are not trained"),
        ("ddpo", "lora.targets", ("to_x",), "lora.targets='to_x': accepted: attention, feed_forward,"),
        ("ddpo", "prompts", "no/such.txt", "no/such.txt: cannot read the prompt file: No such file or directory"),
        ("ddpo", "prompts", "plants", "unknown prompt set 'plants'; accepted: animals,"),
        ("ddpo", "model.path", "no/such", "model 'no/such': no such folder, no copy in the hub's cache"),
        ("ddpo", "reward", "beauty", "unknown reward 'beauty'; accepted: pickscore, pickscore_26,"),
    ],
)
def test_bad_settings(fails, make_config, tmp_path, algorithm, key, value, said):
    line = fails(2, command.guarded, train.run, make_config(algorithm, {key: value}), tmp_path / "run")
    assert said in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("reward", "pickscore:no/such/one", "reward 'pickscore:no/such/one': no/such/one: no such file or folder"),
        ("eval.rewards", ("aesthetic",), "reward 'aesthetic' needs its weights: aesthetic:PATH"),
        ("lora.path", "no/such.safetensors", "lora.path=no/such.safetensors: no such file or folder"),
        ("prompts", "no/such.txt", "no/such.txt: cannot read the prompt file"),
        ("eval.prompts", ("no/such.txt",), "no/such.txt: cannot read the prompt file"),
        ("eval.prompts", ("a/x.txt", "b/x.txt"), "prompt sets 'a/x.txt' and 'b/x.txt': both are named 'x'; wants each"),
    ],
)
def test_files_are_looked_for_before_anything_is_loaded(fails, make_config, tmp_path, monkeypatch, key, value, said):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "x.txt").write_text("a dog")
    monkeypatch.setattr(chosen_rewards, "load_reward", None)
    monkeypatch.setattr(sampler, "load_pipeline", None)
    assert said in fails(2, command.guarded, train.run, make_config("ddpo", {key: value}), tmp_path / "run")


def test_batch_is_not_divisible_by_the_devices(fails, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    line = fails(2, command.guarded, train.run, make_config("alignprop"), tmp_path / "run")
    assert line == "error: batch.samples=8: wants a multiple of the 3 devices"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "p.txt: no prompts in the file; it needs at least one"),
        (b"\n  \n", "p.txt: no prompts in the file"),
        (b"a dog\na caf\xe9\n", "p.txt: line 2 (byte 11) is not UTF-8"),
    ],
)
def test_bad_prompt_files(fails, make_config, tmp_path, content, said):
    (tmp_path / "p.txt").write_bytes(content)
    config = make_config("alignprop", {"prompts": str(tmp_path / "p.txt")})
    assert said in fails(2, command.guarded, train.run, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_is_too_long_is_cut_and_named(make_config, tmp_path, caplog):
    long = "a dog " + "washing the dishes " * 20
    (tmp_path / "p.txt").write_text(f"a cat\n{long}\n")
    loaded = Experiment.build(checked(make_config("alignprop", {"prompts": str(tmp_path / "p.txt"), "eval.every": 0})))
    assert f"prompt cut to 32 tokens: {long.strip()!r:.100}\n" in caplog.text
    assert caplog.text.count("prompt cut") == 1
    cond = loaded.train.cond.embedding
    assert cond.shape == (2, 32, 16) and np.isfinite(cond).all()


def test_a_prompt_that_is_there_twice_is_drawn_twice_as_often_under_one_id(make_config, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\na dog\na dog\na dog\n")
    loaded = Experiment.build(checked(make_config("ddpo", {"prompts": str(tmp_path / "p.txt"), "eval.every": 0})))
    ids = np.concatenate([np.ravel(loaded.draw_batch(it, None).prompt_id) for it in range(30)])
    assert loaded.train.texts == ("a cat", "a dog", "a dog", "a dog") and set(ids.tolist()) == {0, 1}
    assert 0.6 < (ids == 1).mean() < 0.9 and ids.dtype == np.int32
    np.testing.assert_array_equal(loaded.train.cond.embedding[1], loaded.train.cond.embedding[3])
    # what a reward reads is each row's own: it may differ in what a file says beside the prompt
    own = loaded._replace(train=loaded.train._replace(tokens={loaded.reward: np.arange(4)[:, None]}))
    assert {int(x) for it in range(30) for x in np.ravel(own.draw_batch(it, None).tokens)} == {0, 1, 2, 3}


def test_more_prompts_than_fit_in_memory(fails, make_config, tmp_path, monkeypatch):
    """32 tokens of 16 numbers are 2 kB a prompt; half of the memory is for them."""
    (tmp_path / "p.txt").write_text("\n".join(f"a dog {i}" for i in range(100)))
    monkeypatch.setattr(backend, "host_memory", lambda: 200_000)
    config = make_config("alignprop", {"prompts": str(tmp_path / "p.txt"), "eval.every": 0})
    said = fails(2, command.guarded, train.run, config, tmp_path / "run")
    assert "prompts 'p': 100 of them would take 0.0 GiB" in said and "wants at most 48, half of it" in said
    assert not (tmp_path / "run").exists()


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny pipeline that a test may break."""
    return shutil.copytree(tiny_model, tmp_path / "model")


UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json", UNET, "tokenizer/vocab.json"])
def test_a_missing_file_of_the_model(fails, make_config, model, tmp_path, file):
    (model / file).unlink()
    said = fails(2, command.guarded, train.run, make_config("ddpo", {"model.path": str(model)}), tmp_path / "run")
    assert str(model / file) in said or f"{model / 'unet'}: no weights" in said
    assert not (tmp_path / "run").exists()


def test_a_tensor_of_the_wrong_shape(fails, make_config, model, tmp_path):
    tensors = load_file(model / UNET)
    save_file(tensors | {"conv_in.weight": tensors["conv_in.weight"][:, :3]}, model / UNET)
    said = fails(2, command.guarded, train.run, make_config("ddpo", {"model.path": str(model)}), tmp_path / "run")
    assert "conv_in.weight is (16, 3, 3, 3), the config wants (16, 4, 3, 3)" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule='squaredcos_cap_v2'; accepted: scaled_linear, linear"),
        ({"set_alpha_to_one": True}, "a step adds no noise, and ddpo needs some at every step"),
        ({"timestep_spacing": "linspace"}, "a step adds no noise, and ddpo needs some at every step"),
    ],
)
@pytest.mark.parametrize("window", [0, 1])  # one step of the chain, of which the last is the one without noise
def test_a_noise_schedule_that_cannot_work(fails, make_config, model, tmp_path, changes, said, window):
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    config = make_config("ddpo", {"model.path": str(model), "eval.every": 0, "sampling.window": window})
    assert said in fails(2, command.guarded, train.run, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
