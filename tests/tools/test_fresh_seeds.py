"""tools/studies/fresh_seeds.py: seeds that results have not seen, against the results; and the page that shows it."""

import json
import re

import pytest

from diffexp_jax.errors import InputError
from diffexp_jax.sweeps import runs
from tests.support import ROOT
from tests.support.sweeps import OTHER, SET, final, write_run

RESULTS = ROOT / "docs" / "evidence" / "results"


@pytest.fixture
def fresh_seeds():
    import fresh_seeds

    return fresh_seeds


def published(low, high):
    """Results of one arm with two seeds."""
    estimate = [0.5 * (low + high), low, high]
    of_sets = {prompts: {"emoji_judge": estimate, "pickscore": [1.0, 1.0, 1.0]} for prompts in (SET, OTHER)}
    return {
        "overrides": {},
        "prompts": SET,
        "unseen": [OTHER],
        "reward": "pickscore",
        "held_out": "emoji_judge",
        "base": {SET: {"emoji_judge": 0.1}},
        "arms": {"nft": {"seeds": {"0": {}, "1": {}}, "summary": {"final": of_sets}}},
    }


@pytest.fixture
def sweep(make_config, tmp_path):
    """Fresh seeds 100 and 101 of nft, which reach 0.4 and 0.6; of awm none has run."""
    for seed, share in ((100, 0.4), (101, 0.6)):
        config = make_config("nft", {"seed": seed, "batch.group": 2})
        write_run(tmp_path / "runs" / "nft" / f"seed{seed}", config, [1.0, 2.0, 3.0], final([1.0, 3.0], [share] * 2))
    arms = {arm: tmp_path / "runs" / arm for arm in ("nft", "awm")}
    return runs.Experiment("methods-emoji_hard", "methods", "", "emoji_hard", "nft", arms, None, {})


@pytest.mark.parametrize(("interval", "says"), [((0.5, 0.7), "inside"), ((0.45, 0.49), "outside")])
def test_a_fresh_mean_against_the_published_interval(fresh_seeds, sweep, interval, says):
    found = json.loads(json.dumps(fresh_seeds.compare(sweep, published(*interval))))
    assert found["arms"]["nft"][SET]["fresh"] == [0.5, 0.4, 0.6]
    assert list(found["arms"]) == ["nft"]
    _, _, row, other = fresh_seeds.section(found)
    assert row.endswith(f"| 50.0 [40.0, 60.0] % | 100: 40.0, 101: 60.0 | {says} |") and f"| nft | {SET} |" in row
    assert f"| nft | {OTHER} |" in other


def test_a_single_published_seed_has_no_interval(fresh_seeds, sweep):
    results = published(0.4, 0.6)
    for of_set in results["arms"]["nft"]["summary"]["final"].values():
        of_set["emoji_judge"] = [0.5, None, None]
    assert all(row.endswith("no interval |") for row in fresh_seeds.section(fresh_seeds.compare(sweep, results))[2:])


def test_what_is_not_fresh_or_not_published(fresh_seeds, sweep):
    results = published(0.4, 0.6)
    with pytest.raises(InputError, match="sets {'optim.lr': 1}"):
        fresh_seeds.compare(sweep._replace(overrides={"optim.lr": 1}), results)
    with pytest.raises(InputError, match="no finished run"):
        fresh_seeds.compare(sweep._replace(arms={"awm": sweep.arms["awm"]}), results)
    with pytest.raises(InputError, match="mine has no published results; known: nft"):
        fresh_seeds.compare(sweep._replace(arms={"mine": sweep.arms["nft"]}), results)
    results["arms"]["nft"]["seeds"]["101"] = {}
    with pytest.raises(InputError, match="seed 101 is published, so not fresh"):
        fresh_seeds.compare(sweep, results)


def test_the_page_is_what_the_files_say(fresh_seeds):
    """And what a file calls published is what the results' file still has."""
    text, files = (RESULTS / "fresh_seeds.md").read_text(), sorted((RESULTS / "fresh").glob("*.json"))
    assert {path.stem for path in files} == set(re.findall(r"<!-- fresh: (.+?) -->", text)) != set()
    for path in files:
        begin, end = fresh_seeds.markers(path.stem)
        found = json.loads(path.read_text())
        assert text.partition(begin + "\n")[2].partition("\n" + end)[0] == "\n".join(fresh_seeds.section(found)), path
        arms = json.loads((RESULTS / path.name).read_text())["arms"]
        for arm, of_sets in found["arms"].items():
            for prompts, one in of_sets.items():
                assert one["published"] == arms[arm]["summary"]["final"][prompts][found["what"]]
                assert not set(one["seeds"]) & set(arms[arm]["seeds"])
