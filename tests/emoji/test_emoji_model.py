"""The shipped emoji model: its files are what diffusers and transformers read, and stay small."""

import os
import subprocess
import sys

import numpy as np
import pytest

from diffexp_jax.emoji.pretraining import ASSETS
from diffexp_jax.emoji.reward_stages import judge_accuracy
from diffexp_jax.pipelines import SHIPPED
from tests.support import ROOT


def test_assets_are_small():
    total = sum(path.stat().st_size for path in ASSETS.parent.rglob("*") if path.is_file())
    assert total <= 30e6


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, kind, options",
    [("emoji", "StableDiffusionPipeline", {}), ("emoji_flow", "StableDiffusion3Pipeline", {"max_sequence_length": 12})],
)
def test_scripts_sample_equals_diffusers(tmp_path, model, kind, options):
    """diffusers' pipeline loads the folder as it is and makes the images of scripts/sample.py."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")

    prompts = ["a dog riding a bike", "an octopus"]
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", latents)
    command = [sys.executable, "scripts/sample.py", "--steps", "20", "--guidance", "7.5", "--save_npy"]
    command += ["--model", model, "--latents", str(tmp_path / "x.npy"), "--out", str(tmp_path)]
    for prompt in prompts:
        command += ["--prompt", prompt]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = np.load(tmp_path / "images.npy")

    pipe = getattr(diffusers, kind).from_pretrained(SHIPPED[model], torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    theirs = pipe(
        prompts, num_inference_steps=20, guidance_scale=7.5, latents=noise, output_type="np", **options
    ).images
    assert np.abs(ours - theirs).max() <= 2e-3
    assert ours.std() > 0.05


@pytest.mark.slow
def test_the_judge_is_right_about_held_out_scenes():
    """As they are drawn, and after the VAE."""
    found = judge_accuracy(ASSETS, n=1024)
    assert found.keys() == {"clean/animal", "clean/object", "decoded/animal", "decoded/object"}
    assert min(found.values()) >= 0.999, found
