"""The final evaluation of a sweep's runs."""

import json

import jax
import numpy as np
import pytest

from tests.support.runs import FINAL_EVALUATION


def test_final_evaluation(script, workdir, tmp_path):
    """Every prompt's rewards, diversity and signs; the base model's differ, and the schedule's; the same each time."""

    def measured(name, *flags):
        script(
            FINAL_EVALUATION,
            f"--workdir={workdir}",
            f"--out={tmp_path / name}",
            "--samples_per_prompt=3",
            *flags,
        )
        return json.loads((tmp_path / name).read_text())

    tuned, base, again = (
        measured("a/t.json", "--explored"),
        measured("b.json", "--base", "--many=5"),
        measured("t.json"),
    )
    assert again == {key: value for key, value in tuned.items() if key != "explored"}
    assert {p.name for p in tmp_path.rglob("*.partial")} == set()
    assert (tuned["iteration"], base["iteration"], tuned["features"]) == (7, 0, "pickscore")
    assert base["many_per_prompt"] == 5 and base["many"]["unseen"]["means"] != base["plain"]["unseen"]["means"]
    assert tuned["machine"]["jax"] == jax.__version__ and tuned["machine"]["devices"].startswith("1 x ")
    results = [tuned["plain"]["unseen"], tuned["explored"]["unseen"], base["plain"]["unseen"]]
    names = {"pickscore", "luminance", "saturation", "background_share", "diversity/distance", "diversity/vendi"}
    for result in results:
        assert result["prompts"] == ["a snail", "a lobster riding a bike"]
        assert result["means"].keys() == result["per_prompt"].keys() == names
        for name in names:
            assert np.mean(result["per_prompt"][name]) == pytest.approx(result["means"][name]["mean"], abs=1e-5)
        assert all(1.0 < x <= 3.0 for x in result["per_prompt"]["diversity/vendi"])
        assert all(0.0 < x < 2.0 for x in result["per_prompt"]["diversity/distance"])
    for one in range(3):
        for other in range(one):
            pair = [results[i]["means"]["pickscore"]["mean"] for i in (one, other)]
            assert abs(pair[0] - pair[1]) > 1e-3, (one, other)
