"""scripts/evaluate.py on a tiny run."""

import json

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm


@pytest.mark.slow
def test_evaluate_on_other_devices(script, workdir, tmp_path, monkeypatch):
    """Of which training's batch is no multiple: only --batch counts."""
    config = json.loads((workdir / "config.json").read_text())
    config["batch"]["samples"] = 7  # no multiple of anything here: as a run on seven devices
    config["batch"]["samples_per_forward"] = 1
    config["prompts"] = "gone.txt"  # what was trained on is not read
    (workdir / "config.json").write_text(json.dumps(config))
    seen = []
    monkeypatch.setattr(tqdm, "update", lambda self, n=1: seen.append(n))
    prompts = "--prompts=a dog, big,prompt:cat"
    script("evaluate", f"--workdir={workdir}", prompts, "--samples_per_prompt=1", f"--out={tmp_path / 'e.json'}")
    found = json.loads((tmp_path / "e.json").read_text())
    names = [key for key in found if isinstance(found[key], dict) and "base" in found[key]]
    assert [name.partition("-")[0] for name in names] == ["a_dog__big", "cat"]
    assert sum(seen) == 4  # the progress bar: two images of two models


def test_evaluate(script, workdir, tmp_path, tiny_settings):
    script("evaluate", f"--workdir={workdir}", "--samples_per_prompt=3", "--batch=4", f"--out={tmp_path / 'e.json'}")
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["iteration"] == 7 and found["samples_per_prompt"] == 3
    base, tuned = found["unseen"]["base"]["pickscore"], found["unseen"]["tuned"]["pickscore"]
    assert np.isfinite([base["mean"], tuned["mean"]]).all() and base["standard_error"] > 0
    assert abs(base["mean"] - tuned["mean"]) > 1e-3
    of_prompts = found["unseen"]["tuned"]["diversity/distance"], found["unseen"]["tuned"]["diversity/vendi"]
    assert 0 < of_prompts[0]["mean"] < 2 and 1 < of_prompts[1]["mean"] <= 3
    with Image.open(tmp_path / "e-unseen.png") as grid:  # six pictures (two prompts, three each), before and after
        assert grid.size[0] > 6 * 128 and 2 * 128 < grid.size[1] < 3 * 128, grid.size
    script("evaluate", f"--workdir={workdir}", "--lora_scale=0", "--batch=4", f"--out={tmp_path / 'none.json'}")
    found = json.loads((tmp_path / "none.json").read_text())
    assert found["unseen"]["base"] == found["unseen"]["tuned"] and found["lora_scale"] == 0
