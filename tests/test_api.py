"""The way in from Python: what the command line does, as functions."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import diffexp_jax as dx
from diffexp_jax.report.grids import read_grid, save_grid
from tests.support import ROOT

TINY = {"iterations": 1, "batch.samples": 2, "batch.samples_per_forward": 2, "sampling.steps": 2, "log.images_every": 0}
TINY |= {"eval.every": 0, "reward": "jpeg_incompressibility", "prompts": "animals_unseen", "compilation_cache": ""}


def test_names_are_there_at_first_use():
    """Importing the package alone is quick: programs say what Ctrl-C does before they import what takes seconds."""
    code = "import sys, diffexp_jax as dx; assert 'jax' not in sys.modules; dx.load; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert {"load", "fine_tune", "Evaluator"} <= set(dir(dx)) and all(getattr(dx, name) for name in dx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        dx.lode  # noqa: B018


def test_load_sample_and_score(tiny_model):
    model = dx.load(tiny_model, steps=2, guidance=1.0, batch=2)
    images = model.images(["a dog", "a cat"], seed=3, samples_per_prompt=2)
    assert images.shape == (4, 16, 16, 3) and images.dtype == np.uint8
    scores = model.scores(images, ["a dog", "a dog", "a cat", "a cat"], rewards=["jpeg_incompressibility"])
    assert list(scores) == ["jpeg_incompressibility"] and (scores["jpeg_incompressibility"] > 0).all()
    with pytest.raises(dx.InputError, match="^steps=0: wants 1..1000$"):
        dx.load(tiny_model, steps=0)


@pytest.mark.usefixtures("undrawn")
def test_fine_tune_metrics_and_export(tiny_model, tmp_path):
    config = dx.config("ddpo", TINY | {"ddpo.updates": 1}, explore=True)
    config.model.path = str(tiny_model)
    model = dx.fine_tune(config, tmp_path / "run")
    assert model.images(["a dog"]).shape == (1, 16, 16, 3)
    found = dx.metrics(tmp_path / "run")
    assert found["iteration"].tolist() == [0, 1] and np.isnan(found["loss"]).tolist() == [True, False]
    dx.export_lora(tmp_path / "run", tmp_path / "lora.safetensors")
    run = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    ours = load_file(tmp_path / "lora.safetensors")
    assert run.keys() == ours.keys() and all(np.array_equal(run[name], ours[name]) for name in run)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("dppo",), "^configs/dppo.py: no such file; accepted: alignprop, awm, ddpo, .*paper, "),
        (("aligprop",), "; did you mean 'alignprop'\\?$"),
        (("ddpo", {"optim.lrr": 1.0}), "^config 'ddpo': no such key 'optim.lrr'; did you mean 'optim.lr'\\?$"),
        (("ddpo", {"optim.lr": "fast"}), "^config 'ddpo': .*"),
    ],
)
def test_mistakes_in_a_config(arguments, said):
    with pytest.raises(dx.InputError, match=said):
        dx.config(*arguments)


def test_metrics_of_no_run(tmp_path):
    with pytest.raises(dx.InputError, match="no metrics.jsonl there; wants the workdir of a run"):
        dx.metrics(tmp_path)


def test_mistakes_in_a_configs_arguments():
    with pytest.raises(dx.InputError, match="model='sd99': accepted: emoji, "):
        dx.config("ddpo", model="sd99")
    with pytest.raises(dx.InputError, match="config argument 'modle=emoji': accepted: model=..., "):
        dx.config("ddpo", modle="emoji")


def test_a_grid_is_that_of_the_files(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), np.uint8)
    grid = dx.grid(images, ["a", "b", "c"], columns=2)
    save_grid(tmp_path / "grid.png", images, ["a", "b", "c"], columns=2)
    np.testing.assert_array_equal(np.asarray(grid), np.asarray(Image.open(tmp_path / "grid.png")))
    assert read_grid(tmp_path / "grid.png").captions == ("a", "b", "c") and dx.grid(images).size == grid.size


@pytest.mark.slow  # two minutes
def test_the_documents_session(tmp_path, monkeypatch):
    """docs/use/python.md, as it stands there."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "use" / "python.md").read_text(), flags=re.S)
    assert len(code.splitlines()) <= 24
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"before.png", "after.png", "pytorch_lora_weights.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    rewards = dx.metrics(tmp_path / "runs" / "python")["reward/mean"][1:]
    assert rewards[-3:].mean() > rewards[:3].mean()
