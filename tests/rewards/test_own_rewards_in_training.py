"""Training and evaluation by the user's own rewards, and how their failures end a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sample_rewards

from diffexp_jax import command, parallel, train
from diffexp_jax.algorithms import Inputs
from diffexp_jax.errors import InputError, RewardError
from diffexp_jax.experiment import Experiment
from diffexp_jax.models.lora import init_lora
from diffexp_jax.programs import make_explore, make_programs
from diffexp_jax.run.metrics import read_metrics
from diffexp_jax.settings import checked
from tests.support.runs import PLAIN
from tests.support.tiny import nonzero_lora


def test_alignprop_refuses_python(make_config, tmp_path):
    config = make_config("alignprop", PLAIN | {"reward": "jpeg_compressibility"})
    with pytest.raises(InputError, match="alignprop needs the reward's gradient, and plain Python has none; wants"):
        train.run(config, tmp_path / "run")


class Tiny:
    """Single iterations of a run."""

    def __init__(self, config):
        self.config, self.experiment = config, Experiment.build(checked(config))
        self.programs = make_programs(self.experiment)
        self.frozen = parallel.replicate(self.experiment.frozen)
        lora = init_lora(jax.random.key(0), self.experiment.sampler.pipeline.base, rank=config.lora.rank)
        self.state = parallel.replicate(self.programs.algorithm.init(nonzero_lora(lora)))
        self.steps = parallel.replicate(self.experiment.sampler.steps(explore=True))
        self.explore = make_explore(self.experiment)

    def batch(self, it):
        return self.experiment.draw_batch(it, self.explore)

    def sample(self, it):
        return self.programs.sample(self.state, self.frozen, self.batch(it), self.steps)

    def update(self, it):
        """Trains, and returns the metrics."""
        key = parallel.replicate(jax.random.key(it))
        batch, samples = self.batch(it), self.sample(it) if self.programs.sample else None
        self.state, metrics = self.programs.update(self.state, self.frozen, Inputs(batch, self.steps, key, samples))
        return parallel.first(metrics)

    def measure(self, it):
        """The metrics alone (the update's state is given up, and its arrays are the program's)."""
        kept = jax.tree.map(jnp.copy, self.state)
        metrics, self.state = self.update(it), kept
        return metrics


@pytest.mark.slow  # of a sum they are compared by default
def test_samples_are_those_of_the_same_reward_on_the_device(make_config):
    """Every image meets its own prompt; the trajectories are the same."""
    settings = PLAIN | {"batch.samples": 8, "batch.samples_per_forward": 2}
    own = Tiny(make_config("ddpo", settings | {"reward": "python:sample_rewards:bright_and_long"}))
    other = Tiny(make_config("ddpo", settings | {"reward": "jax:sample_rewards:bright_and_long_jax"}))
    samples, expected = own.sample(3), other.sample(3)
    assert samples.rewards.shape == expected.rewards.shape and np.ptp(expected.rewards) > 0.1
    np.testing.assert_allclose(samples.rewards, expected.rewards, atol=0.5 / 255)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), samples.trajectory, expected.trajectory)
    assert samples.images is expected.images is None  # once they are scored nobody reads them


@pytest.mark.slow
def test_samples_of_a_sum_with_plain_python(make_config):
    """The host scores a chunk's bytes, the program its floats; the two halves are added."""
    settings = PLAIN | {"batch.samples_per_forward": 2, "reward_weights": (2.0, 3.0)}
    python = "python:sample_rewards:bright_and_long"
    mixed = Tiny(make_config("ddpo", settings | {"reward": f"{python}+jax:sample_rewards:brightness"}))
    samples, texts = parallel.first(mixed.sample(3)), mixed.experiment.train.texts
    batch = mixed.batch(3)
    prompts, args = [texts[i] for i in batch.prompt_id[0]], (batch.context, batch.key, mixed.steps)
    generate = mixed.programs.generate(parallel.first(mixed.steps).w_t)
    images = parallel.first(generate(mixed.frozen.model, mixed.state.lora, *args))
    np.testing.assert_allclose(
        samples.parts["bright_and_long"], sample_rewards.bright_and_long(images, prompts), atol=1e-3
    )
    np.testing.assert_allclose(samples.parts["brightness"], images.mean((1, 2, 3)) / 255, atol=0.5 / 255)
    expected = 2 * samples.parts["bright_and_long"] + 3 * samples.parts["brightness"]
    np.testing.assert_allclose(samples.rewards, expected, rtol=1e-5)
    metrics = mixed.measure(3)
    assert metrics["reward/bright_and_long"] == pytest.approx(samples.parts["bright_and_long"].mean(), rel=1e-4)


def test_networks_beside_plain_python_are_reported_in_float32(make_config, tiny_clip):
    """Whatever they train in; the training prompts' tokens are those of the reward that trains."""
    reward = f"python:sample_rewards:bright_and_long+pickscore:{tiny_clip}"
    experiment = Experiment.build(checked(make_config("ddpo", {"reward": reward, "reward_dtype": "bfloat16"})))
    reported = experiment.rewards[experiment.reward]
    types = [{str(x.dtype) for x in jax.tree.leaves(r.params) if x.ndim} for r in (experiment.trained, reported)]
    assert types == [{"bfloat16"}, {"float32"}]
    tokens = experiment.train.tokens[experiment.reward]
    images, texts = np.zeros((len(experiment.train.texts), 16, 16, 3), np.uint8), experiment.train.texts
    _, parts = experiment.trained.start(images, tokens)()
    np.testing.assert_allclose(parts["bright_and_long"], [0.01 * len(text) for text in texts], rtol=1e-6)


@pytest.mark.slow
def test_ddpo_learns_the_opposite_from_the_opposite_reward(make_config):
    """JPEG's two rewards: each sample's advantage changes its sign, so the gradient and Adam's first step do too."""
    changes = []
    for sign in ("compressibility", "incompressibility"):
        settings = {"reward": f"jpeg_{sign}", "ddpo.updates": 1, "optim.weight_decay": 0.0}
        run = Tiny(make_config("ddpo", PLAIN | settings))
        before = parallel.first(run.state.lora)
        run.update(0)
        change = jax.tree.map(np.subtract, parallel.first(run.state.lora), before)
        changes.append(np.concatenate([x.ravel() for x in jax.tree.leaves(change)]))
    small, large = changes
    assert np.linalg.norm(small) > 0.1
    assert np.linalg.norm(small + large) <= 1e-5 * np.linalg.norm(small)


@pytest.mark.slow
@pytest.mark.usefixtures("programs_once", "undrawn")
def test_a_failing_reward_saves_what_was_trained(make_config, tmp_path, monkeypatch, capsys):
    """The third iteration's reward fails: exit code 1, one line, the second's state saved; then the run goes on."""
    settings = PLAIN | {"reward": "python:sample_rewards:fails_once", "checkpoint.every": 4}
    chunks = 2  # calls an iteration
    for name, failing in (("whole", 0), ("stopped", 2 * chunks + 1)):
        monkeypatch.setattr(sample_rewards, "CALLS", iter(range(1, 100)))
        monkeypatch.setattr(sample_rewards, "FAILS_AT", [failing])
        config, workdir = make_config("ddpo", settings), tmp_path / name
        if failing:
            with pytest.raises(SystemExit) as stop:
                command.guarded(train.run, config, workdir)
            said = capsys.readouterr().err
            assert (
                stop.value.code == 1 and "error: reward python:sample_rewards:fails_once: ConnectionError: the" in said
            )
            assert "Traceback" not in said
            assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"0", "2"}
            assert [row["iteration"] for row in read_metrics(workdir)] == [0, 1, 2]
        train.run(config, workdir)
    whole, stopped = (
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(tmp_path / name)]
        for name in ("whole", "stopped")
    )
    assert whole == stopped and len(whole) == 5


@pytest.mark.slow
def test_evaluation_by_python(make_config, tmp_path, monkeypatch):
    """Reported beside the trained reward; a failure there keeps the iteration and its row."""
    evaluation = {"eval.every": 1, "eval.rewards": ("python:sample_rewards:fails_once",), "log.images": 0}
    monkeypatch.setattr(sample_rewards, "CALLS", iter(range(1, 100)))
    monkeypatch.setattr(sample_rewards, "FAILS_AT", [3])
    config, workdir = make_config("ddpo", evaluation | {"checkpoint.every": 4}), tmp_path / "run"
    with pytest.raises(RewardError, match="the server has gone"):
        train.run(config, workdir)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"0", "2"}
    train.run(config, workdir)
    rows = read_metrics(workdir)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["iteration"] for row in rows if "eval/unseen/fails_once" in row] == [0, 1, 3, 4]
    assert 0.1 < rows[4]["eval/unseen/fails_once"] < 1.3


@pytest.mark.slow
def test_alignprop_on_an_ensemble(make_config, tiny_clip):
    """The sum rises on prompts and noise never trained on, and so it does with negative weights: the parts fall."""
    spec, found = f"pickscore:{tiny_clip}+jax:sample_rewards:brightness", {}
    for sign in (1.0, -1.0):
        weights = (0.5 * sign, 20.0 * sign)
        settings = PLAIN | {"reward": spec, "reward_weights": weights, "batch.samples_per_forward": 8}
        run = Tiny(make_config("alignprop", settings))
        before = run.measure(1000)
        for it in range(8):
            run.update(it)
        found[sign], names = run.measure(1000), ("reward/pickscore", "reward/brightness")
        assert found[sign]["reward/mean"] > before["reward/mean"] + 0.02
        for row in (before, found[sign]):
            parts = sum(weight * row[name] for weight, name in zip(weights, names, strict=True))
            assert row["reward/mean"] == pytest.approx(float(parts), rel=1e-5)
    assert found[-1.0]["reward/brightness"] < found[1.0]["reward/brightness"]
