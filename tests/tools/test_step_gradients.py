"""tools/studies/step_gradients.py: on literal numbers, and against DDPO's own first update on the tiny model."""

import json
import sys

import jax
import numpy as np
import optax
import pytest

from diffexp_jax import parallel
from diffexp_jax.algorithms import Inputs
from diffexp_jax.experiment import Experiment
from diffexp_jax.programs import make_programs
from diffexp_jax.settings import checked
from tests.support import ROOT


@pytest.fixture
def script(monkeypatch):
    import step_gradients

    return step_gradients


def test_standardised(script):
    np.testing.assert_allclose(script.standardised(np.array([[1.0, 3.0], [2.0, 2.0]])), [[-1, 1], [0, 0]], atol=1e-5)


@pytest.mark.slow
def test_their_mean_is_ddpos_gradient(script, make_config):
    """The gradient of DDPO's first update, of the same samples."""
    changes = {"prompts": "prompt:a dog riding a bike", "exploration.enabled": False}
    changes |= {
        "ddpo.updates": 1,
        "ddpo.timestep_fraction": 1.0,
        "ddpo.gradient": "twopass",
        "ddpo.stats_min_count": 8,  # more than there are: mean and std of the batch
        "ddpo.stats_buffer": 8,
        "optim.grad_clip": 1e6,
    }
    experiment = Experiment.build(checked(make_config("ddpo", changes | {"batch.samples_per_forward": 4})))
    each = script.gradients(experiment, 1, 6, seed=0)  # in two batches, the second filled up
    assert len(each) == experiment.sampler.n_steps
    experiment = Experiment.build(
        checked(make_config("ddpo", changes | {"batch.samples": 6, "batch.samples_per_forward": 6}))
    )
    programs, batch = make_programs(experiment), experiment.draw_batch(0, None)
    noise = parallel.shard(parallel.sample_keys(parallel.stream(0, "noise"), 6), 6)
    batch, steps = batch._replace(key=noise), parallel.replicate(experiment.sampler.steps(explore=False))
    frozen, key = parallel.replicate((experiment.frozen, jax.random.key(0)))
    state = parallel.replicate(programs.algorithm.init(experiment.initial_lora()))
    samples = programs.sample(state, frozen, batch, steps)
    state, _ = programs.update(state, frozen, Inputs(batch, steps, key, samples))
    mean = optax.tree.get(parallel.first(state.opt_state), "mu")
    theirs = -np.concatenate([np.ravel(x) for x in jax.tree.leaves(mean)]) / 0.1  # Adam's first mean, of a loss
    ours = each.mean(0)
    assert np.linalg.norm(ours - theirs) < 2e-3 * np.linalg.norm(theirs)


def test_section_literal(script):
    found = {"argument": "x", "sampling": {"steps": 2, "eta": 1.0, "guidance": 5.0}, "reward": "mine", "prompts": 3}
    found |= {"samples_per_prompt": 4, "t": [501, 1], "machine": {"devices": "1 x a CPU", "jax": "0.10.2"}}
    found |= {"size": [0.01, 0.25]}
    lines = script.section(found)
    assert lines[0].startswith("3 prompts, 4 images each; 2 steps, eta 1, guidance 5, mine, ")
    assert lines[-3:] == ["| t | 501 | 1 |", "| --- | --- | --- |", "| size | 1.0 | 25.0 |"]


def test_the_documents_numbers_are_those_of_the_files(script):
    text = (ROOT / "docs" / "evidence" / "results" / "steps.md").read_text()
    files = sorted((ROOT / "docs" / "evidence" / "results" / "steps").glob("*.json"))
    assert files
    for path in files:
        begin, end = script.markers(path.stem)
        inside = text.partition(begin + "\n")[2].partition("\n" + end)[0]
        assert inside == "\n".join(script.section(json.loads(path.read_text()))), path


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--samples_per_prompt=1"], "--samples_per_prompt 1: wants 2..65536"),
        (["--prompts=0"], "--prompts 0: "),
        (["--experiment=fig8"], "--experiment fig8: alignprop has no log-probs of steps; wants one of DDPO"),
    ],
)
def test_bad_input(script, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["step_gradients.py", f"--out={tmp_path / 'x.json'}", *arguments])
    with pytest.raises(SystemExit) as stopped:
        script.command.guarded(script.main, *script.parse())
    assert stopped.value.code == 2 and said in capsys.readouterr().err
