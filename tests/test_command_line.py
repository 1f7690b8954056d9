"""Bad input: one clear line, the right exit code, nothing half-written; and the scripts' good runs on a tiny model."""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from configs import base
from diffexp_jax import backend, command, experiment, sampler, settings, train
from diffexp_jax.algorithms import METHODS
from diffexp_jax.cli import sample as cli_sample
from diffexp_jax.cli import sample_flags
from diffexp_jax.cli import score as cli_score
from diffexp_jax.cli import train as cli_train
from diffexp_jax.errors import InputError
from diffexp_jax.experiment import Experiment
from diffexp_jax.limits import Number
from diffexp_jax.models.lora import init_lora, save_lora
from diffexp_jax.pipelines import load_pipeline
from diffexp_jax.prompts import PromptSet, load_prompts
from diffexp_jax.run import checkpoint
from diffexp_jax.run import workdir as workdirs
from diffexp_jax.settings import Settings, by_key
from tests.conftest import ROOT, nonzero_lora

CONFIG = f"--config={ROOT / 'configs' / 'alignprop.py'}"

FINAL_EVALUATION = "diffexp_jax.sweeps.final_evaluation"  # run as a module


@pytest.fixture
def fails(capsys):
    """fails(code, function, *args): runs it and returns the one line of error that it ends with."""

    def run(code, function, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*args)
        said = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == code, said
        assert len(said) == 1 and said[0].startswith("error: "), said
        return said[0]

    return run


# -------------------------------------------------------------------------------------------------------- command lines


@pytest.fixture
def command_line(monkeypatch):
    """command_line(*arguments) does what python -m diffexp_jax.train does with them."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
        with flagsaver.flagsaver():
            command.guarded(cli_train.main, cli_train.parse_flags(sys.argv))

    return run


@pytest.mark.parametrize("name", ["ddpo", "ddpo.py", "configs/ddpo.py"])
@pytest.mark.parametrize("form", ["--config={}", "-config={}", "--config {}"])
def test_config_files_are_found_from_any_folder(monkeypatch, tmp_path, name, form):
    monkeypatch.chdir(tmp_path)
    with flagsaver.flagsaver():
        cli_train.parse_flags(["train", *form.format(f"{name}:model=emoji_hard").split()])
        assert cli_train._CONFIG.value.algorithm == "ddpo" and cli_train._CONFIG.value.model.path == "emoji_hard"


def test_a_config_file_of_the_users_own(monkeypatch, tmp_path):
    """It builds on the shipped ones by their usual name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    lines = [
        "from configs import ddpo",
        "def get_config(text=None):",
        "    c = ddpo.get_config(text)",
        "    c.seed = 7",
    ]
    (tmp_path / "configs" / "mine.py").write_text("\n".join([*lines, "    return c"]))
    with flagsaver.flagsaver():
        cli_train.parse_flags(["train", "--config=configs/mine.py:model=emoji"])
        assert cli_train._CONFIG.value.seed == 7 and cli_train._CONFIG.value.algorithm == "ddpo"


@pytest.mark.parametrize("arguments", [["--list"], ["--list", "--workdir=x"], ["--list=all"]])
def test_list(command_line, capsys, arguments):
    command_line(*arguments)
    said = capsys.readouterr().out
    assert all(name in said for name in ("alignprop", "emoji_pickscore", "animals_unseen", "sdxl"))


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ([f"{CONFIG}:model=sd99"], ["model='sd99'", "accepted: emoji, emoji_hard, sd15, sd21, sdxl"]),
        ([f"{CONFIG}:modle=emoji"], ["'modle=emoji'", "accepted: model=..., reward=..., prompts=..., explore=..."]),
        ([f"{CONFIG}:emoji"], ["'emoji'", "accepted: model=..."]),
        ([f"{CONFIG}:explore=yes"], ["explore='yes'", "accepted: true, false"]),
        ([f"{CONFIG}:reward=beauty", "--workdir=x"], ["unknown reward 'beauty'", "hpsv2, aesthetic", "NAME:PATH"]),
        ([f"{CONFIG}:prompts=plants", "--workdir=x"], ["unknown prompt set 'plants'", "animals, animals_unseen"]),
        ([f"{CONFIG}:prompts=a dog, a cat"], ["config argument ' a cat'", "accepted: model=..."]),
        ([f"{CONFIG}:prompts=no.csv:A=b|c", "--workdir=x"], ["no.csv: cannot read the prompt file"]),
        ([CONFIG, "--config.prompts=plants", "--workdir=x"], ["unknown prompt set 'plants'"]),
        ([CONFIG, "--config.eval.prompts=('a cat, big', 'no.csv:A=b|c')", "--workdir=x"], ["no.csv: cannot read"]),
        ([f"--config={ROOT / 'configs' / 'paper.py'}:fig3"], ["fig3 trains nothing", "scripts/sample.py --model "]),
        ([CONFIG, "--config.optim.lrr=1"], ["no such key 'optim.lrr'; did you mean 'optim.lr'"]),
        ([CONFIG, "--config.opttim.lr=1"], ["no such key 'opttim.lr'; did you mean 'optim.lr'"]),
        ([CONFIG, "--config.optim.xyzzy=1"], ["config:", "xyzzy"]),
        ([CONFIG, "--config.sampling.steps=many"], ["--config.sampling.steps=many"]),
        ([CONFIG, "--config.exploration.enabled=maybe"], ["--config.exploration.enabled=maybe"]),
        (["--config=no/such.py"], ["no/such.py"]),
        (["--config=nosuch:model=emoji"], ["config: nosuch: no such file; accepted: a path, alignprop, ddpo, "]),
        (["--config=no/such.py", "--config.seed=1"], ["no/such.py"]),
        (["--list=papers"], ["--list='papers'", "accepted: all, configs, methods, "]),
        ([CONFIG, "--wrokdir=x"], ["wrokdir"]),
        ([CONFIG, "runs/x"], ["unexpected argument 'runs/x'"]),
        ([CONFIG], ["--workdir DIR", "--dry_run"]),
        ([CONFIG, "--dry_run", "--config.model.path=no/model"], ["no/model", "sizes are not known", "accepted: emoji"]),
        ([CONFIG, "--dry_run", "--config.reward=beauty"], ["unknown reward 'beauty'"]),
        ([f"--config={ROOT / 'configs' / 'paper.py'}:fig99"], ["'fig99'", "accepted: fig1, "]),
        (["--workdir=x"], ["--config configs/NAME.py"]),
        ([CONFIG, "--workdir=x", "--config.sampling.steps=0"], ["sampling.steps=0: wants 1..1000"]),
        ([CONFIG, "--workdir=x", "--config.exploration.weight_range=abc"], ["weight_range=abc: wants 0..100"]),
        ([CONFIG, "--workdir="], ["--workdir : wants a path, which is empty here"]),
        ([CONFIG, "--workdir=gs://b/run"], ["--workdir gs://b/run: wants a path on this", "`gcloud storage rsync`"]),
        ([CONFIG, "--workdir=s3://b/run"], ["--workdir s3://b/run: wants a path on this machine", "`aws s3 sync`"]),
        ([CONFIG, "--workdir=hdfs://h/run"], ["--workdir hdfs://h/run: wants a path on this machine", "NFS"]),
        ([CONFIG, "--workdir=file:///b/run"], ["--workdir file:///b/run: wants", "without file://: /b/run"]),
        ([CONFIG, "--workdir=~nobody-of-this-name/run"], ["--workdir ~nobody-of-this-name/run: there is no such user"]),
        ([CONFIG, f"--workdir={'x' * 300}"], ["File name too long"]),
        ([CONFIG, f"--workdir=run-{chr(0xDCFF)}"], ["--workdir run-\\udcff: its name is not UTF-8"]),
        (
            [CONFIG, "--workdir=x", "--config.model.path=gs://b/m"],
            ["model.path=gs://b/m: wants a path on this machine"],
        ),
        ([CONFIG, "--workdir=x", "--config.lora.path=s3://b/l"], ["lora.path=s3://b/l: wants a path on this machine"]),
        (
            [CONFIG, "--workdir=x", "--config.compilation_cache=gs://b/c"],
            ["compilation_cache=gs://b/c: wants a path on"],
        ),
        ([CONFIG, "--workdir=x", "--config.textnorm.contrast=gs://b/c.json"], ["contrast=gs://b/c.json: wants a path"]),
        ([CONFIG, "--workdir=x", "--config.reward=pickscore:gs://b/p"], ["gs://b/p: wants a path on this machine"]),
        ([CONFIG, "--workdir=x", "--config.eval.rewards=pickscore:gs://b/p"], ["gs://b/p: wants a path on this"]),
        ([CONFIG, "--workdir=x", "--config.prompts=gs://b/p.csv"], ["prompts gs://b/p.csv: wants a path on this"]),
        ([CONFIG, "--workdir=x", "--config.eval.prompts=gs://b/p.csv:A=b"], ["prompts gs://b/p.csv: wants a path on"]),
    ],
)
def test_mistakes_on_the_command_line(fails, command_line, monkeypatch, tmp_path, arguments, parts):
    monkeypatch.chdir(tmp_path)
    said = fails(2, command_line, *arguments)
    assert all(part in said for part in parts), said
    assert not list(tmp_path.iterdir())


TABLE = {key: known.accepted for key, known, _ in by_key(Settings()) if isinstance(known.accepted, Number)}


@pytest.mark.parametrize("key", sorted(TABLE))
def test_numbers_that_make_no_sense(fails, command_line, monkeypatch, tmp_path, key):
    """Negative, zero, not finite, absurdly large: a line each and exit code 2, before anything is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "Experiment", None)
    method = key.split(".")[0] if key.split(".")[0] in METHODS else "ddpo"
    config, accepted = f"--config={ROOT / 'configs' / f'{method}.py'}", TABLE[key]
    for value in ("-1", "0", "nan", "inf", "-inf", "1e30", f"1{'0' * 30}"):
        several = {"reward_weights": f"(1.0, {value})", "exploration.weight_range": f"({value}, {value})"}
        if not accepted.accepts(int(value) if value.lstrip("-").isdigit() else float(value)):
            fails(2, command_line, config, f"--config.{key}={several.get(key, value)}", "--workdir=x")
    assert not list(tmp_path.iterdir())


def run_program(*arguments, cwd):
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(cwd)}
    line = [sys.executable, *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("sample", ["--prompt=a dog", "--out={}"]),
        ("sample", ["--prompt=a dog", "--out=x", "--lora={}"]),
        ("sample", ["--prompt=a dog", "--out=x", "--latents={}"]),
        ("sample", ["--prompt=a dog", "--out=x", "--model={}"]),
        ("sample", ["--prompts={}.txt", "--out=x"]),
        ("score", ["--reward=jpeg_compressibility", "--images", ".", "{}", "--out=x.csv"]),
        ("score", ["--reward=jpeg_compressibility", "--images=.", "--prompts={}", "--out=x.csv"]),
        ("score", ["--reward=jpeg_compressibility", "--images=.", "--out={}"]),
        ("score", ["--reward=pickscore:{}", "--images=.", "--out=x.csv"]),
        ("evaluate", ["--workdir={}", "--out=e.json"]),
        ("evaluate", ["--workdir=.", "--out={}"]),
        (FINAL_EVALUATION, ["--workdir={}", "--out=e.json"]),
        ("report", ["--workdir={}"]),
        ("report", ["--workdir=.", "--beside={}"]),
        ("export_lora", ["--workdir={}", "--out=l"]),
        ("export_lora", ["--workdir=.", "--out={}"]),
        ("sweep", ["--experiment=fig1", "--out={}"]),
        ("analyse", ["--name=x", "a={}", "b=."]),
        ("check_machine", ["--out={}"]),
    ],
)
def test_paths_in_a_bucket_are_refused_by_every_script(fails, script, monkeypatch, tmp_path, name, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    said = fails(2, script, name, *(argument.format("gs://b/x") for argument in arguments))
    assert ": wants a path on this machine, or on a mounted file system" in said and "gs://b/x" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["evaluate", FINAL_EVALUATION])
@pytest.mark.parametrize(
    "key, spec", [("reward", "python:MODULE:f"), ("eval.rewards", "jpeg_compressibility+jax:MODULE:f")]
)
def test_a_strangers_run_imports_no_code(fails, script, workdir, tmp_path, monkeypatch, name, key, spec):
    """A config.json that names a module beside it, in the current folder; with --trust_code it is imported."""
    monkeypatch.chdir(workdir)
    module = f"evil_{name.rpartition('.')[2]}_{len(key)}"
    spec = spec.replace("MODULE", module)
    config = settings.read_config(workdir / "config.json")[0]
    config.update_from_flattened_dict({key: (spec,) if key == "eval.rewards" else spec, "eval.every": 1})
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    (workdir / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    arguments = ["--workdir=.", f"--out={tmp_path / 'e.json'}"]
    said = fails(2, script, name, *arguments)
    named = f"config.json: names {spec.rpartition('+')[2]}, code that would be run"
    assert said == f"error: {named}; where you trust it: --trust_code"
    assert not (tmp_path / "ran").exists()
    said = fails(2, script, name, *arguments, "--trust_code")
    assert f"{module} has no function 'f'" in said and (tmp_path / "ran").exists()


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path, command_line, script, make_config, tiny_clip, capsys):
    """In options and in every setting that names a file, whoever reads it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_clip, tmp_path / "clip")
    (tmp_path / "p.csv").write_text("prompt,kind\na dog,x\n")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "p.json").write_text('{"a.png": "a dog"}')
    script("score", "--reward=pickscore:~/clip", "--images=~/a.png", "--prompts=~/p.json", "--out=~/out/s.csv")
    assert (tmp_path / "out" / "s.csv").read_text().count("a dog") == 1
    assert load_prompts("~/p.csv:kind=x").texts == ("a dog",)
    config = make_config(
        "ddpo", {"reward": "pickscore:~/clip", "model.path": "~/model", "lora.path": "~/l.safetensors"}
    )
    (tmp_path / "l.safetensors").write_text("")
    experiment.check_files(config, weights=True)
    assert settings.cpu_devices(config) == 1
    assert not (tmp_path / "~").exists()


def test_the_real_program_says_one_line(tmp_path):
    done = run_program("-m", "diffexp_jax.train", f"{CONFIG}:model=sd99", "--workdir=x", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: config argument model='sd99': accepted: emoji, emoji_hard, sd15, sd21, sdxl\n"
    assert not (tmp_path / "x").exists()


def test_output_that_the_encoding_lacks(tmp_path):
    """Is printed as escapes: a program does not fail for it, neither before nor after its work."""
    code = r"from diffexp_jax import command; command.guarded(print, 'fertig: B\xe4r \udcff \U0001f436')"
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    for encoding, said in (("ascii", r"fertig: B\xe4r \udcff \U0001f436"), ("utf-8", r"fertig: Bär \udcff 🐶")):
        environment["PYTHONIOENCODING"] = encoding
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True)
        assert (done.returncode, done.stdout.decode().strip(), done.stderr) == (0, said, b"")


def test_a_real_script_says_one_line(tmp_path):
    done = run_program(ROOT / "scripts" / "sample.py", "--prompt=a dog", "--steps=0", "--out=x", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: --steps 0: wants 1..1000\n"
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------------------- settings


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
        ("ddpo", "sampling.eta", 1.5, "sampling.eta=1.5: wants 0..1"),
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
        ("alignprop", "batch.samples_per_forward", 3, "wants a divisor of the 8 samples"),
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
    monkeypatch.setattr(experiment, "load_reward", None)
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
    loaded = Experiment.build(make_config("alignprop", {"prompts": str(tmp_path / "p.txt"), "eval.every": 0}))
    assert f"prompt cut to 32 tokens: {long.strip()!r:.100}\n" in caplog.text
    assert caplog.text.count("prompt cut") == 1
    cond = loaded.train.cond.embedding
    assert cond.shape == (2, 32, 16) and np.isfinite(cond).all()


def test_a_prompt_that_is_there_twice_is_drawn_twice_as_often_under_one_id(make_config, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\na dog\na dog\na dog\n")
    loaded = Experiment.build(make_config("ddpo", {"prompts": str(tmp_path / "p.txt"), "eval.every": 0}))
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


# ---------------------------------------------------------------------------------------------------- what runs out


def test_out_of_memory_names_what_saves_it(fails):
    """Asked of the machine for real: more than any has."""

    def ask():
        jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros((2**44,), jax.numpy.float32) + 1)())

    said = fails(1, command.guarded, ask)
    assert "out of memory (" in said and "batch.samples_per_forward" in said and "model.remat=block" in said
    assert "out of memory (Unable to allocate" in fails(1, command.guarded, lambda: np.zeros(2**57))


def test_another_failure_is_not_taken_for_it():
    with pytest.raises(RuntimeError, match="a bug"):
        command.guarded(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


@pytest.mark.parametrize(
    "code, said",
    [
        ("command.quiet_interrupt(); raise KeyboardInterrupt", "stopped; nothing had begun"),
        ("command.guarded(lambda: (_ for _ in ()).throw(KeyboardInterrupt()))", "stopped"),
    ],
)
def test_ctrl_c_is_one_line(tmp_path, code, said):
    done = run_program("-c", f"from diffexp_jax import command; {code}", cwd=tmp_path)
    assert done.stderr == f"\n{said}\n" and done.returncode in (130, -2)


LOST = """
import gc, os, signal, time, weakref
from diffexp_jax import command
def kill(*args):
    if kills:
        os.kill(os.getpid(), kills.pop())
        sum(range(1000))
class Dying:
    def __del__(self):
        kill()
kills = [signal.SIGINT]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
def main():
    {use}
    time.sleep(30)
gc.callbacks.append(kill)
command.guarded(main)
print("went on")
"""


@pytest.mark.parametrize("use", ["gc.collect()", "Dying()", "weak = weakref.ref(set(), kill)"])
def test_ctrl_c_where_python_would_lose_it(tmp_path, use):
    """In callbacks of the garbage collector and of weak references, and in __del__, Python prints it and goes on."""
    done = run_program("-c", LOST.format(use=use), cwd=tmp_path)
    assert (done.stderr, done.stdout, done.returncode) == ("\nstopped\n", "", 130)


# -------------------------------------------------------------------------------------------------------- broken models


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
def test_a_noise_schedule_that_cannot_work(fails, make_config, model, tmp_path, changes, said):
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    config = make_config("ddpo", {"model.path": str(model), "eval.every": 0})
    assert said in fails(2, command.guarded, train.run, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------- workdirs


def test_unwritable_workdirs(fails, make_config, tmp_path):
    (tmp_path / "file").write_text("kept")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below" / "run"):
        said = fails(2, command.guarded, train.run, make_config("alignprop"), workdir)
        assert f"workdir {workdir}: cannot be written ({tmp_path / 'file'} is not a folder)" in said
    assert (tmp_path / "file").read_text() == "kept"


@pytest.fixture(scope="module")
def lora(tiny_model):
    shapes = load_pipeline(tiny_model).params["unet"]
    return nonzero_lora(init_lora(jax.random.key(0), shapes, rank=4), size=0.3)


@pytest.fixture
def workdir(make_config, lora, tmp_path) -> Path:
    """What a run that was stopped after its seventh iteration left."""
    folder = tmp_path / "run"
    config, _ = workdirs.plan(folder, make_config("alignprop", {"lora.alpha": 8.0}))
    with workdirs.claim(folder, config, {}), checkpoint.Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(7, {"lora": lora, "iteration": np.array(7)})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_workdir_of_another_config(fails, make_config, workdir):
    before = contents(workdir)
    config = make_config("alignprop", {"lora.alpha": 8.0, "optim.lr": 0.5, "sampling.steps": 3})
    said = fails(2, command.guarded, train.run, config, workdir)
    assert "holds a run of another config: optim.lr (0.01 there, 0.5 here), sampling.steps (4 there, 3 here);" in said
    config = make_config("alignprop", {"lora.alpha": 8.0, "lora.targets": ("attention", "feed_forward")})
    said = fails(2, command.guarded, train.run, config, workdir)
    assert 'another config: lora.targets (["attention"] there, ["attention", "feed_forward"] here);' in said
    assert contents(workdir) == before


def test_a_continued_run_may_change_what_does_not_matter(make_config, workdir):
    changes = {"lora.alpha": 8.0, "iterations": 9, "eval.every": 5, "log.images": 2, "checkpoint.every": 3}
    _, notes = workdirs.plan(workdir, make_config("alignprop", changes))
    assert "iterations is 9, was 4" in notes and "eval.every is 5, was 3" in notes


def test_a_workdir_whose_config_is_broken(fails, make_config, workdir):
    (workdir / "config.json").write_text('{"seed":')
    said = fails(2, command.guarded, train.run, make_config("alignprop"), workdir)
    assert "config.json: not readable as json" in said


def test_checkpoints_without_a_config(fails, make_config, workdir):
    """A run of other settings would go on with them."""
    (workdir / "config.json").unlink()
    said = fails(2, command.guarded, train.run, make_config("alignprop"), workdir)
    assert "has checkpoints and no config.json, so of which run is not known; move them away" in said


def test_a_workdir_without_a_checkpoint_is_free(make_config, workdir):
    """A run that failed before its first checkpoint leaves nothing that could be lost."""
    shutil.rmtree(workdir / "checkpoints")
    assert workdirs.plan(workdir, make_config("ddpo")).notes == []


# -------------------------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--prompt=a dog", "--steps=1001"], "--steps 1001: wants 1..1000"),
        (["--prompt=a dog", "--t_thresh=-1"], "--t_thresh -1: wants 0..1000"),
        (["--prompt=a dog", "--weight_range", "2", "1"], "--weight_range (2.0, 1.0): wants (low, high) with"),
        (["--prompt=a dog", "--eta=2"], "--eta 2.0: wants 0..1"),
        (["--prompt=a dog", "--batch=0"], "--batch 0: wants 1..1048576"),
        (["--prompt=a dog", "--image_size=12"], "--image_size 12: wants a multiple of 8, 8..8192"),
        ([], "nothing to sample: give --prompt or --prompts"),
        (["--prompts=plants"], "unknown prompt set 'plants'; accepted: animals,"),
        (["--prompt=a dog", "--model=no/such"], "model 'no/such': no such folder"),
        (["--prompt=a dog", "--lora=no/such"], "--lora no/such: no such file or folder"),
        (["--prompt=a dog", "--lora=other.safetensors"], "has shape (4, 16), the model's layer"),
        (["--prompt=a dog", "--lora_scale=0.5"], "--lora_scale 0.5: wants a LoRA, by --lora"),
        (["--prompt=a dog", "--lora=x", "--lora_scale=nan"], "--lora_scale nan: wants -100..100"),
        (["--prompt=a dog", "--latents=no.npy"], "--latents no.npy: not a readable .npy file"),
        (["--prompt=a dog", "--latents=text.npy"], "--latents text.npy: not a readable .npy file"),
        (["--prompt=a dog", "--latents=two.npz"], "--latents two.npz: wants one array of float32"),
        (["--prompt=a dog", "--latents=int.npy"], "--latents int.npy: wants one array of float32"),
        (["--prompt=a dog", "--num_images=3", "--latents=x.npy"], "shape (2, 8, 8, 4); wants (3, 8, 8, 4): one for"),
        (["--prompt=a dog", "--latents=nan.npy"], "--latents nan.npy: holds numbers that are not finite"),
    ],
)
def test_bad_input_of_sample(fails, script, tiny_model, lora, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    x = np.zeros((2, 8, 8, 4), np.float32)
    np.save("x.npy", x)
    np.save("int.npy", x.astype(np.int32))
    np.save("nan.npy", x * np.nan)
    np.savez("two.npz", x=x, y=x)
    Path("text.npy").write_text("no array")
    other = {"mid_block.attentions.0": {"transformer_blocks.0": {"attn1": {"to_q": {}}}}}
    other["mid_block.attentions.0"]["transformer_blocks.0"]["attn1"]["to_q"] = {
        "A": np.zeros((16, 4), np.float32),
        "B": np.zeros((4, 16), np.float32),
    }
    save_lora("other.safetensors", other, alpha=4.0)
    model = [] if any(argument.startswith("--model") for argument in arguments) else [f"--model={tiny_model}"]
    assert said in fails(2, script, "sample", *model, *arguments, "--out=out")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "name, arguments, said",
    [
        (
            "sample",
            ["--model={model}", "--prompt=a dog", "--out=run/config.json/x"],
            "--out run/config.json/x: cannot be",
        ),
        ("evaluate", ["--workdir=no/such", "--out=e.json"], "no/such/config.json: the file is missing"),
        ("evaluate", ["--workdir=run", "--prompts=plants", "--out=e.json"], "unknown prompt set 'plants'; accepted:"),
        ("evaluate", ["--workdir=run", "--rewards=beauty", "--out=e.json"], "unknown reward 'beauty'; accepted:"),
        ("evaluate", ["--workdir=run", "--batch=0", "--out=e.json"], "--batch 0: wants 1..1048576"),
        ("evaluate", ["--workdir=run", "--lora_scale=inf", "--out=e.json"], "--lora_scale inf: wants -100..100"),
        ("evaluate", ["--workdir=run", "--out=run/config.json/e.json"], "--out run/config.json: cannot be written"),
        (
            FINAL_EVALUATION,
            ["--workdir=no/such", "--out=f.json"],
            "no/such/config.json: the file is missing",
        ),
        (FINAL_EVALUATION, ["--workdir=empty", "--out=f.json"], "empty: no checkpoint there"),
        (
            FINAL_EVALUATION,
            ["--workdir=run", "--samples_per_prompt=0", "--out=f.json"],
            "--samples_per_prompt 0: wants",
        ),
        (
            FINAL_EVALUATION,
            ["--workdir=run", "--out=run/config.json/f"],
            "--out run/config.json: cannot be written",
        ),
        ("export_lora", ["--workdir=no/such", "--out=l.safetensors"], "no/such/config.json: the file is missing"),
        ("export_lora", ["--workdir=empty", "--out=l.safetensors"], "empty: no checkpoint there"),
        (
            "export_lora",
            ["--workdir=run", "--checkpoint=best", "--out=l"],
            "run: no checkpoint has a score; wants a run",
        ),
        (
            "evaluate",
            ["--workdir=run", "--checkpoint=3", "--out=e.json"],
            "no checkpoint '3'; accepted: newest, best, 7",
        ),
        ("sample", ["--prompt=a dog", "--checkpoint=best", "--out=x"], "--checkpoint best: wants the workdir of a run"),
        ("export_lora", ["--workdir=run", "--out=run/config.json/l"], "--out run/config.json/l: cannot be written"),
        ("export_lora", ["--workdir=run", "--out=run"], "--out run: cannot be written"),
    ],
)
def test_bad_input_of_the_scripts(fails, script, workdir, tiny_model, monkeypatch, name, arguments, said):
    monkeypatch.chdir(workdir.parent)
    Path("empty").mkdir()
    shutil.copy(workdir / "config.json", "empty")
    before = contents(Path("."))
    assert said in fails(2, script, name, *(argument.format(model=tiny_model) for argument in arguments))
    assert contents(Path(".")) == before


def test_sample_is_diffusers_with_and_without_lora(script, workdir, tiny_model, tmp_path, capsys):
    """20 steps, guidance 7.5, the same latents; the LoRA exported here and loaded by load_lora_weights."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    prompts = ["a dog riding a bike", "an ant", "a zebra"]
    latents = np.random.default_rng(3).standard_normal((3, 8, 8, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", latents)
    (tmp_path / "p.txt").write_text("\n".join(prompts[1:]))
    file = tmp_path / "exported" / "pytorch_lora_weights.safetensors"
    script("export_lora", f"--workdir={workdir}", f"--out={file}")
    assert "the LoRA after iteration 7" in capsys.readouterr().out

    arguments = [f"--model={tiny_model}", f"--prompt={prompts[0]}", f"--prompts={tmp_path / 'p.txt'}", "--steps=20"]
    arguments += ["--guidance=7.5", "--batch=2", f"--latents={tmp_path / 'x.npy'}", "--save_npy"]
    ours = {}
    half = [f"--lora={file}", "--lora_scale=0.5"]
    for name, more in (("plain", []), ("lora", [f"--lora={file}"]), ("half", half)):
        script("sample", *arguments, f"--out={tmp_path / name}", *more)
        ours[name] = np.load(tmp_path / name / "images.npy")
        assert ours[name].shape == (3, 16, 16, 3) and ours[name].dtype == np.float32
        files = {path.name for path in (tmp_path / name).iterdir()}
        pngs = {f"000{i}{suffix}.png" for i in range(3) for suffix in ("", "-base")[: 1 + (name != "plain")]}
        assert files == {*pngs, "grid.png", "images.npy", "prompts.csv"}
        with Image.open(tmp_path / name / "0002.png") as image:
            np.testing.assert_allclose(np.asarray(image) / 255, ours[name][2], atol=0.5 / 255 + 1e-6)

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.tensor(latents.transpose(0, 3, 1, 2))
    kwargs = dict(num_inference_steps=20, guidance_scale=7.5, output_type="np")
    theirs = {"plain": pipe(prompts, latents=noise, **kwargs).images}
    pipe.load_lora_weights(str(file.parent))
    theirs["lora"] = pipe(prompts, latents=noise, **kwargs).images
    theirs["half"] = pipe(prompts, latents=noise, cross_attention_kwargs={"scale": 0.5}, **kwargs).images
    for name in ours:
        assert np.abs(ours[name] - theirs[name]).max() <= 2e-3, name
    for one, other in (("lora", "plain"), ("lora", "half"), ("half", "plain")):
        assert np.abs(ours[one] - ours[other]).max() > 0.02  # it is not a no-op
    with Image.open(tmp_path / "lora" / "0001-base.png") as image:  # beside it, the model without the LoRA
        np.testing.assert_allclose(np.asarray(image) / 255, ours["plain"][1], atol=1.5 / 255)


def test_sample_explore(script, tiny_model, tmp_path, capsys):
    """One seed under the guidance schedule, a prompt weight, both: each does what it does in training."""
    arguments = [f"--model={tiny_model}", "--prompt=a dog riding a bike", "--steps=20", "--guidance=7", "--seed=3"]
    options = ["--explore", "--w_low=2", "--t_thresh=700", "--weight_range", "3", "3", "--unit=word", "--save_npy"]
    script("sample", *arguments, f"--out={tmp_path / 'x'}", *options)
    said = capsys.readouterr().out
    assert "guidance: 2 in the first 6 of 20 steps, then 7" in said  # 951, 901, ... 701
    names = ("", "-schedule", "-weights", "-both")
    pictures = {name: np.asarray(Image.open(tmp_path / "x" / f"0000{name}.png"), int) for name in names}
    with Image.open(tmp_path / "x" / "grid.png") as grid:
        assert grid.size[0] > 4 * 128 > grid.size[1] * 2
    options = ["--samplers", "--w_low=2", "--t_thresh=0"]  # scheduled: low in all steps
    script("sample", *arguments, f"--out={tmp_path / 'plain'}", "--save_npy", *options)
    found = {path.stem: np.asarray(Image.open(path), int) for path in (tmp_path / "plain").glob("0*.png")}
    assert found.keys() == {"0000", "0000-low", "0000-schedule"}
    np.testing.assert_array_equal(found["0000-low"], found["0000-schedule"])
    assert np.abs(found["0000-low"] - found["0000"]).max() > 2
    plain, asked = (np.load(tmp_path / folder / "images.npy") for folder in ("plain", "x"))
    np.testing.assert_array_equal(plain, asked)
    for one in names:
        for other in names:
            assert one == other or np.abs(pictures[one] - pictures[other]).max() > 2, (one, other)
    # a threshold that no step reaches, and weights of 1, change nothing
    options = ["--explore", "--t_thresh=1000", "--weight_range", "1", "1"]
    script("sample", *arguments, f"--out={tmp_path / 'off'}", *options)
    for name in names:
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "off" / f"0000{name}.png"), int), pictures[""])


def test_final_evaluation(script, workdir, tmp_path):
    """Every prompt's rewards, diversity and signs; the base model's differ, and the schedule's; the same each time."""

    def measured(name, *flags):
        script(
            FINAL_EVALUATION,
            f"--workdir={workdir}",
            f"--out={tmp_path / name}",
            "--samples_per_prompt=3",
            *flags,
        )
        return json.loads((tmp_path / name).read_text())

    tuned, base, again = (
        measured("a/t.json", "--explored"),
        measured("b.json", "--base", "--many=5"),
        measured("t.json"),
    )
    assert again == {key: value for key, value in tuned.items() if key != "explored"}
    assert {p.name for p in tmp_path.rglob("*.partial")} == set()
    assert (tuned["iteration"], base["iteration"], tuned["features"]) == (7, 0, "pickscore")
    assert base["many_per_prompt"] == 5 and base["many"]["unseen"]["means"] != base["plain"]["unseen"]["means"]
    assert tuned["machine"]["jax"] == jax.__version__ and tuned["machine"]["devices"].startswith("1 x ")
    results = [tuned["plain"]["unseen"], tuned["explored"]["unseen"], base["plain"]["unseen"]]
    names = {"pickscore", "luminance", "saturation", "background_share", "diversity/distance", "diversity/vendi"}
    for result in results:
        assert result["prompts"] == ["a snail", "a lobster riding a bike"]
        assert result["means"].keys() == result["per_prompt"].keys() == names
        for name in names:
            assert np.mean(result["per_prompt"][name]) == pytest.approx(result["means"][name]["mean"], abs=1e-5)
        assert all(1.0 < x <= 3.0 for x in result["per_prompt"]["diversity/vendi"])
        assert all(0.0 < x < 2.0 for x in result["per_prompt"]["diversity/distance"])
    for one in range(3):
        for other in range(one):
            pair = [results[i]["means"]["pickscore"]["mean"] for i in (one, other)]
            assert abs(pair[0] - pair[1]) > 1e-3, (one, other)


@pytest.mark.parametrize("scope, draws", [(None, 4), ("prompt", 2)])
def test_sample_explores_images_or_prompts(tiny_model, scope, draws):
    """Two images of each of two prompts: a draw of Eq. 8 each, or one for both."""
    built = sampler.Sampler.build(sample_settings(model=str(tiny_model), scope=scope))
    prompts, rows = PromptSet("sample", ("a dog", "a zebra"), (("dog",), ("zebra",))), np.array([0, 0, 1, 1])
    cond = jax.tree.map(lambda x: x[rows], built.encode(prompts))
    _, words = built.reweighted(prompts, rows, cond, seed=0)
    assert len(set(words)) == draws and (words[0] == words[1]) == (words[2] == words[3]) == (draws == 2)


def sample_settings(**flags):
    """What scripts/sample.py samples by, with these flags and no others."""
    usual = dict.fromkeys(sample_flags.KEYS) | {
        "lora": None,
        "checkpoint": None,
        "lora_scale": None,
        "batch": 16,
        "num_images": 1,
        "out": "out",
    }
    return sample_flags.settings_of(Namespace(**usual | flags))


def test_sample_with_another_scheduler(tiny_model):
    """--scheduler KEY=VALUE is the config's model.scheduler.KEY, which the model is loaded with."""
    said = ["timestep_spacing=trailing", "set_alpha_to_one=False", "steps_offset=0"]
    config = sample_settings(model=str(tiny_model), scheduler=said)
    overrides = sampler.scheduler_overrides(config)
    assert overrides == {"timestep_spacing": "trailing", "set_alpha_to_one": False, "steps_offset": 0}
    loaded = load_pipeline(config.model.path, weights=False, **sampler.pipeline_options(config))
    assert loaded.process.timesteps(4).tolist() == [999, 749, 499, 249]
    for wrong, message in (
        ("x=1", "wants KEY=VALUE; accepted: clip_sample, prediction_type, "),
        ("steps_offset", "wants KEY=VALUE"),
        ("set_alpha_to_one=2.5", "the value is of another type"),
    ):
        with pytest.raises(InputError, match=f"^--scheduler {wrong}: {message}"):
            sample_settings(model="no/such", scheduler=[wrong])
    with pytest.raises(InputError, match="model.scheduler.steps_offset=True: wants 0..1000"):
        sample_settings(model="no/such", scheduler=["steps_offset=true"])
    with pytest.raises(InputError, match="model.scheduler.timestep_spacing='odd': accepted: None, leading, trailing"):
        sample_settings(model="no/such", scheduler=["timestep_spacing=odd"])


def test_sample_by_the_settings_of_the_run(workdir, tiny_model, lora, tmp_path):
    """Of --lora RUN: its model, steps, guidance and eta, unless a flag says otherwise; of a LoRA file the defaults."""
    config = sample_settings(lora=str(workdir))
    assert (config.sampling.steps, config.sampling.guidance, config.sampling.eta) == (4, 3.0, 0.0)
    assert config.model.path == str(tiny_model) and config.exploration.t_thresh == 500
    assert config.sampling.negative_prompt == ""
    assert sample_settings(negative_prompt="a, b").sampling.negative_prompt == "a, b"
    with pytest.raises(InputError, match="^--negative_prompt ' ': wants words"):
        sample_settings(negative_prompt=" ")
    config = sample_settings(lora=str(workdir), steps=7, eta=0.5, w_low=2.0, weight_range=[1.0, 3.0])
    assert (config.sampling.steps, config.sampling.guidance, config.sampling.eta) == (7, 3.0, 0.5)
    assert config.exploration.w_low == 2.0 and config.exploration.weight_range == (1.0, 3.0)
    save_lora(tmp_path / "l.safetensors", lora, alpha=4.0)
    config = sample_settings(lora=str(tmp_path / "l.safetensors"))
    assert (config.sampling.steps, config.sampling.guidance, config.sampling.eta) == (50, 7.5, 0.0)
    assert config.model.path == "emoji" and config.model.dtype == "float32"


FLAGS = ("image_size", "steps", "guidance", "eta", "seed", "w_low", "t_thresh", "batch", "num_images")


@pytest.mark.parametrize("flag", [*FLAGS, "weight_range"])
def test_flags_of_sample_that_make_no_sense(flag):
    """Negative, zero where that is nothing, not finite, absurdly large; before a model is looked for."""
    whole = flag not in ("guidance", "eta", "w_low", "weight_range")
    values = [-1, 10**30] if whole else [-1.0, 1e30, np.nan, np.inf]
    values += [0] if flag in ("image_size", "steps", "batch", "num_images") else []
    for value in values:
        given = [value, value] if flag == "weight_range" else value
        with pytest.raises(InputError, match=f"^--{flag} .*: wants [^\n]*$"):
            sample_settings(model="no/such", **{flag: given})


def test_a_line_of_a_file_is_an_image(tmp_path):
    """Also a line that is there twice; and any text goes through prompts.csv to scripts/score.py."""
    sample, score = (vars(program) for program in (cli_sample, cli_score))
    (tmp_path / "p.txt").write_text("a dog\na cat\na dog\n")
    odd = 'a "big" dog,\nin\u2028rain'
    texts = sample["chosen_prompts"](argparse.Namespace(prompt=[odd], prompts=str(tmp_path / "p.txt"))).texts
    assert texts == (odd, "a dog", "a cat", "a dog")
    args, images = argparse.Namespace(out=tmp_path / "x", save_npy=False), np.zeros((4, 8, 8, 3), np.float32)
    sample["write"](args, [sample["Variant"]("", texts, None, None, None)], texts, [images])
    paths = score["find_images"]([tmp_path / "x"])
    assert score["known_prompts"](None, paths) == list(texts)
    with pytest.raises(InputError, match=r"^--prompt: .* holds U\+DCFF, half a character"):
        sample["chosen_prompts"](argparse.Namespace(prompt=["a \udcff dog"], prompts=None))


def test_more_images_than_fit_in_memory(script, fails, tiny_model, tmp_path, monkeypatch):
    """Said before the prompts are encoded: 16 x 16 pixels are 3,840 bytes an image."""
    monkeypatch.setattr(backend, "host_memory", lambda: 1_000_000)
    given = [f"--model={tiny_model}", "--prompt=a dog", "--num_images=131", f"--out={tmp_path / 'x'}"]
    said = fails(2, script, "sample", *given)
    assert "131 images would take at least 0.0 GiB" in said and "wants at most 130 at once, half of it" in said


def test_several_images_of_a_prompt(script, tiny_model, tmp_path):
    """As many as --num_images says or, of one prompt, as there are latents; each with its own noise, and its prompt."""
    latents = np.random.default_rng(0).standard_normal((3, 8, 8, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", latents)
    common = [f"--model={tiny_model}", "--steps=3", "--save_npy"]
    script("sample", *common, "--prompt=a dog", f"--latents={tmp_path / 'x.npy'}", f"--out={tmp_path / 'one'}")
    images = np.load(tmp_path / "one" / "images.npy")
    assert len(images) == 3 and np.abs(images[0] - images[1]).max() > 0.02
    script("sample", *common, "--prompt=a dog", "--prompt=a cat", "--num_images=2", f"--out={tmp_path / 'two'}")
    assert len(np.load(tmp_path / "two" / "images.npy")) == 4
    with open(tmp_path / "two" / "prompts.csv", newline="") as file:
        rows = list(csv.reader(file))
    names = [f"{i:04d}.png" for i in range(4)]
    expected = zip(names, ["a dog"] * 2 + ["a cat"] * 2, strict=True)
    assert rows == [["image", "prompt"], *map(list, expected)]


def test_samples_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A disk that is full halfway through a file leaves the one that was there."""
    script = vars(cli_sample)
    variant = script["Variant"]("", ["a dog"], None, None, None)

    def sample(value):
        images = np.full((1, 16, 16, 3), value, np.float32)
        script["write"](Namespace(out=str(tmp_path), save_npy=True), [variant], ["a dog"], [images])

    def half(self, path, **kwargs):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    sample(0.0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(InputError, match="cannot be written .No space left on device"):
        sample(1.0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_a_grid_shows_of_many():
    shown_rows = vars(cli_sample)["shown_rows"]
    assert shown_rows(5, 4).tolist() == [0, 1, 2, 3, 4]
    assert len(shown_rows(135, 4)) == 12 and shown_rows(135, 2)[[0, -1]].tolist() == [0, 134]
    assert len(shown_rows(500, 1)) == 64


def test_sample_explores_as_training_does(script, tiny_model, tmp_path, capsys):
    """Without flags by the numbers of configs/base.py."""
    common = f"--model={tiny_model}", "--prompt=a dog", "--steps=10", "--explore", "--save_npy"
    script("sample", *common, f"--out={tmp_path / 'usual'}")
    said, e = capsys.readouterr().out, base.default().exploration
    assert f"guidance: {e.w_low:g} in the first 1 of 10 steps" in said and e.t_thresh == 900
    flags = f"--w_low={e.w_low}", f"--t_thresh={e.t_thresh}", f"--unit={e.unit}"
    script("sample", *common, *flags, "--weight_range", *map(str, e.weight_range), f"--out={tmp_path / 'said'}")
    names = [path.name for path in (tmp_path / "usual").iterdir()]
    assert "0000-both.png" in names
    for name in names:
        assert (tmp_path / "usual" / name).read_bytes() == (tmp_path / "said" / name).read_bytes()


def test_evaluate_on_other_devices(script, workdir, tmp_path, monkeypatch):
    """Of which training's batch is no multiple: only --batch counts."""
    config = json.loads((workdir / "config.json").read_text())
    config["batch"]["samples"] = 7  # no multiple of anything here: as a run on seven devices
    config["batch"]["samples_per_forward"] = 1
    config["prompts"] = "gone.txt"  # what was trained on is not read
    (workdir / "config.json").write_text(json.dumps(config))
    seen = []
    monkeypatch.setattr(tqdm, "update", lambda self, n=1: seen.append(n))
    prompts = "--prompts=a dog, big,prompt:cat"
    script("evaluate", f"--workdir={workdir}", prompts, "--samples_per_prompt=1", f"--out={tmp_path / 'e.json'}")
    found = json.loads((tmp_path / "e.json").read_text())
    names = [key for key in found if isinstance(found[key], dict) and "base" in found[key]]
    assert [name.partition("-")[0] for name in names] == ["a_dog__big", "cat"]
    assert sum(seen) == 4  # the progress bar: two images of two models


def test_evaluate(script, workdir, tmp_path, tiny_settings):
    script("evaluate", f"--workdir={workdir}", "--samples_per_prompt=3", "--batch=4", f"--out={tmp_path / 'e.json'}")
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["iteration"] == 7 and found["samples_per_prompt"] == 3
    base, tuned = found["unseen"]["base"]["pickscore"], found["unseen"]["tuned"]["pickscore"]
    assert np.isfinite([base["mean"], tuned["mean"]]).all() and base["standard_error"] > 0
    assert abs(base["mean"] - tuned["mean"]) > 1e-3
    with Image.open(tmp_path / "e-unseen.png") as grid:  # six pictures (two prompts, three each), before and after
        assert grid.size[0] > 6 * 128 and 2 * 128 < grid.size[1] < 3 * 128, grid.size
    script("evaluate", f"--workdir={workdir}", "--lora_scale=0", "--batch=4", f"--out={tmp_path / 'none.json'}")
    found = json.loads((tmp_path / "none.json").read_text())
    assert found["unseen"]["base"] == found["unseen"]["tuned"] and found["lora_scale"] == 0
