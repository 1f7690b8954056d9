"""What docs/adding.md says: a method, a reward, a process or a prompt set needs its own file and a line in a table.

Here the file is a module of the test's own, and the line is entered from outside: nothing else is touched.
"""

import json
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax import sampling, train
from diffexp_jax.algorithms import METHODS
from diffexp_jax.errors import InputError
from diffexp_jax.experiment import Experiment
from diffexp_jax.prompts import PROMPTS
from diffexp_jax.rewards import BUILTINS, load_reward
from diffexp_jax.run.checkpoint import Checkpoints
from diffexp_jax.run.metrics import read_metrics
from diffexp_jax.run.workdir import plan
from diffexp_jax.settings import read_config
from tests.conftest import ROOT, SCHEDULER

PLAIN = {"eval.every": 0, "log.images": 0, "iterations": 2}


def example(name: str) -> types.ModuleType:
    """The module of docs/adding.md whose first line is `# NAME.py`."""
    text = (ROOT / "docs" / "adding.md").read_text()
    for block in text.split("```python\n")[1:]:
        code = block.partition("```")[0]
        if code.startswith(f"# {name}.py\n"):
            module = types.ModuleType(name)
            exec(compile(code, f"docs/adding.md: {name}.py", "exec"), module.__dict__)
            return module
    raise LookupError(name)


def check_what_reads_its_run(script, method, config, workdir):
    """config.json has all of the method's settings: the report, a continued run, evaluate.py and sample.py read it."""
    page = (workdir / "report.html").read_text()
    assert re.search(r"<code>grouped.clip</code>.*?>0.5<.*?>0.0001<", page, flags=re.S), "here, and the default"
    script("evaluate", f"--workdir={workdir}", f"--out={workdir}/eval.json")
    script("sample", f"--lora={workdir}", "--prompt=a dog", f"--out={workdir}/sampled")
    assert (workdir / "eval.json").exists() and list((workdir / "sampled").glob("*.png"))

    longer = config.copy_and_resolve_references().unlock()
    longer.iterations = 3
    train.run(longer, workdir)
    assert [row["iteration"] for row in read_metrics(workdir)] == [0, 1, 2, 3]
    del longer["grouped"]
    with pytest.raises(InputError, match=r"grouped.clip \(0.5 there, 0.0001 here\)"):
        plan(workdir, longer)
    path = workdir / "config.json"
    content = json.loads(path.read_text())
    del content["grouped"]  # as a run wrote that left the method's settings at their defaults
    path.write_text(json.dumps(content))
    assert read_config(path)[0].grouped.to_dict() == {"clip": 1e-4}
    assert plan(workdir, longer).config.grouped.to_dict() == {"clip": 1e-4}


@pytest.mark.usefixtures("programs_once")
def test_a_method(monkeypatch, make_config, script, tmp_path):
    """Group-relative advantages, and a state of its own: how many samples it has seen."""
    method = example("grouped").Grouped
    monkeypatch.setitem(METHODS, "grouped", method)
    config = make_config("ddpo", PLAIN).unlock()
    config.algorithm = "grouped"
    with pytest.raises(InputError, match="batch.group=1: grouped compares samples of a prompt; wants at least 2"):
        Experiment.build(config)
    config.batch.group = 4
    experiment = Experiment.build(config)
    ids = experiment.draw_batch(0, None).prompt_id[0]
    np.testing.assert_array_equal(ids[:4], ids[0])
    np.testing.assert_array_equal(ids[4:], ids[4])
    assert experiment.method == method(clip=1e-4)

    config["grouped"] = {"clip": 0.5}
    assert Experiment.build(config).method == method(clip=0.5)
    train.run(config.lock(), tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    assert [row["iteration"] for row in rows] == [0, 1, 2] and rows[-1]["seen"] == 16 and rows[-1]["grad_norm"] > 0
    state = experiment.algorithm().init(experiment.initial_lora())
    _, restored = Checkpoints(tmp_path / "run", keep=1).restore_newest(jax.device_get(state))
    assert restored.extra["seen"] == 16
    check_what_reads_its_run(script, method, config, tmp_path / "run")

    config = config.copy_and_resolve_references()
    config["grouped"] = {"clipp": 0.5}
    with pytest.raises(InputError, match="grouped: the key='clipp'"):
        Experiment.build(config)


def test_a_reward(monkeypatch, tiny_clip):
    for name, builtin in example("redness").BUILTINS.items():
        monkeypatch.setitem(BUILTINS, name, builtin)
    images = np.random.default_rng(0).uniform(size=(2, 16, 16, 3)).astype(np.float32)
    texts = ["a dog", "an ant"]
    both = load_reward(f"redness+pickscore:{tiny_clip}")
    total, parts = jax.jit(both.score)(both.params, images, both.tokenize(texts))
    red = images[..., 0].mean((1, 2)) - images[..., 1:].mean((1, 2, 3))
    np.testing.assert_allclose(parts["redness"], red, atol=1e-5)
    np.testing.assert_allclose(total, 3.0 * parts["redness"] + 0.1 * parts["pickscore"], rtol=1e-5)


def test_a_process(monkeypatch, make_config, tiny_model, tmp_path):
    """A model's scheduler_config.json names it; a whole run uses it."""
    monkeypatch.setitem(sampling.PROCESSES, "HalfNoiseScheduler", example("half_noise").half_noise)
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(SCHEDULER | {"_class_name": "HalfNoiseScheduler"}))
    config = make_config("ddpo", PLAIN | {"model.path": str(folder), "iterations": 1})
    experiment, usual = Experiment.build(config), Experiment.build(make_config("ddpo", PLAIN))
    half, whole = (x.sampler.steps(explore=False).sigma_t for x in (experiment, usual))
    np.testing.assert_allclose(half, whole / 2)
    train.run(config, tmp_path / "run")
    assert np.isfinite(read_metrics(tmp_path / "run")[-1]["loss"])


def test_a_prompt_set(monkeypatch, make_config):
    monkeypatch.setitem(PROMPTS, "colours", example("colours").COLOURS)
    experiment = Experiment.build(make_config("ddpo", PLAIN | {"prompts": "colours"}))
    assert experiment.train.texts == ("a red car", "a blue car", "a red house", "a blue house")
    assert int(experiment.units.max()) == 3 and jnp.isfinite(experiment.train.cond.embedding).all()
