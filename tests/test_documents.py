"""README and docs: every command there can be given, every example runs, every link leads somewhere."""

import csv
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

import diffexp_jax
from diffexp_jax.cli import train as cli_train
from diffexp_jax.models.lora import load_lora
from diffexp_jax.pipelines import load_pipeline
from diffexp_jax.rewards import load_reward
from diffexp_jax.settings import checked
from tests.support import ROOT

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


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
            assert cli_train.parse_flags(sys.argv) == ["diffexp_jax.train"]
            checked(cli_train._CONFIG.value)
    else:
        if words[1] == "-m":
            words[1:3] = [f"{words[2].replace('.', '/')}.py"]
        name = Path(words[1]).stem  # what scripts/ only starts is in the package
        sources = list((ROOT / "diffexp_jax" / "cli").glob(f"{name}*.py")) or [ROOT / words[1]]
        source = "".join(path.read_text() for path in sources)
        for flag in (word.partition("=")[0] for word in words[2:] if word.startswith("--")):
            assert f'"{flag}"' in source, f"{words[1]} has no {flag}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_names(path):
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (path.parent / link).exists(), link
    for file in re.findall(r"`((?:diffexp_jax|configs|scripts|tools|tests|docs)/[a-z_/.]+\.\w+)`", text):
        assert (ROOT / file).exists(), file


def test_the_site_builds(tmp_path):
    """A link or an anchor in docs/ that leads nowhere is an error; so is an anchor that the README names."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    for path in ROOT.glob("*.md"):
        for page, anchor in re.findall(r"\]\(docs/([^)#]+)\.md#([^)]+)\)", path.read_text()):
            assert f'id="{anchor}"' in (tmp_path / f"{page}.html").read_text(), f"{path.name}: {page}.md#{anchor}"


def test_use_needs_no_evidence():
    """What a user needs to know stands in docs/use/, or is explained in docs/understand/."""
    for path in (ROOT / "docs" / "use").glob("*.md"):
        assert not re.findall(r"\]\([^)]*evidence/", path.read_text()), path


def test_pages_that_are_named_are_there():
    """In docstrings, comments and messages."""
    folders = [ROOT / name for name in ("configs", "diffexp_jax", "examples", "scripts", "tools")]
    kinds = {".py", ".sh", ".sbatch", ".ipynb"}
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in kinds]
    assert len(files) > 150
    for path in files:
        for page in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text()):
            assert (ROOT / page).exists(), f"{path}: {page}"


def paragraphs(text: str) -> list[str]:
    """The running text of a document, list items alone: without code, tables, headings and what programs wrote."""
    text = re.sub(r"<!-- (\w+)(: .+?)? -->.*?<!-- /\1.*?-->", "", text, flags=re.S)
    text = re.sub(r"^```.*?^```", "\n", text, flags=re.M | re.S)
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[-*] |\|))", text)
    return [part.strip() for part in parts if part.strip() and not part.strip().startswith(("|", "#", "<"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paragraphs_are_short(path):
    """At most five lines of 120 characters, and no interval: tables have those."""
    for paragraph in paragraphs(path.read_text()):
        assert len(paragraph) <= 600, paragraph
        assert not re.search(r"\[[+-]?[\d.]+, [+-]?[\d.]+\]", paragraph), paragraph


def test_the_readme_is_short():
    """At most 120 lines of at most 120 characters; tables have longer ones."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


def test_the_version_is_one():
    project, version = tomllib.loads((ROOT / "pyproject.toml").read_text()), diffexp_jax.__version__
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "diffexp_jax.version.VERSION"}}
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{version}}}" in (ROOT / "README.md").read_text()
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    ruff = re.search(r"^ruff==[\d.]+$", (ROOT / "requirements-test.txt").read_text(), re.M)[0]
    assert (ROOT / ".pre-commit-config.yaml").read_text().count(f'"{ruff}"') == 2


@pytest.mark.slow  # seven minutes
def test_the_first_hour(tmp_path):
    """The first run of docs/use/start.md, line by line as it stands there, in a fresh copy of the files.

    Only the packages are there already: .venv/bin/python is this one.
    """
    text = (ROOT / "docs" / "use" / "start.md").read_text().partition("## First run")[2].partition("## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    assert [shlex.split(line)[1] for line in lines] == [
        f"scripts/{name}"
        for name in ("quickstart.sh", "sample.py", "score.py", "sample.py", "evaluate.py", "export_lora.py")
    ]
    folder = tmp_path / "diffexp_jax"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "samples", "__pycache__"))
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (binaries / "python").chmod(0o755)
    shutil.copy(folder / "requirements.txt", folder / ".venv" / "requirements.installed")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
    environment = kept | {"PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(folder), "HOME": str(tmp_path)}
    for line in lines:
        done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, f"{line}\n{done.stdout}\n{done.stderr}"
    run = folder / "runs" / "quickstart"
    assert {"report.html", "curves.png", "metrics.jsonl", "images", "checkpoints"} <= {x.name for x in run.iterdir()}
    evaluation = json.loads((run / "eval.json").read_text())["animal_activities"]
    base, tuned = (evaluation[name]["emoji_judge"]["mean"] for name in ("base", "tuned"))
    assert tuned > base + 0.5, (base, tuned)  # 27 and 93 to 96 %
    with open(folder / "samples" / "dog.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 and {row["prompt"] for row in rows} == {"a dog riding a bike"}  # without and with the LoRA
    assert max(float(row["emoji_judge"]) for row in rows) == 1.0  # a bike can be seen
    for name in ("dog", "explored"):
        with Image.open(folder / "samples" / name / "grid.png") as grid:
            assert max(grid.size) < 1600, name
    lora, scale = load_lora(folder / "samples", load_pipeline("emoji").base)
    assert scale == 1.0 and lora


def test_your_own_rewards(monkeypatch):
    """docs/use/rewards.md's module, as `jax:` and as `python:`."""
    text = (ROOT / "docs" / "use" / "rewards.md").read_text()
    code = re.search(r"```python\n(# my_rewards.py\n.*?)```", text, re.S)[1]
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
