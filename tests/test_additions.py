"""docs/understand/adding.md: a method, a reward, a process, prompts, a kind of model is a file and a line in a table.

Here the file is a module of the test's own, and the line is entered from outside: nothing else is touched.
"""

import json
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from diffexp_jax import sampling, train
from diffexp_jax.algorithms import METHODS, Setup
from diffexp_jax.cli import sample_flags
from diffexp_jax.emoji.tokenizer import write_tokenizer
from diffexp_jax.errors import InputError
from diffexp_jax.evaluator import Evaluator
from diffexp_jax.experiment import Experiment
from diffexp_jax.formats import convert
from diffexp_jax.models.lora import LORA_FILE, init_lora, save_lora
from diffexp_jax.pipelines import PIPELINES, load_pipeline
from diffexp_jax.programs import make_explore
from diffexp_jax.prompts import PROMPTS
from diffexp_jax.rewards import BUILTINS, load_reward
from diffexp_jax.run.checkpoint import Checkpoints
from diffexp_jax.run.metrics import read_metrics
from diffexp_jax.run.workdir import plan
from diffexp_jax.settings import checked, parsed, read_config
from tests.support import ROOT, two_numbers
from tests.support.tiny import SCHEDULER, random_weights, write_part

PLAIN = {"eval.every": 0, "log.images": 0, "iterations": 2}


def example(name: str) -> types.ModuleType:
    """The module of docs/understand/adding.md whose first line is `# NAME.py`."""
    text = (ROOT / "docs" / "understand" / "adding.md").read_text()
    for block in text.split("```python\n")[1:]:
        code = block.partition("```")[0]
        if code.startswith(f"# {name}.py\n"):
            module = types.ModuleType(name)
            exec(compile(code, f"docs/understand/adding.md: {name}.py", "exec"), module.__dict__)
            return module
    raise LookupError(name)


def check_what_reads_its_run(method, config, workdir):
    """config.json has all of the method's settings: the report, a continued run, evaluations and sample.py read it."""
    page = (workdir / "report.html").read_text()
    assert re.search(r"<code>grouped.clip</code>.*?>0.5<.*?>0.0001<", page, flags=re.S), "here, and the default"
    assert Evaluator.of_run(workdir).sampler.n_steps == 4
    flags = sample_flags.arguments("", [f"--lora={workdir}", f"--out={workdir}/sampled"])
    assert sample_flags.settings_of(flags).sampling.steps == 4

    longer = config.copy_and_resolve_references().unlock()
    longer.iterations = 3
    train.run(longer, workdir)
    assert [row["iteration"] for row in read_metrics(workdir)] == [0, 1, 2, 3]
    del longer["grouped"]
    with pytest.raises(InputError, match=r"grouped.clip \(0.5 there, 0.0001 here\)"):
        plan(workdir, parsed(longer))
    path = workdir / "config.json"
    content = json.loads(path.read_text())
    del content["grouped"]  # as a run wrote that left the method's settings at their defaults
    path.write_text(json.dumps(content))
    assert read_config(path)[0].method == method()
    assert plan(workdir, parsed(longer)).settings.method == method()


@pytest.mark.usefixtures("programs_once")
def test_a_method(monkeypatch, make_config, tmp_path):
    """Group-relative advantages, and a state of its own: how many samples it has seen."""
    method = example("grouped").Grouped
    monkeypatch.setitem(METHODS, "grouped", method)
    config = make_config("ddpo", PLAIN).unlock()
    config.algorithm = "grouped"
    with pytest.raises(InputError, match="batch.group=1: grouped compares samples of a prompt; wants at least 2"):
        Experiment.build(checked(config))
    config.batch.group = 4
    experiment = Experiment.build(checked(config))
    ids = experiment.draw_batch(0, None).prompt_id[0]
    np.testing.assert_array_equal(ids[:4], ids[0])
    np.testing.assert_array_equal(ids[4:], ids[4])
    assert experiment.settings.method == method(clip=1e-4)

    config["grouped"] = {"clip": 0.5}
    assert Experiment.build(checked(config)).settings.method == method(clip=0.5)
    train.run(config.lock(), tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    assert [row["iteration"] for row in rows] == [0, 1, 2] and rows[-1]["seen"] == 16 and rows[-1]["grad_norm"] > 0
    state = experiment.algorithm().init(experiment.initial_lora())
    _, restored = Checkpoints(tmp_path / "run", keep=1).restore_newest(jax.device_get(state))
    assert restored.extra["seen"] == 16
    check_what_reads_its_run(method, config, tmp_path / "run")

    config = config.copy_and_resolve_references()
    config["grouped"] = {"clipp": 0.5}
    with pytest.raises(InputError, match="grouped: the key='clipp'"):
        Experiment.build(checked(config))


def setup_of_numbers(rate):
    """The network of two numbers, and gradient descent."""
    sizes = dict(
        n_samples=two_numbers.N // jax.device_count(), n_chunks=2, n_prompts=4, n_steps=two_numbers.T, lora_size=2
    )
    sizes |= dict(group=two_numbers.GROUP)
    return Setup(two_numbers.POLICY, optax.sgd(rate), **sizes, remat=True, full_float32=True, stream=None)


def test_a_method_that_couples_samples():
    """Two updates by the loss of pairs, against gradient descent on the loss itself."""
    module, rate = example("paired"), 0.05
    samples, state, _ = two_numbers.iteration(module.Paired(scale=3.0).make(setup_of_numbers(rate)))
    everything = np.arange(two_numbers.N)

    @jax.jit
    def followed(lora, old):
        def loss(lora):
            rewards = jnp.broadcast_to(samples[3], old.shape)
            return module.pair_loss(two_numbers.log_probs(lora, samples, everything), old, rewards, group=2, scale=3.0)

        return jax.tree.map(lambda x, g: x - rate * g, lora, jax.grad(loss)(lora))

    old = two_numbers.log_probs(two_numbers.LORA, samples, everything)
    expected = followed(followed(two_numbers.LORA, old), old)
    for name, start in two_numbers.LORA.items():
        assert abs(float(expected[name] - start)) > 1e-4
        assert float(state.lora[name] - start) == pytest.approx(float(expected[name] - start), rel=2e-3)


def test_a_method_with_a_second_lora():
    """The pull towards the average is none where the LoRA begins; the average follows it."""
    method = example("anchored").Anchored
    states = [two_numbers.iteration(method(pull=pull).make(setup_of_numbers(0.05)))[1] for pull in (0.0, 1e3)]
    for name, start in two_numbers.LORA.items():
        assert abs(float(states[0].lora[name] - start)) > 1e-4
        assert float(states[0].lora[name]) == pytest.approx(float(states[1].lora[name]), rel=1e-5)
        average = 0.9 * float(start) + 0.1 * float(states[0].lora[name])
        assert float(states[0].extra["average"][name]) == pytest.approx(average, rel=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("programs_once")
def test_a_run_with_a_second_lora(monkeypatch, make_config, tmp_path):
    """It stops and goes on: its checkpoints hold the average of the LoRA's past."""
    monkeypatch.setitem(METHODS, "anchored", example("anchored").Anchored)
    config = make_config("ddpo", PLAIN | {"iterations": 1, "checkpoint.every": 1, "checkpoint.keep": 3}).unlock()
    config.algorithm = "anchored"
    experiment = Experiment.build(checked(config))
    first = jax.device_get(experiment.algorithm().init(experiment.initial_lora()))
    states = [first]
    for config.iterations in (1, 2):
        train.run(config.copy_and_resolve_references(), tmp_path / "run")
        states.append(Checkpoints(tmp_path / "run", keep=3).restore_newest(first)[1])
    for before, after in zip(states[:-1], states[1:], strict=True):
        rows = (before.extra["average"], after.lora, after.extra["average"])
        for average, lora, found in zip(*map(jax.tree.leaves, rows), strict=True):
            np.testing.assert_allclose(found, 0.9 * average + 0.1 * lora, rtol=1e-5, atol=1e-8)
    moved = jax.tree.map(lambda a, x: np.abs(a - x).max(), states[2].extra["average"], states[2].lora)
    assert max(jax.tree.leaves(moved)) > 1e-5 and int(states[2].iteration) == 2


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


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_process(monkeypatch, make_config, tiny_model, tmp_path):
    """A model's scheduler_config.json names it; a whole run uses it."""
    monkeypatch.setitem(sampling.PROCESSES, "HalfNoiseScheduler", example("half_noise").half_noise)
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(SCHEDULER | {"_class_name": "HalfNoiseScheduler"}))
    config = make_config("ddpo", PLAIN | {"model.path": str(folder), "iterations": 1})
    experiment, usual = Experiment.build(checked(config)), Experiment.build(checked(make_config("ddpo", PLAIN)))
    half, whole = (x.sampler.steps(explore=False).sigma_t for x in (experiment, usual))
    np.testing.assert_allclose(half, whole / 2)
    train.run(config, tmp_path / "run")
    assert np.isfinite(read_metrics(tmp_path / "run")[-1]["loss"])


def test_a_prompt_set(monkeypatch, make_config):
    monkeypatch.setitem(PROMPTS, "colours", example("colours").COLOURS)
    experiment = Experiment.build(checked(make_config("ddpo", PLAIN | {"prompts": "colours"})))
    assert experiment.train.texts == ("a red car", "a blue car", "a red house", "a blue house")
    assert int(experiment.units.max()) == 3 and jnp.isfinite(experiment.train.cond.embedding).all()


WIDTH = 16


def write_two_lengths(kind, folder, vocabulary_size):
    """A folder of docs/understand/adding.md's kind of model with random weights."""
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / name)
    index = {"_class_name": "TwoLengthsPipeline"}
    parts = {"transformer": {"width": WIDTH, "vocab_size": vocabulary_size}, "scheduler": SCHEDULER}
    params = random_weights(kind.shapes(index, parts, "here").params, seed=0)
    for part, tree in params.items():
        write_part(folder / part, parts.get(part, {}), convert.to_torch(tree), stem="model")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def two_lengths(monkeypatch, tmp_path, tiny_model):
    kind = example("two_lengths").KIND
    monkeypatch.setitem(PIPELINES, "TwoLengthsPipeline", kind)
    size = len(json.loads((tiny_model / "tokenizer" / "vocab.json").read_text()))
    return write_two_lengths(kind, tmp_path / "two_lengths", size)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_kind_of_model(two_lengths, make_config, script, tmp_path):
    """Two tokenizers of different lengths: an update of DDPO with both kinds of exploration, and what reads its run."""
    text = "a dog washing the dishes near a red car"
    changes = {
        "model.path": str(two_lengths),
        "iterations": 1,
        "exploration.enabled": True,
        "prompts": f"prompt:{text}",
    }
    config = make_config("ddpo", PLAIN | changes | {"exploration.weight_range": (3.0, 3.0)})
    experiment = Experiment.build(checked(config))
    cond, (units,) = experiment.train.cond, experiment.units
    assert cond.shape == (1, 8 + 24, WIDTH) and cond.dtype == jnp.bfloat16
    assert units[:8].tolist() == [0, 1, 2, 3, 4, 5, 6, 0] and units[8:].max() == 9  # the first reads six tokens

    batch, plain = (experiment.draw_batch(0, explore) for explore in (make_explore(experiment), None))
    weighted, before = batch.context.cond[0], plain.context.cond[0]
    assert weighted.dtype == before.dtype
    empty = np.asarray(experiment.sampler.empty, np.float32)
    for one, other in zip(np.asarray(weighted, np.float32), np.asarray(before, np.float32), strict=True):
        changed = (one != other).any(-1)
        (unit,) = set(units[changed])
        np.testing.assert_array_equal(changed, units == unit)  # in both encoders' vectors
        np.testing.assert_allclose(one[changed], (empty + 3 * (other - empty))[changed], rtol=0.01)

    train.run(config, tmp_path / "run")
    assert np.isfinite(read_metrics(tmp_path / "run")[-1]["loss"])
    trained = load_file(tmp_path / "run" / LORA_FILE)
    layers = [f"transformer.attn.{name}" for name in ("to_k", "to_q", "to_v")]
    assert sorted(trained) == [f"{layer}.lora_{kind}.weight" for layer in layers for kind in "AB"]
    assert all(np.abs(trained[f"{layer}.lora_B.weight"]).max() > 0 for layer in layers)
    script("export_lora", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'x.safetensors'}")
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "run" / LORA_FILE).read_bytes()
    model = Evaluator.of_run(tmp_path / "run")
    assert (model.images(["a dog"]) != model.untuned().images(["a dog"])).any()


def test_a_kind_of_model_has_its_own_lora(two_lengths, make_config, tiny_model, tmp_path):
    """Targets, shapes for a dry run; and no LoRA of a UNet fits."""
    config = make_config("ddpo", PLAIN | {"model.path": str(two_lengths), "lora.targets": ("projections",)})
    shapes = Experiment.build(checked(config), weights=False)
    assert list(shapes.lora_shapes()) == ["proj_out"] and shapes.units.shape == (5, 8 + 24)
    with pytest.raises(InputError, match="lora.targets='feed_forward': accepted: attention, projections, or single "):
        Experiment.build(
            checked(make_config("ddpo", {"model.path": str(two_lengths), "lora.targets": ("feed_forward",)}))
        )
    unet = load_pipeline(tiny_model)
    save_lora(tmp_path / "x.safetensors", init_lora(jax.random.key(0), unet.base, rank=2), alpha=2.0)
    config = make_config("ddpo", PLAIN | {"model.path": str(two_lengths), "lora.path": str(tmp_path / "x.safetensors")})
    with pytest.raises(InputError, match="no layer of this model's transformer .*: a LoRA of a UNet"):
        Experiment.build(checked(config)).initial_lora()
