"""Pages of one file: what is in them, that they need nothing else, and the parts that they are made of."""

import base64
import hashlib
import io
import json
import os
import re
import runpy
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from diffexp_jax import report
from diffexp_jax.errors import InputError
from diffexp_jax.report import beside, exploring, grids, page, run
from diffexp_jax.report import pictures as report_pictures
from diffexp_jax.report.page import Facts, Folded, Legend, Picture, Row, Section, Stack, Table, drawing
from tests.support import ROOT
from tests.support.sample_runs import ABOUT, CAPTIONS, ITERATIONS, pictures, rows, write_run

NASTY = "<script>alert('1')</script> & \"quoted\""
ESCAPED = "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt; &amp; &quot;quoted&quot;"


def png(width=6, height=4):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (10, 200, 30)).save(buffer, "png")
    return buffer.getvalue()


class Outside(HTMLParser):
    """The addresses that a page would load or lead to, its images, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.images, self.scripts, self._tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.addresses += [found[name] for name in ("src", "href", "xlink:href", "srcset", "action") if name in found]
        if tag == "img":
            self.images.append(found)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data


def assert_alone(text):
    """The page needs nothing else; its images, each with an alt, can be read and are of the size that it says."""
    outside = Outside(text)
    assert all(address.startswith(("data:", "#")) for address in outside.addresses)
    assert not re.search(r"http://|@import|url\((?!#)", text)
    for found in outside.images:
        assert found["alt"].strip()
        with Image.open(io.BytesIO(base64.b64decode(found["src"].partition(";base64,")[2]))) as image:
            image.load()
            assert (str(image.width), str(image.height)) == (found["width"], found["height"])
    return outside


# ---------------------------------------------------------------------------------------------------------------- parts


def test_text_is_escaped_everywhere():
    parts = [NASTY, Table((NASTY, "b"), [(NASTY, "1")], NASTY), Picture(png(), NASTY, NASTY), Facts([(NASTY, NASTY)])]
    parts += [Folded(NASTY, [Row([Stack([NASTY])])]), Legend([(NASTY, "black", "--")])]
    parts += [exploring.Prompt([(NASTY, 1)]), exploring.Prompt([(NASTY, 1)], 1, 1.5)]
    text = page.page(NASTY, [Section(NASTY, parts)], lead=[NASTY])
    assert text.count(ESCAPED) == 18 and "alert('1')" not in text
    assert_alone(text)


def test_code_and_emphasis():
    assert page.html_of("a `b < c` and **d & e**, 2 * 3 * 4") == (
        "<p>a <code>b &lt; c</code> and <strong>d &amp; e</strong>, 2 * 3 * 4</p>"
    )


def test_columns_of_numbers_are_set_to_the_right():
    text = Table(("arm", "reward", "share"), [("a", "1.5", "3 %"), ("b", "-2", "none")]).html()
    assert re.findall(r"<t[hd] class=\"number\">(.*?)</t[hd]>", text) == ["reward", "1.5", "-2"]
    with pytest.raises(ValueError):
        Table(("one",), [("a", "b")]).html()
    assert "<tbody>\n</tbody>" in Table(("arm", "reward"), []).html()


def test_pictures_are_embedded_as_they_are():
    outside = assert_alone(Picture(png(6, 4), "six by four").html())
    assert outside.images[0]["src"] == "data:image/png;base64," + base64.b64encode(png(6, 4)).decode()
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
    assert f'src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"' in Picture(svg, "x").html()
    with pytest.raises(ValueError, match="wants PNG, JPEG, WebP or SVG, found bytes that begin with b'GIF89a'"):
        Picture(b"GIF89a", "x").html()


def test_a_drawing_has_the_colours_of_the_page():
    from matplotlib.figure import Figure

    figure = Figure()
    axis = figure.subplots()
    for n in range(3):
        axis.plot([1, 2], [n, 1], marker=".", label=f"<{n}>")
    axis.legend()
    svg = drawing(figure, 'three "lines"', "lines").svg
    assert svg.startswith("<svg ") and 'aria-label="three &quot;lines&quot;"' in svg
    assert {"var(--ink)", "var(--paper)", "var(--series-1)", "var(--series-3)"} <= set(re.findall(r"var\([^)]*\)", svg))
    assert not re.search("#000000|#ffffff|#1f77b4|http|<metadata|font-family|<style", svg)
    tree = ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    used = {element.get("{x}href")[1:] for element in tree.iter() if element.get("{x}href")}
    assert len(ids) == len(set(ids)) and used <= set(ids) and used
    assert [element.text for element in tree.iter("text")][-3:] == ["<0>", "<1>", "<2>"]
    assert drawing(figure, 'three "lines"', "lines").svg == svg  # the same each time


def test_only_the_pages_own_script_may_run():
    text = page.page("x", [])
    (script,) = Outside(text).scripts
    assert script == (ROOT / "diffexp_jax" / "report" / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.html"
    report.save_page(path, "first", [])
    before = path.read_text()

    def full(self, *args, original=Path.write_text, **kwargs):
        original(self, "half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        report.save_page(path, "second", [])
    assert path.read_text() == before and os.listdir(tmp_path) == ["a.html"]


def test_an_installed_package_has_the_template():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["diffexp_jax"]
    packaged = {path.name for pattern in patterns for path in (ROOT / "diffexp_jax").glob(pattern)}
    assert {"page.html", "page.css", "page.js"} <= packaged


# ---------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("size", [16, 160])
def test_a_grid_gives_its_pictures_back(tmp_path, size):
    images = np.random.default_rng(0).integers(256, size=(5, size, size - 4, 3)).astype(np.uint8)
    captions = ["a <dog>", "ein Bär", '"x"', "", "a dog"]
    report.save_grid(tmp_path / "g.png", images, captions, columns=2)
    grid = grids.read_grid(tmp_path / "g.png")
    assert grid.captions == tuple(captions)
    np.testing.assert_array_equal(np.stack(grid.images), images)


def test_a_grid_of_another_program_is_one_picture(tmp_path):
    (tmp_path / "g.png").write_bytes(png(6, 4))
    grid = grids.read_grid(tmp_path / "g.png")
    assert grid.captions == ("all pictures",) and grid.images[0].shape == (4, 6, 3)


@pytest.mark.parametrize("content", [b"", b"no picture", png(60, 40)[:-60]])
def test_a_damaged_grid_is_an_error(tmp_path, content):
    (tmp_path / "g.png").write_bytes(content)
    with pytest.raises(OSError):
        grids.read_grid(tmp_path / "g.png")


@pytest.mark.parametrize(
    "n, most, kept",
    [
        (4, 4, [0, 1, 2, 3]),
        (5, 4, [0, 2, 4]),
        (6, 4, [0, 2, 4, 5]),
        (7, 4, [0, 4, 6]),
        (13, 4, [0, 8, 12]),
        (1, 4, [0]),
        (0, 4, []),
    ],
)
def test_which_grids_are_kept(n, most, kept):
    paths = [Path(str(i)) for i in range(n)]
    assert [int(path.name) for path in report_pictures._thinned(paths, most)] == kept


def test_many_and_large_pictures_are_fewer_and_smaller(tmp_path):
    for i in range(45):
        report.save_grid(tmp_path / f"{i:06d}.png", pictures(i % 5, size=8, n=1), ["x"])
    found = report_pictures.read_frames(tmp_path)
    assert [frame.iteration for frame in found.frames] == [*range(0, 45, 4)]
    assert found.notes == ["12 of 45 grids are here, evenly spaced."]
    large = tmp_path / "large"
    report.save_grid(large / "000000.png", pictures(1, size=300, n=30), [str(n) for n in range(30)])
    (frame,), notes = report_pictures.read_frames(large)
    assert notes == [
        "Of each grid's 30 pictures 24 are here, evenly spaced.",
        "Pictures are made smaller, from 300 to 256 pixels.",
    ]
    assert len(frame.images) == 24 and frame.captions[:2] == ("0", "1") and frame.captions[-1] == "29"
    assert Image.open(io.BytesIO(frame.images[0])).size == (256, 256)


def test_only_new_grids_are_encoded(tmp_path, monkeypatch):
    read = []

    def read_grid(path, original=report_pictures.read_grid):
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(report_pictures, "read_grid", read_grid)
    for i in range(3):
        report.save_grid(tmp_path / f"{i:06d}.png", pictures(i), CAPTIONS)
        report_pictures.read_frames(tmp_path)
    assert read == ["000000.png", "000001.png", "000002.png"]


def test_grids_that_do_not_fit_are_left_out_and_it_says_so(tmp_path):
    for i in range(3):
        report.save_grid(tmp_path / f"{i:06d}.png", pictures(i), CAPTIONS)
    report.save_grid(tmp_path / "000000.png", pictures(0, n=1), ["another"])
    (tmp_path / "000001.png").write_bytes(b"damaged")
    (tmp_path / "notes.png").write_bytes(b"of somebody")
    found = report_pictures.read_frames(tmp_path)
    assert [frame.iteration for frame in found.frames] == [2]
    assert found.notes == [
        "Left out, as they cannot be read: 000001.png.",
        "Left out, as they are of other prompts than the last grid: 1.",
    ]


# ------------------------------------------------------------------------------------------------------- a run's report


def gallery_of(text):
    (data,) = [json.loads(script) for script in Outside(text).scripts if script.startswith('{"labels"')]
    return data


def test_report_of_a_run(tmp_path):
    folder = write_run(tmp_path / "a", {"prompts": f"prompt:{NASTY}", "optim.lr": 0.25})
    report.save(folder)
    assert {path.name for path in folder.iterdir()} == {
        *("about.json", "config.json", "curves.png", "images", "metrics.jsonl", "report.html"),
    }
    text = (folder / "report.html").read_text(encoding="utf-8")
    outside = assert_alone(text)
    assert f"prompt:{ESCAPED}" in text and "alert('1')" not in text
    assert (
        "<h1>ddpo on emoji_pickscore</h1>" in text and "<dd>10 of 10</dd>" in text and "<dd>1.50 (median)</dd>" in text
    )
    assert '<td>all there that the prompt names</td><td class="number">25 %</td><td class="number">50 %</td>' in text
    assert "<td><code>optim.lr</code></td><td>0.25</td><td>0.0003</td>" in text
    assert "<td><code>optim.b1</code></td><td>0.9</td></tr>" in text  # among all settings alone
    assert "The first 8 of 10 iterations explore." in text and "2 of the 4 steps are above the threshold." in text
    assert "<mark>a</mark> <mark>cat</mark>" in text and '<mark class="drawn">cat × 1.25</mark>' in text
    assert "<dt>jax</dt><dd>0.10.2</dd>" in text and "<dt>device</dt><dd>cpu</dd>" in text
    assert text.count('<figure class="drawing">') == 5  # reward, two of evaluations, gradient; the schedule
    alts = [image["alt"] for image in outside.images]
    assert alts[:3] == ["a dog: before", "a dog: fine-tuned, after 10 iterations", 'a cat & a <b>"bat"</b>: before']


def test_the_slider_has_every_picture(tmp_path):
    folder = write_run(tmp_path / "a")
    report.save(folder, tmp_path / "b.html")
    assert not (folder / "report.html").exists()
    data = gallery_of((tmp_path / "b.html").read_text())
    assert data["labels"] == ["before", "after 5 iterations", "after 10 iterations"]
    assert data["columns"].keys() == {"1"} and data["columns"]["1"]["at"] == [0, 1, 2]
    for iteration, frame in zip(ITERATIONS, data["columns"]["1"]["frames"], strict=True):
        assert len(frame) == len(CAPTIONS)
        for content, expected in zip(frame, pictures(iteration), strict=True):
            with Image.open(io.BytesIO(base64.b64decode(content))) as image:
                assert image.size == (16, 16) and image.format == "WEBP"
                assert np.abs(np.asarray(image.convert("RGB"), int) - expected).max() <= 6


def test_report_of_a_run_that_has_just_begun(tmp_path):
    """No images, no evaluations, no about.json; then a single grid and a single evaluation."""
    folder = write_run(tmp_path / "a", metrics=[], iterations=(), about=None)
    report.save(folder)
    text = (folder / "report.html").read_text()
    assert Outside(text).images == [] and not (folder / "curves.png").exists()
    said = ["Nothing to compare yet", "No pictures yet", "No curves yet", "the folder has no about.json", "0 of 10"]
    assert all(words in text for words in said)
    folder = write_run(tmp_path / "b", metrics=rows()[:1], iterations=(0,))
    report.save(folder)
    text = (folder / "report.html").read_text()
    assert len(assert_alone(text).images) == len(CAPTIONS) and "<input" not in text and "Nothing to compare yet" in text


@pytest.mark.parametrize(
    "changes, said, drawings",
    [
        ({"exploration.enabled": False}, "guidance is 5 at every step", 0),
        ({"exploration.weight_range": (1.0, 1.0)}, "None: the range of the weights is 1 to 1.", 1),
        ({"exploration.iterations": 10}, "All 10 iterations explore.", 1),
        ({"exploration.iterations": None}, "The first 8 of 10 iterations explore.", 1),
        ({"exploration.t_thresh": 1000}, "None: no timestep is above 1000, guidance is 5 throughout.", 0),
        ({"exploration.w_low": 0.0, "exploration.unit": "token"}, "its 2 tokens:", 1),
        ({"exploration.share": 0.5}, "That is so in 50% of the images; the others have their prompt as it is.", 1),
    ],
)
def test_what_is_said_of_exploration(changes, said, drawings):
    settings = {"sampling.guidance": 5.0, "exploration.enabled": True, "exploration.w_low": 1.0, "iterations": 10}
    settings |= {"exploration.t_thresh": 900, "exploration.weight_range": (1.0, 1.5), "exploration.unit": "word"}
    settings |= {"exploration.iterations": 8, "exploration.fraction": 0.75, "exploration.share": 1.0} | changes
    text = "".join(map(page.html_of, exploring.exploration_parts(settings, ABOUT)))
    assert said in text and text.count('<figure class="drawing">') == drawings
    assert "".join(map(page.html_of, exploring.exploration_parts(settings, {}))).count("<mark") == 0


def test_as_the_run_goes_the_page_is_seconds_old_at_most(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "a", metrics=rows(4))
    report.refresh(folder)
    path = folder / "report.html"
    assert "4 of 10" in path.read_text()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(rows(5)[-1]) + "\n")
    report.refresh(folder)
    assert "4 of 10" in path.read_text()
    os.utime(path, (0, path.stat().st_mtime - 11))
    report.refresh(folder)
    assert "5 of 10" in path.read_text()


# ------------------------------------------------------------------------------------------------------------- two runs


def test_two_runs_side_by_side(tmp_path):
    a = write_run(tmp_path / "a", {"exploration.enabled": False})
    b = write_run(tmp_path / "b", {"optim.lr": 0.5}, iterations=(0, 7))
    report.save_beside((a, b), tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    outside = assert_alone(text)
    assert [image["alt"] for image in outside.images[:3]] == [
        "a dog: before",
        "a dog: a, after 10 iterations",
        "a dog: b, after 10 iterations",
    ]
    data = gallery_of(text)
    assert data["labels"] == ["before", "after 5 iterations", "after 7 iterations", "after 10 iterations"]
    assert data["columns"]["1"]["at"] == [0, 1, 1, 2] and data["columns"]["2"]["at"] == [0, 0, 1, 1]
    assert "The same prompts and noise" in text and "Not the same noise" not in text
    assert "<td><code>exploration.enabled</code></td><td>False</td><td>True</td>" in text
    assert "<td><code>optim.lr</code></td><td>0.0003</td><td>0.5</td>" in text and "optim.b1" not in text
    assert text.count('<figure class="drawing">') == 4 and "20.000" in text


def test_other_noise_is_said(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", {"seed": 3}, base=5)
    report.save_beside((a, b), tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    assert "Not the same noise, or not the same model" in text
    assert len(assert_alone(text).images) == 4 * len(CAPTIONS) and gallery_of(text)["columns"].keys() == {"1", "3"}


def test_a_flat_curve_is_drawn_beside_one_that_moves(tmp_path):
    flat = [row | {"eval/animals/pickscore": 20.0} if "eval/animals/pickscore" in row else row for row in rows()]
    a, b = write_run(tmp_path / "a", metrics=flat), write_run(tmp_path / "b", iterations=())
    report.save_beside((a, b), tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    assert (
        "evaluation: pickscore. a animals: 20 at iteration 0, 20 at iteration 10; b animals: 20 at iteration 0" in text
    )
    assert "b: no pictures" in text


@pytest.mark.parametrize(
    "paths, names",
    [
        (("runs/a", "runs/b"), ["a", "b"]),
        (("x/seed0", "y/seed0"), ["x/seed0", "y/seed0"]),
        (("/a", "/b/a"), ["//a", "b/a"]),
    ],
)
def test_names_of_two_runs(paths, names):
    assert beside.names_of([Path(path) for path in paths]) == names


# --------------------------------------------------------------------------------------------------- scripts/report.py


@pytest.fixture
def script(monkeypatch, capsys):
    """script(*arguments): what python scripts/report.py prints, and its exit code."""

    def run_script(*arguments):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / "scripts" / "report.py"), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return (said.out + said.err).strip(), code

    return run_script


def test_script(script, tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert script(f"--workdir={a}") == (f"written: {a / 'report.html'}", 0)
    assert script(f"--workdir={a}", f"--beside={b}") == (f"written: {a / 'beside-b.html'}", 0)
    out = tmp_path / "x.html"
    assert script(f"--workdir={a}", f"--beside={b}", f"--out={out}") == (f"written: {out}", 0)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "x.html"}


@pytest.mark.parametrize("ending", ["webp", "gif"])
def test_an_animation(script, tmp_path, ending):
    """A frame for each grid: its pictures as in the grid, below a bar that is as long as the run has come."""
    run, out = write_run(tmp_path / "a"), tmp_path / f"x.{ending}"
    assert script(f"--workdir={run}", f"--animation={out}") == (f"written: {out}", 0)
    assert not (run / "report.html").exists()
    with Image.open(out) as moving:
        assert moving.n_frames == 3 and moving.info["loop"] == 0
        frames = []
        for i in range(3):
            moving.seek(i)
            frames.append(np.asarray(moving.convert("RGB"), int))
    width = frames[0].shape[1]
    for frame, bar in zip(frames, (0, (width - 8) // 2, width - 8), strict=True):
        assert frame.shape == (30 + 4 + 128 + 44, 4 + 3 * 132, 3)
        blue = frame[24, :, 2] - frame[24, :, 0] > 100
        assert abs(int(blue.sum()) - bar) <= 8
    reds = [frame[30 + 4 + 64, 4 + 64, 0] for frame in frames]
    np.testing.assert_allclose(reds, [20, 120, 220], atol=8)


def test_an_animation_of_nothing(script, tmp_path):
    run = write_run(tmp_path / "a", iterations=(0,))
    said = f"error: {run / 'images'}: wants two image grids or more (log.images_every); has 1"
    assert script(f"--workdir={run}", f"--animation={tmp_path / 'x.webp'}") == (said, 2)
    out = tmp_path / "x.png"
    assert script(f"--workdir={run}", f"--animation={out}") == (
        f"error: --animation {out}: wants a name that ends with .webp or .gif",
        2,
    )


def test_script_refuses(script, tmp_path):
    a = write_run(tmp_path / "a")
    no = tmp_path / "no"
    assert script(f"--workdir={no}") == (f"error: {no / 'config.json'}: the file is missing", 2)
    assert script(f"--workdir={a}", f"--beside={no}") == (f"error: {no / 'config.json'}: the file is missing", 2)
    assert script(f"--workdir={a}", f"--beside={a}") == (f"error: {a}: wants another run than {a}", 2)
    said, code = script(f"--workdir={a}", f"--out={a}")
    assert code == 2 and said.startswith(f"error: {a}: cannot be written (")
    (a / "about.json").write_text("[1]")
    assert script(f"--workdir={a}") == (f"error: {a / 'about.json'}: wants a json object, found a list", 2)
    assert sorted(path.name for path in a.iterdir()) == ["about.json", "config.json", "images", "metrics.jsonl"]


def test_two_of_the_same_run_are_refused(tmp_path):
    with pytest.raises(InputError, match="wants another run than"):
        report.save_beside((tmp_path, tmp_path / "x" / ".."), tmp_path / "x.html")


def test_written_settings():
    assert [run.written(x) for x in (["a", 1.5], (), None, "x", 0.0003)] == [
        "('a', 1.5)",
        "()",
        "None",
        "'x'",
        "0.0003",
    ]
