"""Pictures, curves, reports, TensorBoard and Weights & Biases: what goes wrong there is a line, and the run goes on."""

import errno
import json
import math
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from configs import ddpo
from diffexp_jax import report, train
from diffexp_jax.errors import InputError
from diffexp_jax.report import run as report_of_a_run
from diffexp_jax.run import optional
from diffexp_jax.run.metrics import MetricsWriter, read_metrics
from tests.support import ROOT
from tests.support.runs import PLAIN
from tests.support.sample_runs import ROWS, write_rows

NAMES = ("cost$_$of", "$a_b$ and $", "_hidden", r"\$x$^$", "caf\xe9 \u4e2d", "a\nb", "%s {x}")


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch):
    monkeypatch.setattr(optional, "_said", set())


def run_folder(folder, rows, settings=None):
    """What a run leaves, by its settings and metrics."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(ddpo.get_config().to_dict() | (settings or {})))
    write_rows(folder, rows)
    return folder


# ------------------------------------------------------------------------------------------------------------- warnings


def test_a_failure_is_said_once_for_each_cause(caplog):
    def fail(error):
        raise error

    for _ in range(2):
        for n, error in enumerate((ValueError("no\nTraceback"), OSError(errno.ENOSPC, "No space", "a"), KeyError(0))):
            assert optional.attempt("images", fail, error) is None, n
        optional.attempt("images", fail, OSError(errno.ENOSPC, "No space", "b"))
    assert [record.getMessage() for record in caplog.records] == [
        "images: failed (ValueError: no); the run continues without",
        "images: failed ([Errno 28] No space: 'a'); the run continues without",
        "images: failed (KeyError: 0); the run continues without",
    ]
    assert optional.attempt("images", lambda a, b: a + b, 1, b=2) == 3
    with pytest.raises(KeyboardInterrupt):
        optional.attempt("images", fail, KeyboardInterrupt())


@pytest.fixture
def nothing_can_be_drawn(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("cannot be drawn")

    for name in ("save_grid", "save_curves", "save_page"):
        monkeypatch.setattr(report_of_a_run, name, fail)


SAID = [
    f"{what}: failed (RuntimeError: cannot be drawn); the run continues without"
    for what in ("images", "curves.png", "report.html")
]


def test_pictures_and_reports_that_all_fail(nothing_can_be_drawn, tmp_path, caplog):
    folder = run_folder(tmp_path, ROWS)
    for n in range(2):
        report.save_images(folder, n, np.zeros((1, 8, 8, 3), np.uint8), ["a dog"])
        report.refresh(folder)
    assert "20.000  20.500" in report.finish(folder)
    assert [record.getMessage() for record in caplog.records] == SAID


@pytest.mark.slow
def test_a_run_whose_pictures_and_reports_all_fail(nothing_can_be_drawn, make_config, tmp_path, caplog):
    """It trains to its end as one whose do not, and so does its continuation."""
    changes = {**PLAIN, "log.images": 2, "log.images_every": 1, "checkpoint.every": 1}
    for iterations in (2, 3):
        train.run(make_config("ddpo", changes | {"iterations": iterations}), tmp_path)
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]
    assert (tmp_path / train.LORA_FILE).exists() and not (tmp_path / report.REPORT).exists()
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "continues without" in line] == SAID


def test_a_full_disk_while_a_picture_is_written(tmp_path):
    """Nothing is left of it; the line says so, and the one that ends the run says how to go on."""
    code = (
        "import resource, sys, numpy as np; from pathlib import Path\n"
        "from diffexp_jax import command, report; from diffexp_jax.run import metrics\n"
        "def main(folder):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (10, -1))\n"
        "    for n in range(2):\n"
        "        report.save_images(folder, n, np.zeros((1, 8, 8, 3), np.uint8), ['a dog'])\n"
        "    metrics.MetricsWriter(folder).write(1, {'loss': 0.25})\n"
        "command.guarded(main, Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.count("\n") == 2, done.stderr
    warning, error = done.stderr.splitlines()
    assert done.returncode == 1 and "images: failed ([Errno 27] File too large" in warning
    assert error.startswith("error: ") and error.endswith("untouched, and the same command continues from it")
    assert list((tmp_path / "images").iterdir()) == []


# ------------------------------------------------------------------------------------------------------- names and rows


def test_any_name_of_a_prompt_set_is_drawn_as_it_is(tmp_path):
    rows = [{f"eval/{name}/pickscore": row["iteration"] + 0.5 for name in NAMES} | row for row in ROWS]
    run_folder(tmp_path, rows)
    report.save_curves(tmp_path)
    with Image.open(tmp_path / "curves.png") as picture:
        picture.load()
    report.save(tmp_path)
    page = (tmp_path / report.REPORT).read_text(encoding="utf-8")
    assert "Could not be made" not in page and "cost$_$of" in page and page.count("<svg") > 3


@pytest.mark.parametrize("text", ["cost$_$of", "$x$", r"\$x$", "_hidden", "a $ b"])
def test_a_dollar_begins_no_formula(text):
    """What matplotlib makes of it: the text itself, not mathematics, and no label that a legend leaves out."""
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    axis.plot([0, 1], label=report.plain(text))
    (label,) = axis.legend().get_texts()
    shown, is_formula = label._preprocess_math(label.get_text())
    assert not is_formula and shown.strip() == text


SLASHES = [{"iteration": 0, "eval/unseen": 1.0}, {"iteration": 1, "eval/unseen": 2.0, "eval/": 1.0, "eval": 3.0}]
TIMES = [{"iteration": 0, "time/train": 1.0}, {"iteration": 1, "time/sample": 1.0}]
TEXTS = [{"iteration": n, "time/train": "long", "time/sample": None, "reward/mean": [1]} for n in range(3)]
INFINITE = [{"iteration": n, "reward/mean": x, "eval/a/b": x} for n, x in enumerate((math.inf, math.nan, 1e308))]
HUGE = [{"iteration": 10**12 * n, "reward/mean": (-1) ** n * 1e308, "reward_queries": 0.5} for n in range(3)]


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(
    "rows", [[*SLASHES, *TIMES], TEXTS, INFINITE, HUGE], ids=["names", "texts", "infinite", "huge"]
)
def test_rows_that_are_damaged(tmp_path, rows):
    folder = run_folder(tmp_path / "run", rows)
    assert report.finish(folder).endswith(f"look at {folder / report.REPORT} and {folder / 'images'}")
    assert "<h2>Settings" in (folder / report.REPORT).read_text()


def test_a_section_that_cannot_be_made_says_why(tmp_path):
    folder = run_folder(tmp_path / "run", ROWS)
    (folder / "about.json").write_text(json.dumps({"devices": 3, "versions": [], "schedule": {"t": ["x"]}}))
    report.save(folder)
    page = (folder / report.REPORT).read_text()
    assert page.count("Could not be made: ") == 2 and "<h2>Curves" in page and page.count("<svg") > 2


def test_a_folder_of_which_no_page_can_be_made(tmp_path):
    folder = run_folder(tmp_path / "run", ROWS, {"iterations": "many"})
    line = [sys.executable, str(ROOT / "scripts" / "report.py"), f"--workdir={folder}"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------- services


def test_tensorboard_that_cannot_be_written(tmp_path, caplog):
    """From the beginning, or from some row on: a full disk. More rows than its queue has room for."""
    pytest.importorskip("tensorboardX")
    (tmp_path / "tensorboard").touch()
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.continue_from(None)
        writer.write(1, {"loss": 0.5})
    (tmp_path / "tensorboard").unlink()
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.continue_from(1)
        full = os.open("/dev/full", os.O_WRONLY)
        (events,) = (tmp_path / "tensorboard").iterdir()
        for name in os.listdir("/proc/self/fd"):
            if os.path.exists(f"/proc/self/fd/{name}") and os.path.samefile(f"/proc/self/fd/{name}", events):
                os.dup2(full, int(name))
        os.close(full)
        for n in range(2, 40):
            writer.write(n, {"loss": 0.5, "grad_norm": 1.0})
    said = [record.getMessage() for record in caplog.records]
    said = [line for line in said if line.startswith("TensorBoard (log.tensorboard): failed (")]
    assert len(said) == 2 and "No space left on device" in said[1]
    assert [row["iteration"] for row in read_metrics(tmp_path)] == list(range(1, 40))


def wandb_that_fails(monkeypatch, *, at):
    def fail(*args, **options):
        raise ConnectionError("no network")

    run = types.SimpleNamespace(id="abc", log=lambda *a, **k: None, finish=lambda **k: None)
    fake = types.SimpleNamespace(init=lambda **options: run, Settings=lambda **options: None)
    setattr(fake if at == "init" else run, at, fail)
    monkeypatch.setitem(sys.modules, "wandb", fake)


@pytest.mark.parametrize("at", ["log", "finish"])
def test_weights_and_biases_that_goes_away(tmp_path, monkeypatch, caplog, at):
    wandb_that_fails(monkeypatch, at=at)
    with MetricsWriter(tmp_path, wandb={}) as writer:
        for n in range(3):
            writer.write(n, {"loss": 0.5})
    (record,) = caplog.records
    assert record.getMessage() == ("Weights & Biases (log.wandb): failed (no network); the run continues without")
    assert len(read_metrics(tmp_path)) == 3


@pytest.mark.parametrize("kept", ["abc\n", "\xff/../ b\n"])
def test_a_run_that_began_there_goes_on_without(tmp_path, monkeypatch, caplog, kept):
    """A new one that cannot begin is refused: it was asked for."""
    wandb_that_fails(monkeypatch, at="init")
    with pytest.raises(InputError, match="log.wandb=true: no network; log in .wandb login. or set WANDB_MODE=offline"):
        MetricsWriter(tmp_path, wandb={})
    (tmp_path / "wandb-id.txt").write_text(kept, encoding="latin-1")
    with MetricsWriter(tmp_path, wandb={}) as writer:
        writer.write(0, {"loss": 0.5})
    assert "continues without" in caplog.text and len(read_metrics(tmp_path)) == 1
