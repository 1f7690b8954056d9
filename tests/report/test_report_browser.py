"""Pages in a real browser, from a file and with the network off: the slider, the console, a phone's width."""

import io

import numpy as np
import pytest
from PIL import Image

from diffexp_jax import report
from tests.support.browser import Browser, find
from tests.support.sample_runs import CAPTIONS, pictures, write_run

pytestmark = pytest.mark.skipif(find() is None, reason="no Chromium here: one of browser.NAMES on the PATH is wanted")
ARROW_LEFT, HOME = ("ArrowLeft", 37), ("Home", 36)


@pytest.fixture(scope="module")
def chromium():
    with Browser(find()) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A run's report, and the page of two runs with long names of prompts, folders and settings."""
    folder = tmp_path_factory.mktemp("pages")
    long = {"prompts": "prompt:" + "unbreakable" * 20, "eval.prompts": tuple("x" * 40 + str(n) for n in range(5))}
    a, b = write_run(folder / "a", long), write_run(folder / ("b" * 60), {"seed": 1}, iterations=(0, 7))
    report.save(a)
    report.save_beside((a, b), folder / "two.html")
    return {"one": a / "report.html", "two": folder / "two.html"}


def shown(browser, column):
    """The colour in the middle of a column's first picture, as the browser draws it."""
    browser.run(f"document.querySelector('img[data-column=\"{column}\"]').decode()")
    browser.run(f"document.querySelector('img[data-column=\"{column}\"]').scrollIntoView({{block: 'center'}})")
    script = f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector('img[data-column=\"{column}\"]')"
    x, y = browser.run(script + ".getBoundingClientRect())")
    with Image.open(io.BytesIO(browser.screenshot())) as image:
        return np.asarray(image.convert("RGB"), int)[round(y), round(x)]


def assert_quiet(browser, path):
    """Nothing went wrong, and nothing was asked for besides the file and what is in it."""
    assert browser.problems == []
    assert {url for url in browser.requests if not url.startswith("data:")} == {path.resolve().as_uri()}
    browser.requests.clear()


def test_the_slider_changes_the_picture(chromium, pages):
    chromium.open(pages["one"], width=1280)
    assert chromium.run("document.querySelector('.slider label').textContent") == "Pictures"
    assert chromium.run("document.querySelector('output').textContent") == "after 10 iterations"
    chromium.run("document.querySelector('input[type=range]').focus()")
    seen = {}
    for key, iteration, label in (
        (None, 10, "after 10 iterations"),
        (ARROW_LEFT, 5, "after 5 iterations"),
        (HOME, 0, "before"),
    ):
        if key:
            chromium.press(*key)
        seen[iteration] = shown(chromium, 1)
        assert np.abs(seen[iteration] - pictures(iteration)[0, 0, 0]).max() <= 8
        for words in ("document.querySelector('output').textContent", "document.activeElement.ariaValueText"):
            assert chromium.run(words) == label
        alt = chromium.run("document.querySelector('img[data-column]').alt")
        assert alt == f"{CAPTIONS[0]}: fine-tuned, {label}"
    assert np.abs(seen[10] - seen[0]).max() > 100
    assert_quiet(chromium, pages["one"])


def test_one_slider_moves_both_runs(chromium, pages):
    chromium.open(pages["two"], width=1280)
    assert [int(shown(chromium, n)[0]) // 20 - 1 for n in (1, 2)] == [10, 7]
    chromium.run("document.querySelector('input[type=range]').focus()")
    for expected in ([5, 7], [5, 0], [0, 0]):
        chromium.press(*ARROW_LEFT)
        assert [round((int(shown(chromium, n)[0]) - 20) / 20) for n in (1, 2)] == expected
    assert_quiet(chromium, pages["two"])


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["one", "two"])
def test_a_phones_width(chromium, pages, name, dark):
    """Nothing has to be scrolled sideways, also with all settings unfolded, and text can be told from the ground."""
    chromium.open(pages[name], width=390, height=844, dark=dark)
    chromium.run("document.querySelectorAll('details').forEach(x => x.open = true)")
    assert chromium.run("document.documentElement.scrollWidth") == chromium.run("innerWidth") == 390
    colours = (chromium.run(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    ink, paper = (sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) for colour in colours)
    assert (ink - paper > 500) if dark else (paper - ink > 500)
    assert chromium.run("[...document.images].every(x => x.complete && x.naturalWidth == 16)")
    assert_quiet(chromium, pages[name])
