"""docs/understand/methods/: each method's page is there, names functions that exist, and shows what its runs found."""

import json
import re

import pytest

from diffexp_jax.algorithms import METHODS
from diffexp_jax.sweeps import paired
from diffexp_jax.sweeps.cells import cell
from tests.support import ROOT

PAGES = ROOT / "docs" / "understand" / "methods"
DATA = ROOT / "docs" / "evidence" / "data"


@pytest.mark.parametrize("name", [*METHODS, "grpo"])
def test_a_method_has_a_page(name):
    """It begins with what the method does and how it is run; then come equation, settings, cost, limits."""
    text = (PAGES / f"{name}.md").read_text()
    begin = text.partition("## ")[0]
    assert "Choose it" in " ".join(begin.split()) and f"--config configs/{name}.py:model=" in begin
    sections = ("Equation", "Settings", "Cost", "Limits")
    assert [found for found in re.findall(r"^## (.+)$", text, re.M) if found in sections] == list(sections)
    assert f"settings.md#{'ddpo' if name == 'grpo' else name})" in text and f"configs.md#{name})" in text
    assert f"]({name}.md)" in (PAGES / "index.md").read_text()


@pytest.mark.parametrize("name", [*METHODS, "grpo"])
def test_functions_of_equations_exist(name):
    section = (PAGES / f"{name}.md").read_text().partition("## Equation")[2].partition("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("| ")][1:]
    named = [name for row in rows for name in re.findall(r"`(\w+)\.(\w+)`", row.rpartition(" | ")[2])]
    assert len(named) >= len(rows) >= 3
    for module, function in named:
        (path,) = (path for room in ("algorithms", "sampling") for path in ROOT.glob(f"diffexp_jax/{room}/{module}.py"))
        assert re.search(rf"^(def|class) {function}\b", path.read_text(), re.M), f"{module}.{function}"


def rows_of_runs(page: str) -> list[str]:
    """The table that a page shows between its marks, without its head."""
    text = (PAGES / f"{page}.md").read_text()
    return text.partition("<!-- runs -->\n")[2].partition("\n<!-- /runs -->")[0].splitlines()[2:]


def test_the_page_of_grpo_shows_its_runs():
    """That is docs/evidence/data/grpo_emoji_flow.json."""
    runs = json.loads((DATA / "grpo_emoji_flow.json").read_text())["runs"]
    rows = rows_of_runs("grpo")
    assert len(rows) == len(runs) == 3
    for row, run in zip(rows, runs, strict=True):
        first, last = (run["emoji_judge"][str(it)] for it in (0, run["iterations"]))
        shares = [f"{100 * first[name]:.1f} to {100 * last[name]:.1f} %" for name in first]
        name = "DiffExp" if run["explore"] else "none"
        if "ddpo.kl_weight" in run:
            assert run["ddpo.kl_weight"] == 0.04 and run["ddpo.kl_by_length"]  # the first recipe's
            name += ", with the first recipe's KL"
        assert row == f"| {name} | {' | '.join(shares)} |"


def test_the_index_shows_the_runs_of_methods():
    """Of docs/evidence/results/methods-emoji_hard.json: what there are runs of, without exploration."""
    results = json.loads((ROOT / "docs" / "evidence" / "results" / "methods-emoji_hard.json").read_text())
    expected = []
    for method in paired.methods_of(results):
        finals = [paired.final(results, method, prompts, "emoji_judge") for prompts in paired.prompt_sets(results)]
        n = len(results["arms"][method]["seeds"])
        expected.append(f"| `{method}` | {n} | {' | '.join(cell(final, 'emoji_judge') for final in finals)} |")
    before = [results["base"][prompts]["emoji_judge"] for prompts in paired.prompt_sets(results)]
    first = [cell([share, None, None], "emoji_judge") for share in before]
    assert rows_of_runs("index") == [f"| before | - | {' | '.join(first)} |", *expected]
