"""A model that is sampled and scored: whose it is, that seeds depend on nothing else, how much is held at once."""

import gc
import shutil
import weakref
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax import parallel
from diffexp_jax.cost.dry_run import programs_of
from diffexp_jax.errors import InputError
from diffexp_jax.evaluator import Evaluator
from diffexp_jax.experiment import Experiment
from diffexp_jax.models.lora import LORA_FILE, init_lora, save_lora, scaled
from diffexp_jax.pipelines import Pipeline
from diffexp_jax.programs import make_programs
from diffexp_jax.prompts import PromptSet
from diffexp_jax.rewards import load_reward, scoring
from diffexp_jax.rewards.scoring import Scorers
from diffexp_jax.run import workdir as workdirs
from diffexp_jax.run.checkpoint import Checkpoints
from diffexp_jax.sampler import Sampler
from diffexp_jax.sampling import initial_latents, load_process
from diffexp_jax.settings import Settings, changed, checked, parsed
from diffexp_jax.settings.training import Exploration
from diffexp_jax.task import Task
from tests.support.tiny import CompileCounter, nonzero_lora

PIPELINE = Pipeline(*[None] * len(Pipeline._fields))._replace(process=load_process({}))
NUMBERS = Exploration(enabled=False, weight_range=(1.0, 1.0), iterations=0)
SAMPLER = Sampler(PIPELINE, None, None, n_steps=2, guidance=1.0, eta=0.0, exploration=NUMBERS)
PROMPTS, EACH, BATCH = 7, 5, 8  # 35 images: four batches and a part of one


@pytest.fixture
def evaluate(monkeypatch):
    """Evaluates without a model: an image is its number in the set; says how many were held at once."""
    made, most = [], []
    gc.freeze()  # collections look at what comes later alone, which takes milliseconds

    class Images(np.ndarray):
        """What can be referred to weakly."""

    def unshard(images, original=parallel.unshard):
        batch = original(images).view(Images)
        gc.collect()
        made.append(weakref.ref(batch))
        most.append(sum(len(there()) for there in made if there() is not None))
        return batch

    monkeypatch.setattr(parallel, "unshard", unshard)
    cond = np.arange(PROMPTS, dtype=np.float32)[:, None]
    prompts = PromptSet("set", tuple(map(str, range(PROMPTS))), ((),) * PROMPTS)
    task = Task(prompts, cond, {"score": np.arange(PROMPTS)})

    def generate(params, lora, context, keys, steps, x_T):
        data = jax.random.key_data(keys).reshape(*keys.shape, -1)[..., -1] % 200
        return jnp.broadcast_to(data[..., None, None, None], (*keys.shape, 2, 2, 3)).astype(jnp.uint8)

    def score(images, tokens):
        return {"": images[:, 0, 0, 0].astype(float) + 1000.0 * tokens, "size": np.full(len(images), 1.0)}

    def run(batch=BATCH, **options):
        most.clear()
        model = Evaluator(
            SAMPLER, None, None, lambda w_t: generate, batch, Scorers({}, {"score": score}, batch), strict=False
        )
        return *model.evaluate(task, seed=1, samples_per_prompt=EACH, **options), max(most)

    return run


def test_a_batch_at_a_time_is_held(evaluate):
    images, scores, held = evaluate()
    assert held == BATCH and images.shape == (0, 2, 2, 3)
    assert scores["score"].shape == scores["score/size"].shape == (PROMPTS * EACH,)


def test_the_same_as_all_at_once(evaluate):
    """Scores bit for bit, in the order of the prompts; the images that are kept are those asked for."""
    whole, together, held = evaluate(batch=40, keep=range(PROMPTS * EACH))
    assert held >= PROMPTS * EACH
    measures = {"brightness": lambda images: images.mean((1, 2, 3)), "features": lambda images: images[:, 0, 0]}
    images, scores, held = evaluate(keep=[0, 7, 8, 34], measures=measures)
    assert held < 2 * BATCH
    np.testing.assert_array_equal(images, whole[[0, 7, 8, 34]])
    np.testing.assert_array_equal(scores["score"], together["score"])
    assert (scores["score"] // 1000).tolist() == np.repeat(np.arange(PROMPTS), EACH).tolist()
    np.testing.assert_array_equal(scores["brightness"], whole.mean((1, 2, 3)))
    np.testing.assert_array_equal(scores["features"], whole[:, 0, 0])


# --------------------------------------------------------------------------------------------------------------- whose


@pytest.fixture(scope="module")
def built(tiny_model):
    """The tiny model, two steps without noise of their own."""
    numbers = {"sampling.steps": 2, "sampling.guidance": 3.0, "sampling.eta": 0.0}
    return Sampler.build(changed(Settings(), {"model.path": str(tiny_model)} | numbers))


@pytest.fixture(scope="module")
def loras(built):
    """Three of rank 4, which are called 3, 5 and 9."""
    fresh = init_lora(jax.random.key(0), built.pipeline.base, rank=4)
    return {seed: nonzero_lora(fresh, seed, size=0.3) for seed in (3, 5, 9)}


@pytest.fixture
def workdir(make_config, loras, built, tmp_path, monkeypatch):
    """A run with two checkpoints, the older one the best, the newer one with an average; and what it ended with."""
    folder = tmp_path / "run"
    planned, _ = workdirs.plan(folder, parsed(make_config("alignprop", {"lora.alpha": 8.0})))
    with workdirs.claim(folder, planned, {}), Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(3, {"lora": loras[3], "iteration": np.array(3)}, score=2.0)
        averaged = {"lora": loras[3], "opt_state": {"average": loras[5]}, "iteration": np.array(5)}
        checkpoints.save(5, averaged, score=1.0)
    save_lora(folder / LORA_FILE, loras[9], alpha=8.0)
    monkeypatch.setattr(Sampler, "build", lambda config: built)
    return folder


def assert_has(model: Evaluator, lora, scale: float):
    """The model's LoRA is this one with its B so many times as large."""
    jax.tree.map(np.testing.assert_array_equal, parallel.first(model.lora), scaled(lora, scale))


@pytest.mark.parametrize("checkpoint, which", [(None, 9), ("newest", 5), ("best", 3), (3, 3), ("5", 5)])
def test_of_a_run(workdir, loras, checkpoint, which):
    """alpha / rank is 2; where a run keeps the LoRA's average it is that which is evaluated."""
    model = Evaluator.of_run(workdir, checkpoint, lora_scale=0.5)
    assert_has(model, loras[which], 1.0)
    assert model.iteration == (checkpoint and which)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0.0), parallel.first(model.untuned().lora))


def test_of_a_run_that_goes_on(workdir, loras):
    (workdir / LORA_FILE).unlink()
    model = Evaluator.of_run(str(workdir))
    assert_has(model, loras[5], 2.0)
    assert model.iteration == 5


def test_of_no_run(workdir, tmp_path):
    for folder, checkpoint, said in (
        (tmp_path / "no", None, "no/config.json: the file is missing$"),
        (workdir, 4, "run: no checkpoint '4'; accepted: newest, best, 3, 5$"),
    ):
        with pytest.raises(InputError, match=said):
            Evaluator.of_run(folder, checkpoint)
    shutil.rmtree(workdir / "checkpoints")
    assert Evaluator.of_run(workdir).iteration is None
    with pytest.raises(InputError, match="run: no checkpoint there; wants the workdir of a run$"):
        Evaluator.of_run(workdir, "best")


def test_a_run_evaluates_by_steps_of_its_own(make_config):
    """Without exploration; the steps of training stay as they are. The dry run compiles for as many."""
    training = {"sampling.steps": 10, "sampling.eta": 1.0, "sampling.noise_steps": (0, 4), "sampling.window": 2}
    config = make_config("alignprop", training | {"exploration.enabled": True})
    experiment = Experiment.build(checked(config), weights=False)
    for changes, n, noisy in (
        ({}, 10, [0, 1]),  # as in training, where the window begins at step 0, 1 or 2
        ({"eval.eta": 0.0}, 10, []),
        ({"eval.steps": 40}, 40, [*range(8)]),
        ({"eval.steps": 5, "eval.eta": 0.5}, 5, [0]),
        ({"eval.steps": 40, "eval.eta": 0.0, "eval.guidance": 1.5}, 40, []),
    ):
        changed_so = experiment._replace(settings=changed(experiment.settings, changes))
        sampler = Evaluator.of_experiment(changed_so, make_programs(changed_so), changed_so.frozen).sampler
        steps = sampler.steps(explore=False)
        assert steps.t.tolist() == sampler.pipeline.process.timesteps(n).tolist()
        guidance = changes.get("eval.guidance", 3.0)
        assert np.flatnonzero(steps.sigma_t).tolist() == noisy and set(steps.w_t.tolist()) == {guidance}
    (evaluation,) = (program for program in programs_of(changed_so) if program.name == "evaluate")
    assert evaluation.args[-1].t.shape[1:] == (40,)
    of_training = experiment.sampler.steps(explore=True, noise_from=2)
    assert np.flatnonzero(of_training.sigma_t).tolist() == [2, 3] and len(set(of_training.w_t.tolist())) == 2


def test_noise_that_evaluation_has_not(tiny_model):
    """Before anything is trained."""
    settings = changed(Settings(), {"model.path": str(tiny_model), "eval.eta": 1.5})
    with pytest.raises(InputError, match="^eta=1.5: the model's steps are DDIM's, wants 0..1$"):
        Sampler.build(settings, weights=False)


def test_settings_to_sample_by(workdir, tiny_model, monkeypatch):
    """A run's own, or as diffusers samples; others by name."""
    seen = []
    monkeypatch.setattr(Evaluator, "of_settings", lambda settings, **options: seen.append((settings, options)))
    Evaluator.of_run(workdir, steps=7, guidance=4, weight_range=[1.0, 2.0], batch=3)
    Evaluator.of_model(tiny_model, guidance=2, scheduler=["timestep_spacing=trailing"], lora="l.safetensors")
    (of_run, options), (of_model, others) = seen
    assert (of_run.eval_sampling.steps, of_run.eval_sampling.guidance, of_run.sampling.guidance) == (7, 4.0, 3.0)
    assert of_run.exploration.weight_range == (1.0, 2.0)
    assert options == {"lora": workdir, "checkpoint": None, "batch": 3} and others == {"lora": "l.safetensors"}
    s = of_model.eval_sampling
    assert (of_model.model.path, s.steps, s.guidance, s.eta) == (str(tiny_model), 50, 2.0, 0.0)
    assert of_model.model.scheduler.timestep_spacing == "trailing"
    for wrong, said in (
        ({"steps": 1001}, "^steps=1001: wants 1..1000$"),
        ({"steps": "ten"}, "^steps='ten': the value is of another type; "),
        ({"scheduler": ["x=1"]}, "^scheduler=x=1: wants KEY=VALUE; accepted: clip_sample, "),
    ):
        with pytest.raises(InputError, match=said):
            Evaluator.of_model(tiny_model, **wrong)


# -------------------------------------------------------------------------------------------------------------- images


PAIR = ["a dog riding a bike", "a cat"]


@pytest.fixture(scope="module")
def model(built, loras, tmp_path_factory):
    """Of a LoRA file, a batch of two."""
    file = tmp_path_factory.mktemp("lora") / "l.safetensors"
    save_lora(file, loras[3], alpha=4.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "build", lambda config: built)
        return Evaluator.of_model(lora=file, batch=2, steps=2, guidance=3.0)


def test_seeds_depend_on_nothing_else(model):
    """Not on how many images are asked for, nor on the LoRA; the same latents are the same noise. Compiled once."""
    images = model.images(PAIR, seed=3)
    assert images.dtype == np.uint8 and images.shape == (2, 16, 16, 3)
    with CompileCounter() as counter:
        several = model.images(PAIR, seed=3, samples_per_prompt=2)
        base = model.untuned().images(PAIR, seed=3)
    assert counter.count == 0
    np.testing.assert_array_equal(several[0], images[0])
    assert np.abs(several[0] - several[1].astype(int)).max() > 2 and np.abs(base - images.astype(int)).max() > 2
    keys = parallel.sample_keys(parallel.stream(3, "sample"), 2)
    latents = np.asarray(initial_latents(keys, (8, 8, 4)))
    np.testing.assert_array_equal(model.images(PAIR, seed=9, latents=latents), images)
    with pytest.raises(InputError, match=r"^latents: shape \(2, 8, 8, 4\); wants \(1, 8, 8, 4\): one for each image$"):
        model.images(PAIR[:1], latents=latents)


def test_images_by_the_steps_of_evaluation(model, built):
    """eval.steps, .eta and .guidance are what those of sampling would be: bit for bit the same images."""
    other = {"sampling.steps": 9, "sampling.eta": 1.0, "sampling.guidance": 9.0}
    training = changed(Settings(), other | {"eval.steps": 2, "eval.guidance": built.guidance})
    without, noisy = (
        replace(model, sampler=built.evaluating(changed(training, {"eval.eta": eta}))).images(PAIR, seed=3)
        for eta in (0.0, None)
    )
    np.testing.assert_array_equal(without, model.images(PAIR, seed=3))
    assert np.abs(noisy - without.astype(int)).max() > 2


@pytest.mark.slow
def test_a_mean_of_x_t_that_was_learnt(model):
    """Images begin around it, with the same noise; the untuned model's do not."""
    mean = np.random.default_rng(0).standard_normal((8, 8, 4)).astype(np.float32)
    around = model.with_lora(parallel.replicate({**parallel.first(model.lora), "x_T": mean}))
    latents = np.asarray(initial_latents(parallel.sample_keys(parallel.stream(3, "sample"), 2), (8, 8, 4)))
    images, expected = around.images(PAIR, seed=3), model.images(PAIR, seed=3, latents=latents + mean)
    np.testing.assert_allclose(images.astype(int), expected, atol=1)
    assert np.abs(images - model.images(PAIR, seed=3).astype(int)).max() > 2
    plain = model.untuned().images(PAIR, seed=3).astype(int)
    np.testing.assert_allclose(around.untuned().images(PAIR, seed=3), plain, atol=1)
    other = model.with_lora(parallel.replicate({**parallel.first(model.lora), "x_T": mean[:4]}))
    with pytest.raises(InputError, match=r"the LoRA's x_T is of latents \(4, 8, 4\), these are \(8, 8, 4\); wants the"):
        other.images(PAIR, seed=3)


def test_images_as_numbers(model):
    floats = model.images(PAIR, floats=True)
    assert floats.dtype == np.float32 and floats.min() >= 0.0 and floats.max() <= 1.0
    np.testing.assert_array_equal(np.round(floats * 255).astype(np.uint8), model.images(PAIR))


@pytest.mark.slow
def test_images_that_explore(model):
    """Eq. 7 by `schedule`, Eq. 8 by `weighted`: other images of the same noise; numbers that do nothing change none."""
    e = replace(model.sampler.exploration, w_low=1.0, t_thresh=400, weight_range=(3.0, 3.0))
    exploring, plain = model.sampled_by(exploration=e), model.images(PAIR)
    weighted, words = exploring.weighted(PAIR, seed=1)
    assert [word.endswith(" x 3.00") for word in words] == [True, True]
    found = [plain, exploring.images(PAIR, schedule=True), exploring.images(weighted)]
    found.append(exploring.images(weighted, schedule=True))
    for i, one in enumerate(found):
        for other in found[:i]:
            assert np.abs(one - other.astype(int)).max() > 2
    off = model.sampled_by(exploration=replace(e, t_thresh=1000, weight_range=(1.0, 1.0)))
    np.testing.assert_array_equal(off.images(off.weighted(PAIR)[0], schedule=True), plain)


def test_scores_of_images(model, monkeypatch):
    """A reward is loaded once; every image has its prompt."""
    loaded = []
    monkeypatch.setattr(scoring, "load_reward", lambda spec, **_: loaded.append(spec) or load_reward(spec))
    images = np.zeros((3, 16, 16, 3), np.uint8)
    images[1] = np.random.default_rng(0).integers(0, 255, (16, 16, 3))
    for _ in range(2):
        scores = model.scores(images, ["a dog"] * 3, rewards=["jpeg_compressibility"])
    (values,) = scores.values()
    assert loaded == ["jpeg_compressibility"] and values[0] == values[2] > values[1]
    with pytest.raises(InputError, match="^3 images and 1 prompts; wants a prompt for each image$"):
        model.scores(images, ["a dog"], rewards=["jpeg_compressibility"])
    with pytest.raises(InputError, match="two have the same name$"):
        model.scores(images, ["a dog"] * 3, rewards=["jpeg_compressibility"] * 2)
