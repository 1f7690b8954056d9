"""Sweeps: what their arms are, that runs are shared, skipped, resumed and stopped, and the final evaluation."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs import base
from configs.paper import ALIASES, EXPERIMENTS
from configs.sweeps import SWEEPS
from diffexp_jax import command, config_files
from diffexp_jax.algorithms import METHODS, Method
from diffexp_jax.errors import InputError
from diffexp_jax.limits import setting
from diffexp_jax.models.lora import LORA_FILE
from diffexp_jax.run import stopping
from diffexp_jax.run.metrics import read_metrics
from diffexp_jax.settings import parsed
from diffexp_jax.sweeps import commands
from tests.support import ROOT
from tests.support.runs import assert_same_run
from tests.support.tiny import as_flags

HERE = ROOT / "scripts"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    import sweep

    from diffexp_jax.sweeps import plan as sweep_plan
    from diffexp_jax.sweeps import runs as sweep_runs

    return SimpleNamespace(sweep=sweep, plan=sweep_plan, runs=sweep_runs)


@pytest.fixture
def planned(scripts):
    """planned(experiments, seeds=2): the runs and the arms' folders on the emoji model."""

    def plan(*names, seeds=2, overrides=None, only=()):
        runs, about = scripts.plan.plan(
            names, model="emoji", seeds=range(seeds), out=Path("out"), overrides=overrides or {}, only=only
        )
        return runs, {x["experiment"]: x for x in about.values()}

    return plan


# ----------------------------------------------------------------------------------------------------------------- arms


def test_the_experiments():
    figures = {"fig1", "fig8", "fig9a_aesthetic", "fig9a_pickscore", "fig9b_aesthetic", "fig9b_pickscore", "fig10b"}
    figures |= {"fig4_ddpo_aesthetic", "fig4_ddpo_pickscore", "fig4_alignprop_aesthetic", "fig4_alignprop_pickscore"}
    assert {name for name in SWEEPS if name.startswith("fig")} == figures
    for name, sweep in SWEEPS.items():
        assert sweep["baseline"] in sweep["arms"] and sweep["shows"], name
        for file, _, rest in (argument.partition(".py:") for argument, _ in sweep["arms"].values()):
            assert rest.split(",")[0] in EXPERIMENTS if file == "paper" else file in config_files.names()


@pytest.mark.parametrize("model", [None, "emoji"])
@pytest.mark.parametrize("name", SWEEPS)
def test_every_arm_can_run(scripts, name, model):
    """Each is another config; the baseline does not explore, and all are evaluated at the same iterations."""
    runs, about = scripts.plan.plan([name], model=model, seeds=[0], out=Path("out"), overrides={})[0], SWEEPS[name]
    arms = len(runs) if name == "rates" else len(about["arms"])  # a method's own rate may be one of its three
    assert len(runs) == arms == len({run.workdir for run in runs})
    assert "-plain-" in str(runs[list(about["arms"]).index(about["baseline"])].workdir)
    sizes = {(run.iterations, run.changes["eval.every"], run.changes["checkpoint.every"]) for run in runs}
    few = name in ("methods", "rates", "parts_grpo", "groups")  # evaluations, see test_paired.py
    assert few or len(sizes) <= 2 and all(11 <= n / every <= 13 for n, every, _ in sizes)


@pytest.mark.parametrize(
    "name, expected",
    [
        # the schedule's mean, (2 x 1 + 18 x 5) / 20
        ("controls_ddpo_pickscore constant", {"exploration.w_low": 4.6, "exploration.t_thresh": 0}),
        ("controls_ddpo_pickscore all_iterations", {"exploration.fraction": 1.0}),
        ("controls_ddpo_pickscore per_prompt", {"exploration.scope": "prompt"}),
        ("unknowns_ddpo_pickscore w_low_0", {"exploration.w_low": 0.0}),
        ("unknowns_ddpo_pickscore upper_2.0", {"exploration.weight_range": (1.0, 2.0)}),
        ("unknowns_ddpo_pickscore token", {"exploration.unit": "token"}),
        ("tune_ddpo_pickscore lr_x2", {"optim.lr": 4.8e-2}),
        ("tune_ddpo_pickscore clip_x3", {"ddpo.clip": 9e-3}),
        ("tune_ddpo_pickscore updates_4", {"ddpo.updates": 4}),
        ("fig1 baseline", {"eval.rewards": ("emoji_pickscore",)}),
        ("controls_fig1 weighting", {"eval.rewards": ("emoji_pickscore",), "exploration.t_thresh": 1000}),
    ],
)
def test_what_an_arm_changes(planned, name, expected):
    runs, _ = planned(name.split()[0], seeds=1)
    (run,) = (run for run in runs if run.label == f"{name} seed 0")
    assert run.changes.keys() == expected.keys() | {"seed", "eval.every", "checkpoint.every"}
    for key, value in expected.items():
        assert run.changes[key] == (pytest.approx(value) if isinstance(value, float) else value)


@pytest.mark.parametrize("alias, name", ALIASES.items())
def test_figures_of_the_same_run_are_the_same_experiment(planned, alias, name):
    assert planned(alias, name, seeds=1) == planned(name, seeds=1)


def test_an_experiment_is_found_by_its_other_names(scripts, tmp_path):
    found = {"experiment": "fig8", "model": "emoji", "overrides": {}, "shows": "", "baseline": "x", "arms": {}}
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "fig8-emoji.json").write_text(json.dumps(found | {"base": "b"}))
    assert scripts.runs.find(tmp_path, "fig17a").name == scripts.runs.find(tmp_path, "fig8").name == "fig8"


def test_runs_are_shared(planned):
    """One config, one run: also of other experiments; seed by seed, each once."""
    names = ("fig4_alignprop_pickscore", "fig9a_pickscore", "fig9b_pickscore", "controls_alignprop_pickscore")
    runs, about = planned(*names)
    assert [run.changes["seed"] for run in runs] == [0] * 10 + [1] * 10
    assert len({run.workdir for run in runs}) == 20
    arms = {name: about[name]["arms"] for name in names}
    plain, both = arms["fig4_alignprop_pickscore"].values()
    assert plain == arms["fig9a_pickscore"]["none"] == arms["fig9b_pickscore"]["none"]
    assert plain == arms["controls_alignprop_pickscore"]["baseline"] and runs[0].workdir == Path("out", plain, "seed0")
    assert both == arms["fig9a_pickscore"]["both"] == arms["fig9b_pickscore"]["t900"] != plain
    assert both == arms["controls_alignprop_pickscore"]["diffexp"]
    assert runs[0].explored and not any(run.explored for run in runs[1:10])  # that a control wants
    assert [run.base is not None for run in runs] == ([True] + [False] * 9) * 2


def test_some_arms(planned):
    """They are the runs that they are among all; what is noted of the experiment stays the same."""
    runs, about = planned("fig9a_pickscore", seeds=1)
    some, same = planned("fig9a_pickscore", seeds=1, only=("both", "schedule"))
    assert some == [runs[2], runs[3]] and same == about


def test_what_makes_another_run(scripts):
    """What a run learns and reports does, where and how it computes does not, nor a default that is written out."""

    def name(**changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        return scripts.plan.run_name(scripts.plan.resolve("paper.py:fig1,model=emoji", changes, {})[0])

    usual = name()
    assert re.fullmatch("ddpo-emoji_judge-emoji-diffexp-[0-9a-f]{10}", usual)
    assert name(seed=3, cpu_devices=1, log__images=0, checkpoint__keep=5, batch__samples_per_forward=8) == usual
    assert name(exploration__w_low=1.0) == usual and name(exploration__w_low=2.0) != usual
    assert name(iterations=61, eval__every=5) != name(iterations=60, eval__every=5) != name(eval__every=6)
    assert "-plain-" in name(exploration__enabled=False)


def test_settings_of_a_method_from_elsewhere(scripts, monkeypatch):
    """What configs/base.py does not know is compared with the method's own defaults."""

    @dataclass(frozen=True, kw_only=True)
    class Mine(Method):
        clip: float = setting(1e-4, "of the ratio")
        size: int = setting(2, "of nothing")

    monkeypatch.setitem(METHODS, "mine", Mine)
    config = base.default()
    config.algorithm, config.mine = "mine", {"clip": 0.5}
    assert scripts.plan.settings_that_matter(parsed(config)) == {"algorithm": "mine", "mine.clip": 0.5}


def test_overrides(planned):
    """They are where arms start from, so that factors are of them; the experiment is then another one."""
    runs, about = planned("tune_ddpo_pickscore", seeds=1, overrides={"optim.lr": 1e-3, "iterations": 24})
    by_arm = {run.label.split()[1]: run for run in runs}
    assert by_arm["lr_x2"].changes["optim.lr"] == pytest.approx(2e-3)
    assert by_arm["baseline"].changes == {
        "optim.lr": 1e-3,
        "iterations": 24,
        "eval.every": 2,
        "checkpoint.every": 2,
        "seed": 0,
    }
    assert {run.iterations for run in runs} == {24}
    assert about["tune_ddpo_pickscore"]["overrides"] == {"optim.lr": 1e-3, "iterations": 24}
    assert planned("fig1", overrides={"eval.every": 7})[0][0].changes["eval.every"] == 7


@pytest.mark.parametrize(
    "text, expected",
    [
        ("--config.optim.lr=1e-3", ("optim.lr", 1e-3)),
        ("--config.eval.prompts=a dog, asleep,animals", ("eval.prompts", ("a dog, asleep", "animals"))),
        ("--config.reward=hpsv2:weights", ("reward", "hpsv2:weights")),
    ],
)
def test_parse_override(scripts, text, expected):
    assert scripts.plan.parse_override(text) == expected


# --------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def command_line(scripts, monkeypatch, tmp_path, capsys):
    """command_line("fig1", ...) -> (exit code, stdout, stderr) of scripts/sweep.py in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments])
        code = 0
        try:
            command.guarded(scripts.sweep.main, *scripts.sweep.parse(sys.argv[1:]))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--experiment=fig99"], "--experiment='fig99': accepted: fig1, fig4_ddpo_aesthetic, "),
        (
            ["--experiment=fig1", "--model=sd3"],
            "paper.py:fig1,explore=false,model=sd3: config argument model='sd3': acc",
        ),
        (["--experiment=fig1", "--arm=both"], "--arm='both': accepted: baseline, diffexp"),
        (["--experiment=fig1", "--seeds=0"], "--seeds 0: wants 1..10000000"),
        (["--experiment=fig1", "--parallel=0"], "--parallel 0: wants 1..10000000"),
        (
            ["--experiment=fig1", "--seed=1"],
            "unexpected argument '--seed=1'; settings of all arms are given as --config.",
        ),
        (["--experiment=fig1", "--config.no.such=1"], 'paper.py:fig1,explore=false: Key "no.such" cannot be set as'),
        (["--experiment=fig1", "--config.optim.lr=2.0"], "optim.lr=2.0: wants more than 0, at most 1"),
        (
            ["--experiment=fig1", "--config.iterations=many"],
            "paper.py:fig1,explore=false: Could not override field 'it",
        ),
        (["--experiment=fig1", "--out=file/x"], "--out file/x: cannot be written"),
    ],
)
def test_bad_input(command_line, tmp_path, arguments, said):
    (tmp_path / "file").touch()
    code, out, err = command_line(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {said}") and err.count("\n") == 1, err
    assert os.listdir(tmp_path) == ["file"]


def test_printed_commands(command_line, tmp_path):
    """In the order of running; the base model's evaluation once. They are of this source, wherever one is."""
    code, out, err = command_line("--experiment=fig4_ddpo_pickscore", "--model=emoji", "--seeds=2", "--print")
    lines = [shlex.split(line) for line in out.splitlines()]
    assert (code, err, len(lines)) == (0, "", 9)
    train, final, base = lines[:3]
    assert train[:3] == ["python", "-m", "diffexp_jax.train"]
    assert train[3] == f"--config={ROOT}/configs/paper.py:fig4_ddpo_pickscore,explore=false,model=emoji"
    workdir = train[4].removeprefix("--workdir=")
    assert workdir.startswith("runs/sweeps/runs/ddpo-emoji_pickscore-emoji-plain-") and workdir.endswith("/seed0")
    assert train[5:] == ["--config.eval.every=3", "--config.checkpoint.every=3", "--config.seed=0"]
    script = ["-m", "diffexp_jax.sweeps.final_evaluation"]
    flags = [f"--workdir={workdir}", "--samples_per_prompt=4"]
    assert final == ["python", *script, *flags, f"--out={workdir}/final.json", "--trust_code"]
    assert base[:5] == ["python", *script, *flags] and base[6:] == ["--base", "--many=16", "--trust_code"]
    assert [line[-1] for line in lines if line[2] == "diffexp_jax.train"] == [
        f"--config.seed={n}" for n in (0, 0, 1, 1)
    ]
    assert sum("--base" in line for line in lines) == 1
    about = json.loads((tmp_path / "runs/sweeps/experiments/fig4_ddpo_pickscore-emoji.json").read_text())
    assert f"runs/sweeps/{about['arms']['baseline']}/seed0" == workdir and about["baseline"] == "baseline"
    assert base[5] == f"--out=runs/sweeps/{about['base']}"


def test_the_printed_slurm_script(command_line, tmp_path):
    """A job for each run, with all of its commands: run here by bash with a python that says how it was called."""
    code, out, _ = command_line("--experiment=fig1", "--model=emoji", "--seeds=2", "--print", "slurm")
    assert code == 0 and "#SBATCH --array=0-3\n" in out
    (tmp_path / "job.sh").write_text(out)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nfor x; do echo "$x"; done\n')
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3"}
    done = subprocess.run(["bash", "job.sh"], env=environment, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert f"--config={ROOT}/configs/paper.py:fig1,model=emoji" in said and "--config.seed=1" in said
    assert "--config.eval.rewards=('emoji_pickscore',)" in said and "--base" not in said
    assert said.count("--samples_per_prompt=64") == 1 and "--many=64" in out  # as the run's own evaluations of a prompt


def finish(run, *, iterations=None, explored=False) -> None:
    """What a run that is done leaves."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    (run.workdir / "metrics.jsonl").write_text(json.dumps({"iteration": iterations or run.iterations}) + "\n")
    for name in (LORA_FILE, commands.REPORT):
        (run.workdir / name).touch()
    final = {"samples_per_prompt": 4, "many_per_prompt": 16} | ({"explored": {}} if explored else {})
    for path in filter(None, (run.workdir / commands.FINAL, run.base)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(final))


def test_what_is_done_is_skipped(command_line, scripts, planned):
    arguments = ["--experiment=fig4_ddpo_pickscore", "--model=emoji", "--seeds=2", "--out=out"]
    runs, _ = planned("fig4_ddpo_pickscore")
    for run in runs:
        finish(run)
    assert command_line(*arguments) == (0, "nothing to do: 4 runs are done\n", "")
    assert command_line(*arguments, "--print")[2] == "nothing to do: 4 runs are done\n"
    (runs[1].workdir / LORA_FILE).unlink()  # only its numbers were kept
    assert command_line(*arguments) == (0, "nothing to do: 4 runs are done\n", "")
    finish(runs[1])
    finish(runs[2], iterations=35)  # stopped before its end
    (runs[3].workdir / commands.FINAL).unlink()  # not evaluated
    lines = command_line(*arguments, "--print")[1].splitlines()
    assert len(lines) == 2 and "-m diffexp_jax.train" in lines[0] and str(runs[2].workdir) in lines[0]
    assert "final_evaluation" in lines[1] and str(runs[3].workdir) in lines[1]
    assert "diffexp_jax.train" in command_line(*arguments, "--print", "--samples_per_prompt=0")[1].split()
    assert len(command_line(*arguments, "--print", "--samples_per_prompt=8")[1].splitlines()) == 6
    assert "--many=64" in command_line(*arguments, "--print", "--base_samples=64")[1]
    # a control wants more of the baseline's evaluation, and of the base model's
    finish(runs[2])
    controls = command_line("--experiment=controls_ddpo_pickscore", *arguments[1:], "--print")[1].splitlines()
    again = [line for line in controls if "--explored" in line]
    assert len(again) == 3 and not any("diffexp_jax.train" in line and "explore=false" in line for line in controls)


def test_progress_counts_what_need_not_be_trained_again(scripts, planned, tmp_path, monkeypatch):
    """Of a run only numbers were kept: they are enough, or it is trained anew."""
    monkeypatch.chdir(tmp_path)
    run = planned("fig1", seeds=1)[0][0]
    assert [scripts.sweep.done_of(run, unfinished) for unfinished in (False, True)] == [0, 0]
    finish(run, iterations=30)
    assert [scripts.sweep.done_of(run, unfinished) for unfinished in (False, True)] == [30, 0]
    (run.workdir / "checkpoints").mkdir()
    assert scripts.sweep.done_of(run, True) == 30


# -------------------------------------------------------------------------------------------------------------- running


@pytest.fixture
def run_all(scripts, tmp_path, monkeypatch):
    """run_all(commands of each run, its places) with small programs in place of training."""
    monkeypatch.setattr(scripts.sweep, "POLL", 0.02)
    before = {number: signal.getsignal(number) for number in stopping.signals()}

    def call(*commands, places=({}, {})):
        runs = [
            scripts.plan.Run(tmp_path / f"run{i}", f"run {i}", "", {}, 1, 1, None, False) for i in range(len(commands))
        ]
        left = [(run, [["python", "-c", code] for code in codes]) for run, codes in zip(runs, commands, strict=True)]
        scripts.sweep.run_all(runs, left, places)

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


def test_commands_follow_each_other_and_runs_go_side_by_side(run_all, tmp_path):
    """The second of a run's commands reads what the first wrote; two runs wait for each other's first."""
    first = (
        "import pathlib, time; pathlib.Path('{0}').touch()\nwhile not pathlib.Path('{1}').exists(): time.sleep(0.01)"
    )
    paths = [str(tmp_path / name) for name in "ab"]
    second = "import pathlib; assert pathlib.Path('{0}').exists(); print('seen')"
    run_all(*[[first.format(*pair), second.format(pair[0])] for pair in (paths, paths[::-1])])
    for i in range(2):
        assert (tmp_path / f"run{i}" / "log.txt").read_text().endswith("\nseen\n")


def test_a_failed_run_is_named_and_the_others_go_on(run_all, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_all(
            ["print('fine')", "print('then')\nraise SystemExit('error: no such reward')", "print('never')"], ["pass"]
        )
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert f"failed: run 0 (exit code 1): error: no such reward ({tmp_path / 'run0' / 'log.txt'})" in said
    assert said.endswith("1 of 2 runs failed; the same command tries them again\n")
    assert (tmp_path / "run0" / "log.txt").read_text().count("$ python") == 2 and (tmp_path / "run1").exists()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_what_runs(run_all, tmp_path, capsys, number, code):
    """The programs get the signal and end by themselves; the ones that wait are not begun."""
    waits = f"""
import pathlib, signal, sys, time
def stop(number, frame):
    print("stopped cleanly by", number)
    sys.exit(1)
signal.signal({int(number)}, stop)
pathlib.Path("{tmp_path / "ready"}").touch()
time.sleep(60)
"""

    def send():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    with pytest.raises(SystemExit) as stop:
        run_all([waits], ["print('begun')"], places=[{}])
    assert stop.value.code == code
    assert "stopped; the same command continues" in capsys.readouterr().err
    assert (tmp_path / "run0" / "log.txt").read_text().endswith(f"stopped cleanly by {int(number)}\n")
    assert not (tmp_path / "run1").exists()


def test_how_many_at_once(scripts, monkeypatch):
    """On a CPU a run on each core, on one device each, which stays so for the last one; one on each GPU."""
    processes = scripts.sweep.processes
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6))
    assert processes(None, 10, "cpu", 1) == (6, 1) and processes(3, 10, "cpu", 1) == (3, 1)
    assert processes(None, 1, "cpu", 1) == (1, None) and processes(1, 10, "cpu", 1) == (1, None)
    assert processes(None, 10, "gpu", 8) == (8, None) and processes(4, 10, "gpu", 1) == (4, None)
    assert processes(None, 1, "gpu", 8) == (1, None) and processes(None, 10, "tpu", 8) == (1, None)


def test_gpus_are_shared_out(scripts, monkeypatch):
    """Runs take turns at the GPUs; those on one have 90 % of its memory together. One run has them all."""
    places = scripts.sweep.places
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert places(2, 0) == [{}, {}]
    assert places(2, 4) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    third = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.300"}
    assert places(3, 1) == [third | {"CUDA_VISIBLE_DEVICES": "0"}] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(3, 2)] == ["2", "5", "2"]


def test_a_place_that_is_free_is_taken_again(run_all, tmp_path):
    """Two places for four runs of two commands: each run keeps its place, and no place has two runs at once."""
    code = f"""
import os, pathlib, time
print(place := os.environ["PLACE"])
mine = pathlib.Path("{tmp_path}") / f"busy{{place}}"
mine.touch(exist_ok=False)
time.sleep(0.1)
mine.unlink()
"""
    run_all(*[[code, code]] * 4, places=[{"PLACE": "a"}, {"PLACE": "b"}])
    said = [(tmp_path / f"run{i}" / "log.txt").read_text().split() for i in range(4)]
    taken = [[word for word in words if word in "ab"] for words in said]
    assert all(first == second for first, second in taken)
    assert {"a", "b"} == {first for first, _ in taken}


# --------------------------------------------------------------------------------------------------------- whole sweeps


def sweep_line(tiny_settings, out: Path) -> list[str]:
    """Two arms of four iterations on the tiny model, each with its final evaluation."""
    line = [sys.executable, str(HERE / "sweep.py"), "--experiment=fig4_ddpo_pickscore", "--model=emoji", "--seeds=1"]
    return [
        *line,
        f"--out={out}",
        "--parallel=2",
        "--samples_per_prompt=2",
        "--base_samples=3",
        *as_flags(tiny_settings),
    ]


def finals(out: Path) -> dict[str, dict]:
    return {str(path.relative_to(out)): json.loads(path.read_text()) for path in out.rglob("final.json")}


@pytest.mark.slow  # some twenty processes
def test_a_killed_sweep_ends_as_an_uninterrupted_one(tiny_settings, tmp_path):
    """Killed three times at random moments, with all that it had begun, and started again by the same command."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(sweep_line(tiny_settings, whole), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folders = sorted(path.relative_to(whole) for path in whole.glob("runs/*/seed0"))
    assert len(folders) == 2

    def rows():
        return sum(len(read_metrics(killed / folder)) for folder in folders)

    for _ in range(3):
        before, delay = rows(), random.uniform(0.0, 2.0)
        with open(tmp_path / "output", "w") as output:
            line = sweep_line(tiny_settings, killed)
            process = subprocess.Popen(line, env=environment, stdout=output, stderr=output, start_new_session=True)
            while process.poll() is None and rows() <= before < 10:
                time.sleep(0.01)
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"killed {delay:.3f} s after row {rows()}")
    done = subprocess.run(sweep_line(tiny_settings, killed), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder in folders:
        assert_same_run(killed / folder, whole / folder)
    assert finals(killed) == finals(whole) and len(finals(whole)) == 3
    again = subprocess.run(sweep_line(tiny_settings, killed), env=environment, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, "nothing to do: 2 runs are done\n")
    # bad input of one arm's process is named, the other arm is not touched
    shutil.rmtree(killed / folders[0])
    (killed / folders[0]).parent.joinpath("seed0").mkdir()
    (killed / folders[0] / "lock").mkdir()
    broken = subprocess.run(sweep_line(tiny_settings, killed), env=environment, capture_output=True, text=True)
    assert broken.returncode == 1 and "1 of 2 runs failed" in broken.stderr


def test_errors_are_input_errors(scripts):
    with pytest.raises(InputError, match="unexpected argument '--fast'"):
        scripts.plan.parse_override("--fast")
