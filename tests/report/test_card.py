"""The model card of a run's LoRA, and what goes to the hub with it."""

import json
import re

import numpy as np
import pytest

from diffexp_jax.report import card
from diffexp_jax.run import checkpoint
from tests.support.sample_runs import write_run

LORA = {"mid": {"to_q": {"A": np.ones((4, 2), np.float32), "B": np.zeros((2, 4), np.float32)}}}
HUB = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CHANGES = {"model.path": HUB, "reward": "pickscore:/home/someone/weights/pick", "optim.lr": 3e-4}
FILES = {"pytorch_lora_weights.safetensors", "README.md", "before.png", "after.png"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "read_lora", lambda workdir, which: (10 if which == "newest" else int(which), LORA))
    return write_run(tmp_path / "run", CHANGES)


def front_matter(text):
    """The card's yaml, whose values are json."""
    lines = text.split("---\n")[1].splitlines()
    return {key: json.loads(value) if value[0] in '["' else value for key, value in (x.split(": ", 1) for x in lines)}


def test_the_card_says_what_the_run_did(run, script, tmp_path):
    script("export_lora", f"--workdir={run}", "--card", f"--out={tmp_path / 'card'}")
    assert {path.name for path in (tmp_path / "card").iterdir()} == FILES
    text = (tmp_path / "card" / "README.md").read_text()
    about = front_matter(text)
    assert about["base_model"] == HUB and {"lora", "ddpo"} <= set(about["tags"]) and "license" not in about
    assert "fine-tuned for 10 iterations to raise a reward (pickscore) with" in text
    assert "in the first 8 iterations guidance is 1 while t > 900, then 5, and a random word of each image" in text
    assert "| animals | all there that the prompt names | 25 % | 50 % |" in text
    assert "| reward queries | 80 |" in text and "| learning rate | 0.0003 (constant) |" in text
    assert "| LoRA | rank 4, alpha 4, attention |" in text
    assert "![after 0 iterations](before.png)" in text and "![after 10 iterations](after.png)" in text
    assert f'from_pretrained("{HUB}", torch_dtype=torch.float32)' in text and "/home/someone" not in text
    for name, i in (("before.png", 0), ("after.png", 10)):
        assert (tmp_path / "card" / name).read_bytes() == (run / "images" / f"{i:06d}.png").read_bytes()


def test_an_earlier_checkpoint_has_its_own_pictures_and_results(run, tmp_path):
    card.write(run, tmp_path / "card", iteration=5, reward="pickscore", lora_file="l.safetensors")
    text = (tmp_path / "card" / "README.md").read_text()
    assert (tmp_path / "card" / "after.png").read_bytes() == (run / "images" / "000005.png").read_bytes()
    assert "## Results" not in text  # of the one evaluation until then there is nothing to compare
    assert "| iterations | 5 of 10 |" in text and "| reward queries | 40 |" in text


def test_a_local_base_model_and_words_of_markdown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    changes = {"model.path": "models/mine", "prompts": "a *bold*|dog\n# of <b>", "exploration.enabled": False}
    changes |= {"eval.steps": 40, "eval.eta": 0.0, "eval.guidance": 2.5}
    run = write_run(tmp_path / "run", changes, iterations=())
    card.write(run, tmp_path / "c", iteration=10, reward="jpeg", lora_file="l.safetensors", repository="me/style_1")
    text = (tmp_path / "c" / "README.md").read_text()
    assert "base_model" not in front_matter(text) and "# style\\_1" in text.splitlines()
    assert "A LoRA for mine, " in text and "ddpo, without exploration." in text and "## Pictures" not in text
    assert r"| prompts | a \*bold\*\|dog # of \<b\> |" in text
    assert "| evaluation | 40 steps, guidance 2.5, eta 0 |" in text
    assert "num_inference_steps=40, guidance_scale=2.5)" in text
    assert 'pipe.load_lora_weights("me/style_1", weight_name="l.safetensors")' in text
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["README.md"]


class Hub:
    """In place of the hub: what was uploaded, or an error."""

    def __init__(self, error=None):
        self.error, self.created, self.uploaded = error, None, None

    def create_repo(self, repository, *, private, exist_ok):
        assert exist_ok
        if self.error:
            raise self.error
        self.created = (repository, private)
        return f"https://hub/{repository}"

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        self.uploaded = {path.name for path in folder_path.iterdir() if path.name in allow_patterns}
        assert repo_id == self.created[0] and "10" in commit_message


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("out", [True, False])
def test_push(run, script, tmp_path, monkeypatch, capsys, private, out):
    huggingface_hub, hub = pytest.importorskip("huggingface_hub"), Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    flags = [*(["--private"] if private else []), *([f"--out={tmp_path / 'kept'}"] if out else [])]
    if out:
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "secret.txt").write_text("nobody's")
    script("export_lora", f"--workdir={run}", "--push_to_hub=me/style", *flags)
    assert hub.created == ("me/style", private or None) and hub.uploaded == FILES
    assert "the LoRA after iteration 10: https://hub/me/style" in capsys.readouterr().out
    assert (tmp_path / "kept" / "README.md").exists() == out


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--push_to_hub=style"], "--push_to_hub style: wants ORGANISATION/NAME"),
        (["--push_to_hub=../x"], "--push_to_hub ../x: wants ORGANISATION/NAME"),
        (["--private", "--out=x"], "--private: is for --push_to_hub"),
        (["--card", "--out=x.safetensors"], "--out x.safetensors: wants a folder"),
        (["--card"], "--out: wants a folder"),
        ([], "--out: wants the .safetensors file to write"),
        (["--card", "--out=full"], "full/README.md: is there already"),
        (["--card", "--out=file"], "cannot be written"),
    ],
)
def test_mistakes(run, script, tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_text("mine")
    (tmp_path / "file").write_text("a file")
    with pytest.raises(SystemExit) as stopped:
        script("export_lora", "--workdir=run", *flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1
    assert (tmp_path / "full" / "README.md").read_text() == "mine"


def test_a_hub_that_refuses(run, script, monkeypatch, capsys):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(RuntimeError("401 Unauthorized\nmore")))
    with pytest.raises(SystemExit) as stopped:
        script("export_lora", f"--workdir={run}", "--push_to_hub=me/style")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(
        r"me/style: not uploaded \(401 Unauthorized\); is there a login", error
    )


def test_hub_ids():
    assert all(map(card.is_hub_id, ("a/b", "A-1/b.c_d")))
    assert not any(map(card.is_hub_id, ("a", "a/b/c", "/a/b", "../b", "a/..", "a/" + "b" * 99, "a b/c", "")))
