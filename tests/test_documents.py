"""README and docs: every command there can be given, every example runs, every link leads somewhere."""

import importlib.util
import re
import shlex
import sys

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from conftest import ROOT

from diffexp_jax import train
from diffexp_jax.rewards import load_reward
from diffexp_jax.settings import check_config

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """The lines of the documents' code blocks that start with `python`, a broken line as one."""
    found = []
    for path in DOCUMENTS:
        for block in re.findall(r"^```\n(.*?)^```", path.read_text(), flags=re.M | re.S):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line.removeprefix("$ ") for line in lines if line.removeprefix("$ ").startswith("python ")]
    return found


def test_there_are_commands():
    assert len(commands()) > 10


@pytest.mark.parametrize("command", commands())
def test_commands(command, monkeypatch):
    words = shlex.split(command, comments=True)
    if words[1:3] == ["-m", "diffexp_jax.train"]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", words[2:])
        with flagsaver.flagsaver():
            assert train.parse_flags(sys.argv) == ["diffexp_jax.train"]
            check_config(train._CONFIG.value)
    else:
        source = (ROOT / words[1]).read_text()
        for flag in (word.partition("=")[0] for word in words[2:] if word.startswith("--")):
            assert f'"{flag}"' in source, f"{words[1]} has no {flag}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_names(path):
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (path.parent / link).exists(), link
    for file in re.findall(r"`((?:diffexp_jax|configs|scripts|tests|docs)/[a-z_/.]+\.\w+)`", text):
        assert (ROOT / file).exists(), file


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_your_own_rewards(monkeypatch):
    """docs/rewards.md's module, as `jax:` and as `python:`."""
    code = re.search(r"```python\n(# my_rewards.py\n.*?)```", (ROOT / "docs" / "rewards.md").read_text(), re.S)[1]
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("my_rewards", None))
    exec(code, module.__dict__)
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    images = np.zeros((2, 8, 8, 3), np.float32)
    images[1, ..., 0] = 1.0
    reward = load_reward("jax:my_rewards:redness")
    np.testing.assert_allclose(jax.jit(reward.score)({}, images, reward.tokenize(["a", "b"]))[0], [0.0, 1.0])
    host = load_reward("python:my_rewards:how_dark")
    scores, _ = host.start((images * 255).astype(np.uint8), host.tokenize(["a", "b"]))()
    np.testing.assert_allclose(scores, [255.0, 170.0])
