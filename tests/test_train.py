"""Whole training runs on a tiny model: what they write, that they resume and repeat bit for bit, and how they stop."""

import gc
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sample_rewards
from PIL import Image
from safetensors.numpy import load_file

from diffexp_jax import command, parallel, report, train
from diffexp_jax.errors import InputError
from diffexp_jax.experiment import Experiment, make_optimizer
from diffexp_jax.models.lora import load_lora
from diffexp_jax.pipelines.stable_diffusion import load
from diffexp_jax.programs import Programs, make_explore
from diffexp_jax.run import checkpoint, progress
from diffexp_jax.run.metrics import read_metrics, score_of
from diffexp_jax.settings import checked
from tests.support import ROOT
from tests.support.runs import LORA, PLAIN, assert_same_run, contents, program, rows_of
from tests.support.tiny import CompileCounter

# by both only among the slow tests: ddpo has more state, and the same loop
ONE = pytest.mark.parametrize("finished", ["ddpo", pytest.param("alignprop", marks=pytest.mark.slow)], indirect=True)


class Run(NamedTuple):
    algorithm: str
    config: object
    workdir: Path
    compiled: list[int]  # programs compiled before each iteration, and in all
    programs: Programs


@pytest.fixture(scope="module", params=[pytest.param("alignprop", marks=pytest.mark.slow), "ddpo"])
def finished(request, make_config, tmp_path_factory) -> Run:
    """A whole run of four iterations: three that explore, one that does not; evaluations after 0, 3 and 4.

    Beside it, `killed`: what is on the disk after the second iteration's row and before its checkpoint.
    """
    config, workdir, compiled = make_config(request.param), tmp_path_factory.mktemp(request.param) / "run", []
    made = []
    with CompileCounter() as counter, pytest.MonkeyPatch.context() as patch:

        def draw_batch(*args, original=Experiment.draw_batch):
            compiled.append(counter.count)
            return original(*args)

        def make_programs(*args, original=train.make_programs):
            made.append(original(*args))
            return made[0]

        def save(self, iteration, *args, original=checkpoint.Checkpoints.save, **options):
            if iteration == 2:
                self.wait()  # for the one before, so that nothing changes while it is copied
                shutil.copytree(workdir, workdir.parent / "killed", ignore=shutil.ignore_patterns("lease.json"))
            original(self, iteration, *args, **options)

        patch.setattr(Experiment, "draw_batch", draw_batch)
        patch.setattr(train, "make_programs", make_programs)
        patch.setattr(checkpoint.Checkpoints, "save", save)
        keep_grids(patch, workdir)
        train.run(config, workdir)
        compiled.append(counter.count)
    return Run(request.param, config, workdir, compiled, made[0])


def keep_grids(patch: pytest.MonkeyPatch, workdir: Path) -> None:
    """Makes a run keep its grids as numbers in WORKDIR/../grid-ITERATION.npy, and in live.txt what the devices hold."""

    def save_images(workdir_, iteration, images, captions, original=report.save_images):
        np.save(workdir.parent / f"grid-{iteration:06d}.npy", images)
        original(workdir_, iteration, images, captions)

    def make_programs(experiment, original=train.make_programs):
        programs = original(experiment)

        def sample(*args):
            gc.collect()  # what another test's run left in cycles is not of this one
            with open(workdir.parent / "live.txt", "a") as file:
                shards = [shard.data for x in jax.live_arrays() for shard in x.addressable_shards]
                held = {shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}  # several may share memory
                file.write(f"{sum(held.values())}\n")
            return programs.sample(*args)

        return programs._replace(sample=programs.sample and sample)

    patch.setattr(report, "save_images", save_images)
    patch.setattr(train, "make_programs", make_programs)


def keep_images(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes a run keep the images that it is trained on as FOLDER/images-ITERATION.npy."""

    def make_programs(experiment, original=train.make_programs):
        programs, iterations = original(experiment), itertools.count(1)
        generate = programs.generate(experiment.sampler.guidance_scales(explore=True))

        def update(state, frozen, inputs):
            batch = inputs.batch
            images = generate(frozen.model, state.lora, batch.context, batch.key, inputs.steps)
            np.save(folder / f"images-{next(iterations):06d}.npy", parallel.unshard(images))
            return programs.update(state, frozen, inputs)

        return programs._replace(update=update)

    patch.setattr(train, "make_programs", make_programs)


# ---------------------------------------------------------------------------------------------------- what a run leaves


def test_metrics(finished):
    rows = read_metrics(finished.workdir)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]
    names = {"iteration", "reward_queries", "unet_evaluations", "reward/mean", "reward/std", "loss", "grad_norm"}
    names |= {"time/sample", "time/train"}
    if finished.algorithm == "ddpo":
        names |= {"ratio/mean", "ratio/clip_fraction", "approx_kl"}
    for n, row in enumerate(rows[1:], 1):
        assert names <= row.keys()
        assert row["reward_queries"] == 8 * n  # images
        assert row["unet_evaluations"] == 8 * n * 4 * 2  # images, steps, both halves of the guidance
        assert all(np.isfinite(value) for value in row.values())
        assert row["grad_norm"] > 0 and row["reward/std"] > 0
    evaluated = [row["iteration"] for row in rows if "eval/unseen/pickscore" in row]
    assert evaluated == [0, 3, 4]
    assert rows[0].keys() == {"iteration", "eval/unseen/pickscore"}
    assert rows[0]["eval/unseen/pickscore"] != rows[4]["eval/unseen/pickscore"]


def test_files(finished, tiny_settings):
    workdir = finished.workdir
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["algorithm"] == finished.algorithm and saved["prompts"] == tiny_settings["prompts"]
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"3", "4"}
    assert {path.name for path in (workdir / "images").iterdir()} == {"000000.png", "000003.png", "000004.png"}
    with Image.open(workdir / "curves.png") as curves:
        assert min(curves.size) > 200
    page = (workdir / "report.html").read_text()
    number = r'<td class="number">[-\d.]+</td>'
    assert re.search(rf"unseen</caption>.*?<td>pickscore</td>{number}{number}", page, re.S) and "4 of 4" in page
    assert '"labels":["before","after 3 iterations","after 4 iterations"]' in page and page.count('alt="a dog') >= 2
    about = json.loads((workdir / "about.json").read_text())
    assert about["versions"]["jax"] == jax.__version__ and about["devices"]["devices"] == "1"
    assert about["schedule"] == {"t": [751, 501, 251, 1], "w_t": [0.5, 0.5, 3.0, 3.0]}  # t_thresh 500
    assert "".join(text for text, _ in about["prompt"]["pieces"]) == "an ant" and len(about["prompt"]["draws"]) == 4
    assert all(unit in (1, 2) and 1.0 <= weight <= 1.5 for unit, weight in about["prompt"]["draws"])


def test_lora_file_is_the_newest_checkpoint(finished, tiny_model):
    lora, scale = load_lora(finished.workdir, load(tiny_model).params["unet"])
    iteration, saved = checkpoint.read_lora(finished.workdir)
    assert (iteration, scale) == (4, 1.0)
    jax.tree.map(np.testing.assert_array_equal, lora, saved)
    values = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(lora)}
    assert all(np.abs(x).max() > 1e-3 for x in values.values())  # every B has left zero


def test_images_change_only_as_the_lora_does(finished):
    first, third, last = (np.load(finished.workdir.parent / f"grid-{i:06d}.npy").astype(int) for i in (0, 3, 4))
    assert first.shape == (3, 16, 16, 3)
    assert np.abs(last - third).max() > 0
    assert 0 < np.abs(third - first).max() < 128  # the same prompts, the same noise


def test_nothing_is_compiled_after_the_second_iteration(finished):
    """Evaluations, image grids, checkpoints and the end of exploration come later, and bring nothing new.

    Nor is there a small program for each shape of what a run begins with: there are 16 in all, here.
    """
    assert len(finished.compiled) == 5 and 0 < finished.compiled[0] <= finished.compiled[-1] <= 25
    assert finished.compiled[2:] == [finished.compiled[2]] * 3


def test_nothing_is_kept_from_the_iteration_before(finished):
    """When an iteration begins to sample there is as much on the devices as the one before found."""
    if finished.algorithm == "ddpo":
        live = [int(line) for line in (finished.workdir.parent / "live.txt").read_text().split()]
        assert len(live) == 4 and live[1:] == [live[1]] * 3 and live[0] <= live[1] <= 1.01 * live[0], live


# ---------------------------------------------------------------------------------------------------------- exploration


@pytest.mark.usefixtures("undrawn")
@ONE
def test_exploration_off_is_plain_bit_for_bit(finished, make_config, tmp_path, monkeypatch):
    """Off equals a schedule without a step and weights of 1; the run with exploration is another one.

    All by the same programs, but for the one that draws weights: the schedule is an argument.
    """

    def make_programs(experiment):
        return finished.programs._replace(explore=make_explore(experiment))

    monkeypatch.setattr(train, "make_programs", make_programs)
    changes = PLAIN | {"iterations": 2}
    neutral = {"exploration.w_low": 3.0, "exploration.weight_range": (1.0, 1.0)}
    train.run(make_config(finished.algorithm, changes | {"exploration.enabled": False}), tmp_path / "off")
    train.run(make_config(finished.algorithm, changes | neutral), tmp_path / "neutral")
    assert_same_run(tmp_path / "off", tmp_path / "neutral")
    explored, plain = (rows_of(path)[1]["reward/mean"] for path in (finished.workdir, tmp_path / "off"))
    assert abs(explored - plain) > 1e-4


# --------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.usefixtures("undrawn")
@ONE
def test_what_a_killed_run_left_continues_bit_for_bit(finished, tmp_path, monkeypatch, capsys):
    """The row without its checkpoint goes, and the iteration is done again."""
    workdir = shutil.copytree(finished.workdir.parent / "killed", tmp_path / "run")
    assert len(read_metrics(workdir)) == 3 and not (workdir / "checkpoints" / "2").exists()
    monkeypatch.setattr(train, "make_programs", lambda experiment: finished.programs)  # the same: compiled already
    train.run(finished.config, workdir)
    assert "continuing from iteration 1\n" in capsys.readouterr().out
    assert_same_run(workdir, finished.workdir)


@pytest.mark.slow  # two processes that trace everything anew
@ONE
def test_a_killed_run_continues_bit_for_bit(finished, tiny_settings, tmp_path):
    """Killed by SIGKILL at a random moment, and started again by the same command."""
    workdir, environment = tmp_path / "run", os.environ | {"PYTHONPATH": str(ROOT)}
    line = program(finished.algorithm, workdir, tiny_settings)
    rows, delay = random.randint(1, 3), random.uniform(0.0, 0.3)
    print(f"killed {delay:.3f} s after row {rows}")
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=output, stderr=output)
        while process.poll() is None and len(read_metrics(workdir)) < rows:
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (tmp_path / "output").read_text()
    assert not (workdir / LORA).exists()
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(workdir, finished.workdir)
    assert json.loads((workdir / "config.json").read_text()) == json.loads(
        (finished.workdir / "config.json").read_text()
    )


@pytest.mark.usefixtures("undrawn")
def test_a_broken_checkpoint_is_set_aside(finished, tmp_path, caplog, monkeypatch):
    """The last whole one is used, it is said so, and the run ends as if nothing had happened."""
    if finished.algorithm == "alignprop":
        pytest.skip("one algorithm is enough, and ddpo's state holds more")
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    (workdir / LORA).unlink()
    for path in (workdir / "checkpoints" / "4").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    monkeypatch.setattr(train, "make_programs", lambda experiment: finished.programs)  # the same: compiled already
    train.run(finished.config, workdir)
    assert "checkpoint 4 is broken" in caplog.text and "checkpoints-broken/4" in caplog.text
    assert (workdir / "checkpoints-broken" / "4").is_dir()
    assert_same_run(workdir, finished.workdir)


def state(n: int) -> dict:
    return {"lora": {"to_q": {"A": np.full((3, 2), n, np.float32)}}, "iteration": np.array(n, np.int32)}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of orbax's reader, when it fails
@pytest.mark.parametrize("damage", ["truncated", "emptied", "without its arrays", "an empty folder"])
def test_damaged_checkpoints(damage, tmp_path, caplog):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
    for n in (1, 2, 3):
        checkpoints.save(n, state(n))
    checkpoints.close()
    newest = tmp_path / "checkpoints" / "3"
    files = [path for path in newest.rglob("*") if path.is_file()]
    if damage == "an empty folder":
        shutil.rmtree(newest)
        newest.mkdir()
    for path in files if damage in ("truncated", "emptied") else ():
        os.truncate(path, path.stat().st_size // 2 if damage == "truncated" else 0)
    if damage == "without its arrays":
        for path in files:
            if path.parent.name == "d":
                path.unlink()
    assert checkpoint.read_lora(tmp_path)[0] == 2  # the scripts pass over it, and leave it where it is
    assert newest.is_dir()
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
    iteration, restored = checkpoints.restore_newest(state(0))
    assert iteration == 2
    jax.tree.map(np.testing.assert_array_equal, restored, state(2))
    assert "checkpoint 3 is broken" in caplog.text
    checkpoints.save(3, state(30))  # the run goes on and gets there again
    checkpoints.close()
    assert checkpoint.read_lora(tmp_path)[0] == 3


def test_checkpoints_that_do_not_fit_are_not_started_over(tmp_path, caplog):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, state(1))
    with pytest.raises(InputError, match="every checkpoint is broken; move the folder away"):
        checkpoints.restore_newest(state(0) | {"lora": {"to_q": {"A": np.zeros((3, 4), np.float32)}}})
    checkpoints.close()
    assert "checkpoint 1 is broken (its arrays have other shapes)" in caplog.text
    assert checkpoint.read_lora(tmp_path)[0] == 1  # nothing is lost


# ------------------------------------------------------------------------------------------------------------------ NaN


@pytest.mark.slow  # a run for each reward; the next one takes the same way
def test_nan_stops_the_run(make_config, tmp_path, capsys, monkeypatch):
    """The reward turns NaN in the third iteration: it is named, the exit code is 1, the checkpoints are left alone."""
    workdir, settings = tmp_path / "run", PLAIN | {"reward": "jax:sample_rewards:scaled_brightness"}
    train.run(make_config("alignprop", settings | {"iterations": 2}), workdir)
    before, rows = contents(workdir / "checkpoints"), rows_of(workdir)
    monkeypatch.setattr(sample_rewards, "FACTOR", [np.nan])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command.guarded(train.run, make_config("alignprop", settings), workdir)
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert "error: iteration 3: loss nan" in said and "Traceback" not in said
    assert contents(workdir / "checkpoints") == before and rows_of(workdir) == rows


@pytest.mark.slow  # the methods of one update alone; others see it in the next one
@pytest.mark.parametrize("finished", ["alignprop"], indirect=True)
def test_an_update_that_is_not_finite_is_not_saved(finished, tmp_path, monkeypatch):
    """Loss and gradient are those of the weights before it, and finite; what Adam remembers of the past is endless."""
    init = finished.programs.algorithm.init

    def begin(lora):
        state = init(lora)
        endless = jax.tree.map(lambda x: np.full_like(x, 3e38), lora)
        return state.replace(opt_state=optax.tree.set(state.opt_state, mu=endless))

    algorithm = finished.programs.algorithm._replace(init=begin)
    programs = finished.programs._replace(algorithm=algorithm)
    monkeypatch.setattr(train, "make_programs", lambda experiment: programs)
    with pytest.raises(FloatingPointError, match="iteration 1: loss -?[0-9].* of the LoRA (inf|nan): stopped"):
        train.run(finished.config, tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"0"}
    assert checkpoint.read_lora(tmp_path)[0] == 0 and rows_of(tmp_path)[-1]["iteration"] == 0


# -------------------------------------------------------------------------------------------------------------- devices


def run_with_images(algorithm: str, workdir: str, settings: str) -> None:
    """What the subprocess below does, with as many devices as XLA_FLAGS gives it."""
    from configs import alignprop, ddpo

    config = {"alignprop": alignprop, "ddpo": ddpo}[algorithm].get_config()
    values = json.loads(settings)
    config.update_from_flattened_dict({key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    with pytest.MonkeyPatch.context() as patch:
        keep_images(patch, Path(workdir).parent)
        train.run(config, Path(workdir))
    print(f"{jax.device_count()} devices")


@pytest.mark.slow
@ONE
def test_a_run_goes_on_with_other_devices(
    finished, tiny_settings, tiny_model, make_config, tmp_path, capsys, monkeypatch
):
    """Two iterations on four devices; then the model is moved, and the others follow here. All as on one device.

    Rewards and LoRA within 1e-5 of their size. Images are of bytes: a pixel may be rounded the other way. A mean reward
    is as large as rewards differ, and DDPO's loss is a mean of advantages, which are of size 1: both means may be near
    zero, so they are compared by those sizes.
    """
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'users'}"}
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"
    code = "import sys; from tests.test_train import run_with_images; run_with_images(*sys.argv[1:])"
    settings = tiny_settings | {"iterations": 2, "exploration.iterations": 3}
    line = [sys.executable, "-c", code, finished.algorithm, str(tmp_path / "run"), json.dumps(settings)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 devices" in done.stdout
    capsys.readouterr()
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    monkeypatch.setattr(train, "make_programs", lambda experiment: finished.programs)  # the same: compiled already
    train.run(make_config(finished.algorithm, {"model.path": str(moved)}), tmp_path / "run")
    assert capsys.readouterr().out.startswith("continuing from iteration 2\n  iterations is 4, was 2\n  exploration is")

    def relative(ours, theirs):
        return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)

    (one := tmp_path / "one").mkdir()
    with monkeypatch.context() as patch:
        keep_images(patch, one)
        train.run(make_config(finished.algorithm, PLAIN | {"iterations": 2, "exploration.iterations": 3}), one / "run")
    loras = [load_file(folder / LORA) for folder in (tmp_path / "run", finished.workdir)]
    errors = {"lora": relative(*(np.concatenate([lora[name].ravel() for name in sorted(lora)]) for lora in loras))}
    for iteration in (1, 2):
        name = f"images-{iteration:06d}.npy"
        ours, theirs = (np.load(folder / name).astype(int) for folder in (tmp_path, one))
        assert abs(ours - theirs).max() <= 1 and (ours != theirs).mean() < 0.01, name
    for row, expected in zip(rows_of(tmp_path / "run"), rows_of(finished.workdir), strict=True):
        assert row.keys() >= expected.keys()  # and an evaluation after the second, which was the last at first
        if "loss" in row:
            spread = expected["reward/std"]
            sizes = {"reward/mean": max(spread, abs(expected["reward/mean"])), "reward/std": spread}
            sizes["loss"] = 1.0 if finished.algorithm == "ddpo" else abs(expected["loss"])
            for name, size in sizes.items():
                errors[f"{name} {row['iteration']}"] = abs(row[name] - expected[name]) / size
        if "eval/unseen/pickscore" in expected:
            assert row["eval/unseen/pickscore"] == pytest.approx(expected["eval/unseen/pickscore"], rel=1e-3)
    print(errors)
    assert max(errors.values()) <= 1e-5


# --------------------------------------------------------------------------------------------------------- what it says


@pytest.mark.slow  # test_checkpoint.py has its parts
def test_the_best_checkpoint_is_kept(make_config, tmp_path, monkeypatch):
    """It is saved when it is measured, though no checkpoint is due then; the scripts take it."""
    values = dict(enumerate([1.0, 3.0, 2.0, 2.5]))
    monkeypatch.setattr(train, "evaluate_and_draw", lambda run, lora, it: {"eval/x/judge": values[it]})
    changes = {"checkpoint.best": "eval/x/judge", "checkpoint.every": 100, "checkpoint.keep": 1, "iterations": 3}
    train.run(make_config("ddpo", PLAIN | changes), tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "3"}
    assert [checkpoint.read_lora(tmp_path, which)[0] for which in ("best", "newest")] == [1, 3]


def test_the_best_by_an_evaluation_that_there_is_not():
    row = {"reward": 0.5, "eval/unseen/pickscore": 20.0}
    assert score_of(row, "eval/unseen/pickscore") == 20.0 and score_of(row, "reward") == 0.5
    assert score_of({"reward": 0.5}, "eval/unseen/pickscore") is None  # no evaluation was due
    with pytest.raises(InputError, match="checkpoint.best='eval/unseen/beauty': accepted: eval/unseen/pickscore$"):
        score_of(row, "eval/unseen/beauty")


@pytest.mark.parametrize(
    "schedule, rates",
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", [1, 0.853553, 0.5, 0.146447]),  # (1 + cos(pi k / 4)) / 2
    ],
)
def test_the_learning_rate_over_a_run(make_config, schedule, rates):
    """Of four updates; Adam's step for a gradient that stays the same is the learning rate."""
    changes = {"optim.schedule": schedule, "optim.lr": 0.5, "optim.weight_decay": 0.0, "optim.eps": 1e-12}
    optimizer = make_optimizer(make_config("ddpo", changes).optim, 4)
    x, steps = jnp.zeros(2), []
    state = optimizer.init(x)
    for _ in rates:
        change, state = optimizer.update(jnp.array([0.3, -0.1]), state, x)
        steps.append(change)
    np.testing.assert_allclose(steps, 0.5 * np.outer(rates, [-1, 1]), rtol=1e-4)


@pytest.mark.parametrize(
    "algorithm, changes, n", [("ddpo", {"ddpo.updates": 2, "ddpo.inner_epochs": 3}, 12), ("alignprop", {}, 2)]
)
def test_what_counts_as_an_update(make_config, algorithm, changes, n):
    """Of the schedule of a run of two iterations: each pass over the samples anew; the rate is 0 after the last."""
    config = make_config(algorithm, changes | {"iterations": 2, "optim.schedule": "linear", "optim.weight_decay": 0.0})
    optimizer, x, steps = Experiment.build(checked(config)).optimizer, jnp.zeros(2), []
    state = optimizer.init(x)
    for _ in range(n + 1):
        change, state = optimizer.update(jnp.array([0.3, -0.1]), state, x)
        steps.append(bool(jnp.any(change != 0)))
    assert steps == [True] * n + [False]


def test_expected_time():
    said = progress.expected_time([2.0, 4.0], 40)
    assert said.startswith(
        "iterations take about 3.0 s on this machine: about 2.0 minutes more for the 40 that are left"
    )


def test_determinism_is_asked_for_before_a_device_is_used(make_config, tmp_path, monkeypatch):
    """XLA reads the flag when the first device is used, and checking the settings counts devices."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    seen = []

    def stop(config):
        seen.append(os.environ["XLA_FLAGS"])
        raise InputError("stop")

    monkeypatch.setattr(train.Experiment, "build", stop)
    for on in (False, True, True):
        with pytest.raises(InputError, match="stop"):
            train.run(make_config("ddpo", {"deterministic": on}), tmp_path)
    assert seen == ["--xla_a=1", *["--xla_a=1 --xla_gpu_deterministic_ops=true"] * 2]


def test_a_grid_of_a_single_prompt(make_config):
    """As many pictures as asked for: of one prompt on several seeds."""
    config = make_config("ddpo", {"prompts": "a dog riding a bike", "log.images": 3, "eval.every": 0})
    shown = Experiment.build(checked(config)).train.grid(3)
    assert shown.texts == ("a dog riding a bike",) * 3 and shown.cond.embedding.shape[0] == 3 and not shown.tokens
