"""What people look at: grids, curves, the page, the summary; and the metrics that they are made of."""

import io
import json
import math
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffexp_jax import report
from diffexp_jax.errors import InputError
from diffexp_jax.programs import as_bytes
from diffexp_jax.report.grids import read_grid
from diffexp_jax.report.run import setting_parts
from diffexp_jax.run.metrics import MetricsWriter, grid_path, read_metrics
from diffexp_jax.settings import Settings, changed, flat
from tests.support import ROOT
from tests.support.sample_runs import ROWS, write_rows

# ------------------------------------------------------------------------------------------------------------- pictures


def test_as_bytes():
    values = np.array([-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 0.5, 1.0, 1.7, 254.4 / 255], np.float32)
    images = np.broadcast_to(values[:, None], (8, 3)).reshape(1, 2, 4, 3)
    pixels = np.asarray(as_bytes(images))
    assert pixels[0, ..., 0].ravel().tolist() == [0, 0, 0, 1, 128, 255, 255, 254]
    assert pixels.dtype == np.uint8 and (pixels == pixels[..., :1]).all()


def test_grid(tmp_path):
    """Five pictures of one colour each: three columns, two rows, every picture enlarged where it belongs."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [51, 102, 153], [0, 0, 0]], np.uint8)
    images = np.broadcast_to(colours[:, None, None], (5, 16, 16, 3))
    path = tmp_path / "new" / "grid.png"
    report.save_grid(path, images, ["red", "green", "blue", "a word " * 40, ""])
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    size = 16 * 8
    assert pixels.shape == (4 + 2 * (size + 44), 4 + 3 * (size + 4), 3)
    for n, colour in enumerate(colours):
        x, y = 4 + n % 3 * (size + 4), 4 + n // 3 * (size + 44)
        cell = pixels[y : y + size, x : x + size]
        np.testing.assert_array_equal(cell, np.broadcast_to(colour, cell.shape))
        strip = pixels[y + size : y + size + 44, x : x + size]
        assert (strip < 128).any() == (n < 4)  # a caption is written, and none where it is empty
    x, y = 4 + 2 * (size + 4), 4 + (size + 44)
    assert (pixels[y : y + size, x : x + size] == 255).all()  # the sixth place is free


def test_grid_keeps_the_pixels_of_large_pictures(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(2, 160, 130, 3)).astype(np.uint8)
    report.save_grid(tmp_path / "g.png", images, ["a", "b"], columns=1)
    with Image.open(tmp_path / "g.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape == (4 + 2 * 204, 4 + 134, 3)
    np.testing.assert_array_equal(pixels[4 + 204 : 4 + 364, 4:134], images[1])


def test_grid_wants_a_caption_each(tmp_path):
    with pytest.raises(ValueError):
        report.save_grid(tmp_path / "g.png", np.zeros((2, 8, 8, 3), np.uint8), ["one"])


def test_a_grid_looks_only_at_the_words_that_it_draws(tmp_path, monkeypatch):
    """A prompt of 10 MB, of words or of one word, is drawn as its beginning is, and cut in the file."""
    measured, original = [], ImageDraw.ImageDraw.textlength

    def textlength(draw, text, *args, **kwargs):
        measured.append(len(text))
        return original(draw, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "textlength", textlength)
    images = np.zeros((1, 128, 128, 3), np.uint8)
    for word in ("word ", "x"):
        pixels = []
        for text in (word * 1000, word * (10**7 // len(word))):
            report.save_grid(tmp_path / "g.png", images, [text])
            with Image.open(tmp_path / "g.png") as sheet:
                pixels.append(np.asarray(sheet))
        np.testing.assert_array_equal(*pixels)
        assert len(read_grid(tmp_path / "g.png").captions[0]) < 3000
    assert len(measured) < 200 and max(measured) < 2000


def test_curves(tmp_path):
    report.save_curves(tmp_path)
    assert not list(tmp_path.iterdir())  # nothing to draw
    sizes = []
    for rows in (ROWS[:1], ROWS):
        write_rows(tmp_path, rows)
        report.save_curves(tmp_path)
        with Image.open(tmp_path / "curves.png") as image:
            image.load()
            sizes.append(image.size)
            assert len(np.unique(np.asarray(image.convert("RGB")) @ [1, 2**8, 2**16])) > 10  # a number for each colour
    (width, height), whole = sizes  # a panel for each of two evaluated rewards; then reward, gradient, ratio as well
    assert whole == (pytest.approx(1.5 * width, rel=0.01), pytest.approx(2 * height, rel=0.01))


def panels(folder, rows, monkeypatch):
    """The titles of the panels that are drawn of these rows."""
    from matplotlib.axes import Axes

    titles = []
    monkeypatch.setattr(Axes, "set", lambda self, *, title, xlabel: titles.append(title))
    write_rows(folder, rows)
    report.save_curves(folder)
    return titles


def test_curves_leave_out_what_never_moves(tmp_path, monkeypatch):
    """approx_kl is 0 all along; one evaluation is no line yet, and is shown."""
    rows = [*ROWS, {"iteration": 3, "reward/mean": 0.7, "grad_norm": 2.5, "approx_kl": 0.0}]
    rows[-1]["ratio/clip_fraction"] = 0.2
    titles = panels(tmp_path, rows, monkeypatch)
    assert "ratio/clip_fraction" in titles and "grad_norm" in titles and "approx_kl" not in titles
    assert "evaluation: pickscore" in titles


def test_before_and_after():
    judge, score = report.before_and_after(ROWS)
    assert judge == ("animals", "all there that the prompt names", "25 %", "50 %", "2")
    assert score == ("animals", "pickscore", "20.000", "20.500", "2")
    assert report.before_and_after(ROWS[:2]) == [] and report.before_and_after([]) == []
    lines = report.as_text([judge, score]).splitlines()
    assert lines[0].split() == ["prompts", "what", "before", "after", "iterations"] and report.as_text([]) == ""
    assert {line.index(word) for line, word in zip(lines, ("before", "25 %", "20.000"), strict=True)} == {
        lines[0].index("before")
    }


# -------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_are_written_as_they_come(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(0, {})
    writer.write(1, {"reward/mean": np.float32(0.5), "reward_queries": 64})
    assert read_metrics(tmp_path) == [{"iteration": 0}, {"iteration": 1, "reward/mean": 0.5, "reward_queries": 64}]
    assert '"reward_queries": 64}' in (tmp_path / "metrics.jsonl").read_text()  # counts stay integers


def test_a_continued_run_drops_what_came_after(tmp_path):
    write_rows(tmp_path, ROWS)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 3, "rew')  # a kill cut it short
    assert read_metrics(tmp_path) == ROWS
    writer = MetricsWriter(tmp_path)
    writer.continue_from(1)
    writer.write(2, {"loss": 1.0})
    assert read_metrics(tmp_path) == [*ROWS[:2], {"iteration": 2, "loss": 1.0}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rows_that_are_missing_are_said(tmp_path, caplog):
    """What a cut took, or somebody's editing; what can be read is kept, and lines after a bad one too."""
    write_rows(tmp_path, [{"iteration": i} for i in (0, 1, 5, 7)])
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text.replace('{"iteration": 5}', '{"iteration": 5, "lo') + "[1]\n")
    MetricsWriter(tmp_path).continue_from(8)
    assert "has no rows of the iterations 2-6, 8" in caplog.text
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1, 7]
    caplog.clear()
    MetricsWriter(tmp_path).continue_from(1)
    assert not caplog.text


def test_rows_that_the_checkpoint_has_come_back(tmp_path, caplog):
    """The file was torn, or is gone; a row that is there twice is there once."""
    torn = "".join(json.dumps(row) + "\n" for row in (ROWS[0], ROWS[1], ROWS[1])) + '{"iteration": 2, "rew'
    for text in (torn, ""):
        (tmp_path / "metrics.jsonl").write_text(text)
        writer = MetricsWriter(tmp_path)
        writer.continue_from(2, [*ROWS, {"iteration": 3}])
        assert read_metrics(tmp_path) == ROWS == list(writer.recent) and not caplog.text


def test_the_checkpoint_s_rows_win(tmp_path):
    """The file's may be damaged, and still be json; a row of it that is older than the checkpoint's is kept."""
    damaged = [{"iteration": 0, "loss": 5.0}, {"iteration": 1, "loss": 7.0}, {"iteration": 1, "lass": 0.25}]
    write_rows(tmp_path, [*damaged, {"iteration": 2, "loss": 9.0}])
    known = [{"iteration": 1, "loss": 0.25}, {"iteration": 2, "loss": 0.5}, {"iteration": True}, {"iteration": -1}]
    MetricsWriter(tmp_path).continue_from(2, known)
    assert read_metrics(tmp_path) == [damaged[0], *known[:2]]


@pytest.mark.parametrize(
    "line",
    [
        *(
            '{"iteration": true}',
            '{"iteration": -7}',
            '{"iteration": 1.0}',
            '{"iteration": 1e999}',
            '{"iteration": "1"}',
        ),
        *('{"loss": 1.0}', '{"iteration": 1, "loss": "1.0"}', '{"iteration": 1, "loss": null}', "1", '["iteration"]'),
        *('{"iteration": 1, "loss": [1.0]}', '{"iteration": 1, "loss": true}', '{"iteration": 1, "loss": {}}'),
        *('{"iteration": 1, "loss": 1, "loss": 2}', '{"iteration": 1}}', '{"iteration": 1} ' + " " * 2**20 + "{}"),
    ],
)
def test_what_is_no_row(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"iteration": 1, "a": 0.5}}\n{line}\n{{"iteration": 0, "a": NaN}}\n')
    first, second = read_metrics(tmp_path)
    assert second == {"iteration": 1, "a": 0.5} and first["iteration"] == 0 and math.isnan(first["a"])


def test_a_row_that_does_not_fit_on_the_disk(tmp_path):
    """Nothing of it is left, and the file is as it was."""
    writer = MetricsWriter(tmp_path)
    writer.write(0, {"loss": 0.5})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from diffexp_jax import command; from diffexp_jax.run import metrics\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 5}, -1))\n"
        "command.guarded(metrics.MetricsWriter(Path(sys.argv[1])).write, 1, {'loss': 0.25})"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    path, reason = tmp_path / "metrics.jsonl", "No space left on device"  # a part of it was written, and taken back
    goes_on = "and the same command continues from it"
    assert done.stderr == f"error: {path}: cannot be written ({reason}); the last checkpoint is untouched, {goes_on}\n"
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(tmp_path)
    with pytest.raises(OSError, match="metrics.jsonl: cannot be written .No such file"):
        writer.write(1, {})


def test_a_new_run_starts_an_empty_file(tmp_path):
    write_rows(tmp_path, ROWS)
    MetricsWriter(tmp_path).continue_from(None)
    assert read_metrics(tmp_path) == []
    assert read_metrics(tmp_path / "elsewhere") == []


def test_tensorboard_is_written_on_top(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.continue_from(None)
        writer.write(1, {"loss": 0.5, "grad_norm": math.inf})  # what is not finite has no place in a curve
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"loss" in content and b"grad_norm" not in content
    assert read_metrics(tmp_path)[0]["loss"] == 0.5


def draw_grid(workdir, iteration, value=100):
    report.save_grid(grid_path(workdir, iteration), np.full((2, 8, 8, 3), value, np.uint8), ["a dog", "a cat"])


def events_of(path):
    """Those of an event file: length, checksum, message, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_grids_are_shown_by_tensorboard(tmp_path, caplog):
    """With the row of their iteration; those of an earlier start, or damaged ones, are not."""
    pytest.importorskip("tensorboardX")
    draw_grid(tmp_path, 2)
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.continue_from(None)
        for iteration in (1, 3):
            draw_grid(tmp_path, iteration)
        grid_path(tmp_path, 3).write_bytes(b"no picture")
        for iteration in (1, 2, 3, 4):
            writer.write(iteration, {"loss": 0.5})
    (path,) = (tmp_path / "tensorboard").iterdir()
    values = [(event.step, value) for event in events_of(path) for value in event.summary.value]
    assert [step for step, value in values if value.tag == "loss"] == [1, 2, 3, 4]
    ((step, shown),) = ((step, value.image) for step, value in values if value.tag == "images")
    with Image.open(io.BytesIO(shown.encoded_image_string)) as found, Image.open(grid_path(tmp_path, 1)) as drawn:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(drawn))
    assert step == 1 and "000003.png: goes to no logger" in caplog.text


def eventually(condition: Callable[[], bool], patience: float = 60.0) -> bool:
    """Whether it comes to hold within so many seconds."""
    end = time.monotonic() + patience
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return holds


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    """Without an account; the id is kept, so that a continued run is the same run there."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    names = []
    for start in (None, 1):
        with MetricsWriter(tmp_path, wandb={"seed": 3}) as writer:
            writer.continue_from(start)
            draw_grid(tmp_path, 1)
            writer.write(1 if start is None else 2, {"loss": 0.5, "grad_norm": math.inf})
        names.append((tmp_path / "wandb-id.txt").read_text())
    assert names[0] == names[1]
    logs = list(tmp_path.glob(f"wandb/offline-run-*/run-{names[0].strip()}.wandb"))
    # its service may still be writing after `finish`
    assert len(logs) == 2 and all(eventually(lambda log=log: b"loss" in log.read_bytes()) for log in logs)
    assert not any(b"grad_norm" in log.read_bytes() for log in logs)
    (shown,) = tmp_path.glob("wandb/offline-run-*/files/media/images/images_*.png")
    with Image.open(shown) as found, Image.open(grid_path(tmp_path, 1)) as drawn:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(drawn))
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [1, 2]


def test_weights_and_biases_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="log.wandb=true: wandb is not installed; pip install wandb"):
        MetricsWriter(tmp_path, wandb={})


@pytest.mark.parametrize("exploring, differs", [(3, []), (4, ["`exploration.iterations`"])])
def test_what_differs_from_the_defaults(exploring, differs):
    """Not the planned end of exploration, which a run writes down as it begins: three quarters, of four."""
    settings = changed(Settings(), {"iterations": 4, "exploration.iterations": exploring})
    assert [row[0] for row in setting_parts(flat(settings))[1].rows] == ["`iterations`", *differs]
