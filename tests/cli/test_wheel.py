"""The package as it is installed: a wheel, in an environment of its own, in an empty folder."""

import csv
import json
import os
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from tests.support import ROOT

TINY = ["iterations=1", "batch.samples=4", "batch.samples_per_forward=2", "sampling.steps=2", "log.images=4"]
TINY += ["eval.every=0", "cpu_devices=2"]


def run(*line, cwd=None, env=None) -> str:
    done = subprocess.run(list(map(str, line)), cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = run("git", "ls-files", "-z", "diffexp_jax", "configs", "*.toml", "*.py", "README.md", "LICENSE", cwd=ROOT)
    for name in files.split("\0")[:-1]:  # a build writes beside its source
        if "/" not in name or name.startswith(("diffexp_jax/", "configs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """installed(program, *arguments): what a program of the environment prints. Its packages are this one's."""
    venv = tmp_path_factory.mktemp("venv") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))  # after the wheel's own
    empty = tmp_path_factory.mktemp("empty")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def call(program, *arguments):
        return run(venv / "bin" / program, *arguments, cwd=empty, env=kept)

    assert str(packages) in call("python", "-c", "import diffexp_jax; print(diffexp_jax.__file__)")
    call.folder = empty
    return call


@pytest.mark.slow  # a minute: builds and installs
def test_what_is_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for folder, into in (("diffexp_jax", "diffexp_jax"), ("configs", "diffexp_jax/_installed/configs")):
        ours = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert {f"{into}/{path.relative_to(ROOT / folder)}" for path in ours} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "tools/", "scripts/"))]


@pytest.mark.slow  # three minutes: trains, samples, scores and evaluates
def test_an_installed_package_works_in_an_empty_folder(installed):
    assert "emoji_pickscore" in installed("diffexp-train", "--list")
    assert "animal_activities" in installed("python", "-m", "diffexp_jax.train", "--list=prompts")
    changes = [f"--config.{change}" for change in TINY]
    installed("diffexp-train", "--config=configs/alignprop.py:model=emoji", "--workdir=a", *changes)
    installed("python", "-m", "diffexp_jax.train", "--config=ddpo:model=emoji", "--workdir=b", *changes)
    folder = installed.folder
    assert all((folder / run / "report.html").exists() for run in "ab")
    installed("diffexp-sample", "--prompt=a dog", "--lora=a", "--steps=2", "--num_images=2", "--out=samples")
    installed("diffexp-score", "--reward=emoji_judge", "--images=samples", "--out=scores.csv")
    assert len(list(csv.DictReader((folder / "scores.csv").open()))) == 2
    installed("diffexp-evaluate", "--workdir=a", "--prompts=animals_unseen", "--samples_per_prompt=1", "--out=e.json")
    assert "animals_unseen" in json.loads((folder / "e.json").read_text())
    installed("diffexp-export-lora", "--workdir=a", "--out=l.safetensors")
    installed("diffexp-report", "--workdir=a", "--beside=b")
    assert (folder / "a" / "beside-b.html").exists() and (folder / "l.safetensors").exists()
