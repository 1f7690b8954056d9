"""Bad input of the programs beside training: one clear line, exit code 2, nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest

from diffexp_jax import settings
from tests.support import ROOT
from tests.support.runs import FINAL_EVALUATION, contents


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("sample", ["--prompt=a dog", "--out={}"]),
        ("sample", ["--prompt=a dog", "--out=x", "--lora={}"]),
        ("sample", ["--prompt=a dog", "--out=x", "--latents={}"]),
        ("sample", ["--prompt=a dog", "--out=x", "--model={}"]),
        ("sample", ["--prompts={}.txt", "--out=x"]),
        ("score", ["--reward=jpeg_compressibility", "--images", ".", "{}", "--out=x.csv"]),
        ("score", ["--reward=jpeg_compressibility", "--images=.", "--prompts={}", "--out=x.csv"]),
        ("score", ["--reward=jpeg_compressibility", "--images=.", "--out={}"]),
        ("score", ["--reward=pickscore:{}", "--images=.", "--out=x.csv"]),
        ("evaluate", ["--workdir={}", "--out=e.json"]),
        ("evaluate", ["--workdir=.", "--out={}"]),
        (FINAL_EVALUATION, ["--workdir={}", "--out=e.json"]),
        ("report", ["--workdir={}"]),
        ("report", ["--workdir=.", "--beside={}"]),
        ("export_lora", ["--workdir={}", "--out=l"]),
        ("export_lora", ["--workdir=.", "--out={}"]),
        ("sweep", ["--experiment=fig1", "--out={}"]),
        ("analyse", ["--name=x", "a={}", "b=."]),
        ("check_machine", ["--out={}"]),
    ],
)
def test_paths_in_a_bucket_are_refused_by_every_script(fails, script, monkeypatch, tmp_path, name, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    said = fails(2, script, name, *(argument.format("gs://b/x") for argument in arguments))
    assert ": wants a path on this machine, or on a mounted file system" in said and "gs://b/x" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["evaluate", FINAL_EVALUATION])
@pytest.mark.parametrize(
    "key, spec", [("reward", "python:MODULE:f"), ("eval.rewards", "jpeg_compressibility+jax:MODULE:f")]
)
def test_a_strangers_run_imports_no_code(fails, script, workdir, tmp_path, monkeypatch, name, key, spec):
    """A config.json that names a module beside it, in the current folder; with --trust_code it is imported."""
    monkeypatch.chdir(workdir)
    module = f"evil_{name.rpartition('.')[2]}_{len(key)}"
    spec = spec.replace("MODULE", module)
    changes = {key: (spec,) if key == "eval.rewards" else spec, "eval.every": 1}
    changed = settings.changed(settings.read_config(workdir / "config.json")[0], changes)
    (workdir / "config.json").write_text(json.dumps(settings.as_dict(changed)))
    (workdir / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    arguments = ["--workdir=.", f"--out={tmp_path / 'e.json'}"]
    said = fails(2, script, name, *arguments)
    named = f"config.json: names {spec.rpartition('+')[2]}, code that would be run"
    assert said == f"error: {named}; add --trust_code if you trust it"
    assert not (tmp_path / "ran").exists()
    said = fails(2, script, name, *arguments, "--trust_code")
    assert f"{module} has no function 'f'" in said and (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name, arguments, said",
    [
        (
            "sample",
            ["--model={model}", "--prompt=a dog", "--out=run/config.json/x"],
            "--out run/config.json/x: cannot be",
        ),
        ("evaluate", ["--workdir=no/such", "--out=e.json"], "no/such/config.json: the file is missing"),
        ("evaluate", ["--workdir=run", "--prompts=plants", "--out=e.json"], "unknown prompt set 'plants'; accepted:"),
        ("evaluate", ["--workdir=run", "--rewards=beauty", "--out=e.json"], "unknown reward 'beauty'; accepted:"),
        ("evaluate", ["--workdir=run", "--batch=0", "--out=e.json"], "--batch 0: wants 1..1048576"),
        ("evaluate", ["--workdir=run", "--lora_scale=inf", "--out=e.json"], "--lora_scale inf: wants -100..100"),
        ("evaluate", ["--workdir=run", "--out=run/config.json/e.json"], "--out run/config.json: cannot be written"),
        (
            FINAL_EVALUATION,
            ["--workdir=no/such", "--out=f.json"],
            "no/such/config.json: the file is missing",
        ),
        (FINAL_EVALUATION, ["--workdir=empty", "--out=f.json"], "empty: no checkpoint there"),
        (
            FINAL_EVALUATION,
            ["--workdir=run", "--samples_per_prompt=0", "--out=f.json"],
            "--samples_per_prompt 0: wants",
        ),
        (
            FINAL_EVALUATION,
            ["--workdir=run", "--out=run/config.json/f"],
            "--out run/config.json: cannot be written",
        ),
        ("export_lora", ["--workdir=no/such", "--out=l.safetensors"], "no/such/config.json: the file is missing"),
        ("export_lora", ["--workdir=empty", "--out=l.safetensors"], "empty: no checkpoint there"),
        (
            "export_lora",
            ["--workdir=run", "--checkpoint=best", "--out=l"],
            "run: no checkpoint has a score; wants a run",
        ),
        (
            "evaluate",
            ["--workdir=run", "--checkpoint=3", "--out=e.json"],
            "no checkpoint '3'; accepted: newest, best, 7",
        ),
        ("sample", ["--prompt=a dog", "--checkpoint=best", "--out=x"], "--checkpoint best: wants the workdir of a run"),
        ("export_lora", ["--workdir=run", "--out=run/config.json/l"], "--out run/config.json/l: cannot be written"),
        ("export_lora", ["--workdir=run", "--out=run"], "--out run: cannot be written"),
    ],
)
def test_bad_input_of_the_scripts(fails, script, workdir, tiny_model, monkeypatch, name, arguments, said):
    monkeypatch.chdir(workdir.parent)
    Path("empty").mkdir()
    shutil.copy(workdir / "config.json", "empty")
    before = contents(Path("."))
    assert said in fails(2, script, name, *(argument.format(model=tiny_model) for argument in arguments))
    assert contents(Path(".")) == before
