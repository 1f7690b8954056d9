"""The pages of docs/evidence/results/: what their sentences say of shares is what the results' files say."""

import json
import re

import pytest

from tests.support import ROOT

FOLDER = ROOT / "docs" / "evidence" / "results"
PAGES = [path.stem for path in sorted(FOLDER.glob("*.json"))]
# Where sentences, and tables that are written by hand, are of single runs
OF_RUNS = ("fig4_alignprop_pickscore-emoji_hard-0488ac", "fig4_alignprop_pickscore-emoji_hard", "fig8-emoji_hard")
OF_RUNS += ("fig4_ddpo_pickscore-emoji_hard-56b789", "fig9a_pickscore-emoji_hard-0488ac")
OF_RUNS += ("tune_alignprop_aesthetic-emoji_hard-8a5398", "methods-emoji_hard", "rates-emoji_hard")
OF_RUNS += ("methods-emoji_flow", "rates-emoji_flow")
GENERATED = re.compile(r"<!-- results: .+? -->(.*?)<!-- /results: .+? -->", re.DOTALL)
NUMBER = r"\d+(?:\.\d+)?"
SHARES = re.compile(rf"((?:{NUMBER}(?:, | and | to ))*{NUMBER})\s(?:%|points)")  # "18, 39 and 38 %"


def shares_said(text: str) -> list[str]:
    """The numbers of percent, and of points, that a page gives outside of what is generated."""
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", GENERATED.sub("", text), flags=re.DOTALL)
    return [number for words in SHARES.findall(text) for number in re.findall(NUMBER, words)]


def stands_in(said: str, numbers: set[float]) -> bool:
    """Whether it is one of these, rounded; in percent, also of a ratio, or what a ratio is short of 1."""
    half = 0.5 * 10.0 ** -len(said.partition(".")[2]) + 1e-9
    forms = (lambda x: x, lambda x: 100 * x, lambda x: abs(100 - 100 * x))
    return any(abs(form(x) - float(said)) <= half for x in numbers for form in forms[: 3 if x < 2 else 1])


def runs_of(stem: str) -> set[float]:
    """Of each run: its final shares of success, and those of its evaluations; and the mean evaluations of an arm."""
    found: set[float] = set()
    for arm in json.loads((FOLDER / f"{stem}.json").read_text())["arms"].values():
        seeds = arm["seeds"].values()
        finals = [means for seed in seeds for means in seed["final"].get("plain", {}).values()]
        found |= {means["emoji_judge"] for means in finals if "emoji_judge" in means}
        curves = [seed["curves"]["evaluation"] for seed in seeds]
        for name in curves[0]:
            if name.endswith("emoji_judge"):
                found |= {x for curve in curves for x in curve[name]}
                found |= {sum(x) / len(curves) for x in zip(*(curve[name] for curve in curves), strict=False)}
    return found


@pytest.mark.parametrize("stem", PAGES)
def test_shares_in_prose_stand_in_the_results(stem):
    text = (FOLDER / f"{stem}.md").read_text()
    numbers = {float(x) for x in re.findall(NUMBER, "".join(GENERATED.findall(text)))}
    if stem in OF_RUNS:
        linked = set(re.findall(r"\]\(([\w-]+)\.md\)", text)) & set(PAGES)
        numbers |= set().union(*map(runs_of, {stem, *linked}))
    assert [said for said in shares_said(text) if not stands_in(said, numbers)] == []


def test_a_wrong_share_is_found():
    text = "18, 39 and 38 % here<!-- results: x -->| 18.4 | 0.39 |<!-- /results: x --> and 7 points"
    assert shares_said(text) == ["18", "39", "38", "7"]
    assert [stands_in(said, {18.4, 0.39}) for said in shares_said(text)] == [True, True, False, False]
    assert stands_in("31", {0.69}) and not stands_in("31.5", {0.69})
