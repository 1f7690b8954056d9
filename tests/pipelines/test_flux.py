"""FLUX.1: tiny pipelines that diffusers makes, saves and runs, against ours."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import grpo
from diffexp_jax import parallel, train
from diffexp_jax.cost import dry_run
from diffexp_jax.errors import InputError
from diffexp_jax.evaluator import Evaluator
from diffexp_jax.models import lora
from diffexp_jax.pipelines import encode_prompts, load_pipeline, make_context
from diffexp_jax.prompts import PromptSet
from diffexp_jax.run.metrics import read_metrics
from diffexp_jax.settings import checked
from tests.support.flux import PROMPTS, TINY, pipeline
from tests.support.pipelines import both_of, saved_lora
from tests.support.runs import LORA, assert_same_run
from tests.support.sd3 import channels_first

T5_TOKENS, N_STEPS = 16, 10


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make("dev"): Both, made once."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        theirs = pipeline(name, folder / "tokens")
        return both_of(theirs, folder / "model", image_size=64, t5_tokens=T5_TOKENS)

    return make


def noise():
    return np.random.default_rng(1).standard_normal((2, 8, 8, 16)).astype(np.float32)


def our_images(made, guidance, collection=None):
    _, model, _, sample = made
    steps = model.process.make_steps(model.process.timesteps(N_STEPS), np.full(N_STEPS, guidance), eta=0.0)
    cond = encode_prompts(model, PROMPTS, chunk=2)[0]
    context = make_context(cond, model.unconditional(None))
    keys = parallel.sample_keys(jax.random.key(0), 2)
    return np.asarray(sample(model.params, collection, noise(), context, steps, keys))


def their_images(made, guidance):
    theirs = made[0]
    packed = theirs._pack_latents(channels_first(noise()), 2, 16, 8, 8)
    return theirs(
        PROMPTS,
        height=64,
        width=64,
        latents=packed,
        num_inference_steps=N_STEPS,
        guidance_scale=guidance,
        max_sequence_length=T5_TOKENS,
        output_type="np",
    ).images


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x == "schnell")) for x in TINY])
def test_embeddings_and_images_are_diffusers(make, name):
    """Guidance is an input of dev, and nothing to schnell."""
    theirs, ours, *_ = made = make(name)
    cond, cut = encode_prompts(ours, PROMPTS, chunk=2)
    tokens, pooled, _ = theirs.encode_prompt(PROMPTS, prompt_2=None, device="cpu", max_sequence_length=T5_TOKENS)
    assert not cut
    for found, wanted in ((cond.tokens, tokens), (cond.pooled, pooled)):
        wanted = wanted.detach().numpy()
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    images = {guidance: our_images(made, guidance) for guidance in (3.5, 1.0)}
    for guidance, found in images.items():
        wanted = their_images(made, guidance)
        assert np.abs(found - wanted).max() <= 2e-3 and wanted.std() > 0.02
    assert (np.abs(images[3.5] - images[1.0]).max() > 1e-3) == (name == "dev")
    assert ours.evaluations(np.array([3.5, 1.0])).tolist() == [1, 1]


def test_prompt_weighting_acts_on_t5s_tokens(make):
    _, ours, *_ = make("dev")
    prompts = PromptSet("two", ("a dog riding a bike",), ((),))
    units = ours.units(prompts, "word")
    assert units.shape == (1, T5_TOKENS) and units.max() == 5
    weights = np.where(units[0] == 2, 1.5, 1.0).astype(np.float32)  # "dog"
    cond, null = (jax.tree.map(lambda x: x[0], encode_prompts(ours, [text])[0]) for text in (prompts.texts[0], ""))
    moved = ours.reweight(cond, null, weights)
    np.testing.assert_array_equal(np.abs(moved.tokens - cond.tokens).max(1) > 0, weights != 1.0)
    np.testing.assert_array_equal(moved.pooled, cond.pooled)


def test_lora_goes_to_diffusers(make, tmp_path):
    pytest.importorskip("peft")
    theirs, ours, *_ = made = make("dev")
    collection = saved_lora(ours, tmp_path, ["attention", "feed_forward"])
    try:
        theirs.load_lora_weights(str(tmp_path))
        tuned = their_images(made, 3.5)
    finally:
        theirs.unload_lora_weights()
    found = our_images(made, 3.5, lora.scaled(collection, 0.5))
    assert np.abs(found - tuned).max() <= 2e-3
    assert np.abs(found - our_images(made, 3.5)).max() > 0.01


# ---- sizes, and what does not fit


@pytest.mark.slow  # a minute to trace
@pytest.mark.parametrize("name, size", [("dev", 11_901_408_320), ("schnell", 11_891_178_560)])
def test_published_sizes(name, size):
    """Without files: every part's parameters, and the levels of 512 pixels."""
    model = load_pipeline(f"black-forest-labs/FLUX.1-{name}", weights=False, image_size=512)
    counts = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in model.params.items()}
    assert counts["transformer"] == size and counts["text_encoder_2"] == 4_762_310_656
    assert counts["text_encoder"] == 123_060_480 and abs(counts["vae"] - 83.8e6) < 1e5
    assert model.latent_shape == (64, 64, 16) and model.lengths == (77, 512)
    second = {"dev": 903.7355780601501, "schnell": 5000 / 6}[name]
    assert model.process.timesteps(6)[1] == pytest.approx(second, rel=1e-6)


def test_a_shift_of_the_users_takes_the_place_of_the_images(make):
    _, _, folder, _ = make("dev")
    model = load_pipeline(folder, image_size=64, scheduler={"shift": 3.0})
    np.testing.assert_allclose(model.process.timesteps(2), [1000.0, 750.0])
    assert model.lengths == (32, 512) and load_pipeline(folder).latent_shape == (128, 128, 16)


@pytest.mark.parametrize(
    "part, changes, said",
    [
        ("vae", {"latent_channels": 4}, "in_channels=64; wants 4 times the VAE's latent_channels, 4"),
        ("vae", {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}, "latents_mean is not supported"),
        ("text_encoder", {"hidden_size": 32}, "text_encoder gives a vector of width 32; the transformer wants 16"),
        ("text_encoder_2", {"d_model": 40}, "text_encoder_2 gives vectors of width 40; the transformer wants 48"),
        ("transformer", {"num_layers": 1}, "the tensors do not fit the config: "),
        ("scheduler", {"_class_name": "DDIMScheduler"}, "such a model wants FlowMatchEulerDiscreteScheduler"),
        ("tokenizer_2", None, "the subfolder tokenizer_2/ is missing"),
    ],
)
def test_parts_that_do_not_fit(make, tmp_path, part, changes, said):
    folder = shutil.copytree(make("dev")[2], tmp_path / "model")
    if changes is None:
        shutil.rmtree(folder / part)
    else:
        path = next((folder / part).glob("*config.json"))
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError) as error:
        load_pipeline(folder, image_size=64)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_size_that_does_not_fit(make):
    with pytest.raises(InputError, match="image_size 40: wants a multiple of 16 pixels"):
        load_pipeline(make("dev")[2], image_size=40)


# ---- runs


def settings_of(folder):
    return {
        "model.path": str(folder),
        "model.image_size": 64,
        "model.t5_tokens": T5_TOKENS,
        "sampling.steps": 3,
        "sampling.guidance": 3.5,
        "sampling.eta": 0.7,
        "sampling.noise_steps": (0, 2),
        "iterations": 1,
        "batch.samples": 4,
        "batch.samples_per_forward": 4,
        "eval.every": 0,
        "log.images": 0,
    }


def test_no_negative_prompt(make, make_config, tmp_path):
    changes = settings_of(make("dev")[2]) | {"sampling.negative_prompt": "a cat"}
    with pytest.raises(InputError, match="negative_prompt='a cat': the model has its guidance as an input"):
        train.run(make_config("ddpo", changes), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("explore, gradient", [(True, "twopass"), (False, "twopass"), (True, "onepass")])
def test_a_run_of_ddpo(make, make_config, tmp_path, explore, gradient):
    """It re-scores under the very conditioning and guidance that sampled, and learns."""
    changes = settings_of(make("dev")[2]) | {"exploration.enabled": explore, "exploration.threshold_of": "steps"}
    changes |= {"ddpo.updates": 1, "ddpo.gradient": gradient}
    train.run(make_config("ddpo", changes), tmp_path / "run")
    last = read_metrics(tmp_path / "run")[-1]
    assert last["iteration"] == 1 and last["grad_norm"] > 0
    assert abs(last.get("ratio/mean", 1.0) - 1) < 1e-5  # one pass has no other policy


@pytest.mark.slow
def test_grpo_as_it_is_configured(make, tmp_path):
    """Groups, a window of noisy steps, the average that is evaluated by the ODE; where nothing is learnt every ratio of
    recomputed log-probs is exactly 1."""
    for name, lr in (("still", 1e-30), ("learns", 3e-4)):
        config = grpo.get_config("model=flux,reward=jax:sample_rewards:brightness,prompts=animals,explore=true")
        changes = settings_of(make("dev")[2]) | {
            "batch.group": 2,
            "sampling.window": 1,
            "eval.steps": 3,
            "optim.lr": lr,
        }
        changes |= {"iterations": 2, "batch.samples": 8, "ddpo.old_log_prob": "recomputed", "eval.every": 2}
        changes |= {"eval.prompts": ("prompt:a dog",), "eval.rewards": (), "lora.rank": 2}
        config.update_from_flattened_dict(changes)
        train.run(config, tmp_path / name)
    still, learns = (read_metrics(tmp_path / name) for name in ("still", "learns"))
    assert [row["ratio/max_abs_log"] for row in still[1:]] == [0.0, 0.0]
    assert all(row["grad_norm"] > 0 and row["ratio/max_abs_log"] > 0 for row in learns[1:])
    lora_of = [load_file(tmp_path / name / LORA) for name in ("still", "learns")]
    assert any(np.abs(lora_of[0][key] - x).max() > 0 for key, x in lora_of[1].items())


@pytest.mark.slow
def test_a_run_goes_on(make, tmp_path):
    """A stopped run of GRPO and one that was not end alike, with the average; it is evaluated, and planned."""
    config = grpo.get_config("model=flux,reward=jax:sample_rewards:brightness,prompts=animals,explore=true")
    changes = settings_of(make("dev")[2]) | {"batch.group": 2, "sampling.window": 1, "eval.steps": 3, "lora.rank": 2}
    changes |= {"batch.samples": 8, "eval.prompts": ("prompt:a dog",), "eval.rewards": (), "eval.every": 1}
    config.update_from_flattened_dict(changes | {"exploration.iterations": 2, "checkpoint.every": 1})
    for name, lengths in (("whole", [2]), ("stopped", [1, 2])):
        for iterations in lengths:
            config.iterations = iterations
            train.run(config, tmp_path / name)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    images = Evaluator.of_run(tmp_path / "whole").images(PROMPTS)
    assert images.shape == (2, 64, 64, 3) and images.std() > 1
    dry_run.dry_run(checked(config))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["draft", "nft"])
def test_a_run_of_another_method(make, make_config, tmp_path, method):
    changes = settings_of(make("schnell")[2]) | {"sampling.eta": 0.0, "batch.group": 2, "model.remat": "block"}
    train.run(make_config(method, changes), tmp_path / "run")
    last = read_metrics(tmp_path / "run")[-1]
    assert last["iteration"] == 1 and last["grad_norm"] > 0


@pytest.mark.slow
def test_a_run_with_equal_blocks_as_a_loop(make, make_config, tmp_path):
    """A run may go on with it: the same LoRA to rounding, under the same names of layers."""
    settings = settings_of(make("schnell")[2]) | {"sampling.eta": 0.0, "exploration.enabled": False}
    settings |= {"optim.eps": 1.0, "optim.lr": 1.0, "optim.schedule": "constant"}  # no division makes rounding larger
    for name, iterations, scan in (("blocks", 2, "false"), ("loop", 1, "false"), ("loop", 2, "true")):
        changes = settings | {"iterations": iterations, "model.scan_layers": scan}
        train.run(make_config("draft", changes), tmp_path / name)
    found, wanted = (load_file(tmp_path / name / LORA) for name in ("loop", "blocks"))
    assert found.keys() == wanted.keys()
    for key, x in wanted.items():
        np.testing.assert_allclose(found[key], x, rtol=0, atol=1e-5 * np.abs(x).max(), err_msg=key)
