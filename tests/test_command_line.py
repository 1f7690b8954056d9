"""Training's command line: mistakes on it, numbers that make no sense, and what runs out: one line, an exit code."""

import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from configs.models import MODELS
from diffexp_jax import chosen_rewards, command, settings, train
from diffexp_jax.algorithms import METHODS
from diffexp_jax.cli import train as cli_train
from diffexp_jax.limits import Number
from diffexp_jax.prompts import load_prompts
from diffexp_jax.settings import Settings, by_key, parsed
from tests.support import ROOT
from tests.support.runs import run_program

CONFIG = f"--config={ROOT / 'configs' / 'alignprop.py'}"


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


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(capsys, flag):
    """In our words, with exit code 0; every flag of the program is there."""
    with pytest.raises(SystemExit) as end:
        cli_train.parse_flags(["train", flag])
    said = capsys.readouterr().out
    assert end.value.code == 0 and max(map(len, said.splitlines())) <= 120
    names = ("config", "config.KEY=VALUE", "workdir", "dry_run", "target", "list", "list=settings")
    assert all(f"--{name}" in said for name in names)


@pytest.mark.parametrize(
    "config, path, warned",
    [("model=emoji", "mine", True), ("", "mine", True), ("model=sd15", "mine", False), ("", "emoji_hard", False)],
)
def test_a_model_of_another_size(monkeypatch, caplog, config, path, warned):
    """The config's model sets sizes and rates too; another path alone does not."""
    monkeypatch.setattr(sys, "argv", ["train", f"{CONFIG}:{config}", f"--config.model.path={path}"])
    with flagsaver.flagsaver():
        cli_train.parse_flags(sys.argv)
        cli_train.warn_of_sizes(flags.FLAGS["config"])
    said = "model.path=mine: steps, batch, learning rate, clip and evaluation are those for emoji"
    assert (said in caplog.text) == warned


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ([f"{CONFIG}:model=sd99"], ["model='sd99'", "accepted: emoji, emoji_hard, emoji_flow, sd15, sd21, sdxl"]),
        ([f"{CONFIG}:model=emojii"], ["model='emojii'", "did you mean 'emoji' or 'emoji_hard'?"]),
        ([f"{CONFIG}:reward=pickscor", "--workdir=x"], ["unknown reward 'pickscor'", "did you mean 'pickscore' or"]),
        ([f"{CONFIG}:prompts=animal_activites", "--workdir=x"], ["did you mean 'animal_activities' or"]),
        ([CONFIG, "--optim.lr=1"], ["no such flag --optim.lr; did you mean --config.optim.lr?"]),
        ([CONFIG, "--learning_rate=1"], ["no such flag --learning_rate; did you mean --config.optim.lr?"]),
        ([CONFIG, "--config.exploration.w_high=7"], ["'exploration.w_high'; did you mean 'sampling.guidance'?"]),
        ([CONFIG, "--workdir=x", "--config.algorithm=dppo"], ["algorithm='dppo'", "did you mean 'dpok' or 'ddpo'?"]),
        (["--config=aligprop"], ["config: aligprop: no such file", "did you mean 'alignprop'?"]),
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
        (["--config=nosuch:model=emoji"], ["config: nosuch: no such file; accepted: a path, alignprop, "]),
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


@pytest.mark.parametrize(
    "values", [("-1", "nan", "1e30"), pytest.param(("0", "inf", "-inf", f"1{'0' * 30}"), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("key", sorted(TABLE))
def test_numbers_that_make_no_sense(fails, command_line, monkeypatch, tmp_path, key, values):
    """Negative, zero, not finite, absurdly large: a line each and exit code 2, before anything is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "Experiment", None)
    method = key.split(".")[0] if key.split(".")[0] in METHODS else "ddpo"
    config, accepted = f"--config={ROOT / 'configs' / f'{method}.py'}", TABLE[key]
    for value in values:
        several = {"reward_weights": f"(1.0, {value})", "exploration.weight_range": f"({value}, {value})"}
        if not accepted.accepts(int(value) if value.lstrip("-").isdigit() else float(value)):
            fails(2, command_line, config, f"--config.{key}={several.get(key, value)}", "--workdir=x")
    assert not list(tmp_path.iterdir())


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
    chosen_rewards.check_files(parsed(config), weights=True)
    assert settings.cpu_devices(parsed(config)) == 1
    assert not (tmp_path / "~").exists()


def test_the_real_program_says_one_line(tmp_path):
    done = run_program("-m", "diffexp_jax.train", f"{CONFIG}:model=sd99", "--workdir=x", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: config argument model='sd99': accepted: " + ", ".join(MODELS) + "\n"
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
