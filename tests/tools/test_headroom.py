"""tools/studies/headroom.py: what it says of the base model, on literal numbers and in a run of the tiny model."""

import itertools
import json
import sys

import numpy as np
import pytest

from diffexp_jax.errors import InputError
from tests.support import ROOT


@pytest.fixture
def headroom(monkeypatch):
    import headroom

    return headroom


def test_best_of_is_the_mean_over_all_choices(headroom):
    rewards = np.random.default_rng(0).normal(size=(3, 7))
    for k in (1, 3, 7):
        expected = [np.mean([max(chosen) for chosen in itertools.combinations(row, k)]) for row in rewards]
        np.testing.assert_allclose(headroom.best_of(rewards, k), expected)


@pytest.mark.parametrize("text", ["emoji_judge", "emoji_judge:much", ":1", "imagereward:0.5"])
def test_success_that_is_not_a_reward_and_a_number(headroom, text):
    with pytest.raises(InputError, match="--success"):
        headroom.parse_success(text, {"emoji_judge": None})
    assert headroom.parse_success("emoji_judge:0.5", {"emoji_judge": None}) == ("emoji_judge", 0.5)


def way(success, mean):
    return {"success": success, "mean": mean, "std": [1.0] * 4, "best": [20.0] * 4, "distance": [0.25] * 4}


FOUND = {
    "argument": "paper.py:fig4_ddpo_pickscore,model=emoji",
    "settings": {"steps": 20, "guidance": 5.0, "w_low": 1.0, "weight_range": [1.0, 1.5], "unit": "word"}
    | {"t_thresh": 900.0},
    "machine": {"devices": "2 x a CPU", "jax": "0.10.2"},
    "reward": "emoji_pickscore",
    "success": ["emoji_judge", 0.5],
    "many": 10,
    "samples_per_prompt": 8,
    "prompts": ["a", "b", "c", "d"],
    "base": [0.0, 0.0, 0.2, 0.5],
    "ways": {
        "plain": way([0.0, 0.125, 0.25, 0.5], [10.0, 12.0, 14.0, 16.0]),
        "both": way([0.125, 0.125, 0.25, 0.75], [10.0, 10.0, 10.0, 10.0]),
    },
}


def test_section_literal(headroom, tmp_path):
    lines = headroom.section(FOUND)
    assert "| plain | 21.9 % | 25 % | 13.00 | 1.00 | 20.00 | 0.250 |" in lines
    assert "| both | 31.2 % | 0 % | 10.00 | 1.00 | 20.00 | 0.250 |" in lines
    assert "| no image | 2 | 6.2 % | 12.5 % |" in lines
    assert "| 10 to 30 % | 1 | 25.0 % | 25.0 % |" in lines and "| 30 to 60 % | 1 | 50.0 % | 75.0 % |" in lines
    document = tmp_path / "results.md"
    document.write_text("above\n<!-- headroom: mine -->\nold\n<!-- /headroom: mine -->\nbelow\n")
    headroom.write_section(document, "mine", FOUND)
    text = document.read_text()
    assert "\n".join(lines) in text and "old" not in text and text.startswith("above") and text.endswith("below\n")


def test_the_documents_numbers_are_those_of_the_files(headroom):
    text = (ROOT / "docs" / "evidence" / "results" / "headroom.md").read_text()
    files = sorted((ROOT / "docs" / "evidence" / "results" / "headroom").glob("*.json"))
    assert files
    for path in files:
        begin, end = headroom.markers(path.stem)
        inside = text.partition(begin + "\n")[2].partition("\n" + end)[0]
        assert inside == "\n".join(headroom.section(json.loads(path.read_text()))), path


@pytest.mark.slow
def test_on_the_emoji_model(headroom, tmp_path, monkeypatch):
    """One prompt; the ways are of the same noise, and differ."""
    monkeypatch.setattr(sys, "argv", ["headroom.py"])
    args, rest = headroom.parse(
        f"--model=emoji --samples_per_prompt=8 --many=8 --out={tmp_path / 'h.json'}".split()
        + ["--config.prompts=a dog riding a bike", "--config.batch.samples=8", "--config.batch.samples_per_forward=8"]
    )
    headroom.main(args, rest)
    found = json.loads((tmp_path / "h.json").read_text())
    assert list(found["ways"]) == list(headroom.WAYS) and found["prompts"] == ["a dog riding a bike"]
    means = [x["mean"][0] for x in found["ways"].values()]
    assert len(set(means)) == len(means) and all(np.isfinite(means))
    assert found["ways"]["plain"]["best"][0] >= found["ways"]["plain"]["mean"][0]
