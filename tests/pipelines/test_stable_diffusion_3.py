"""Stable Diffusion 3 and 3.5: tiny pipelines that diffusers makes, saves and runs, against ours."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from diffexp_jax import exploration, parallel, train
from diffexp_jax.cost import dry_run
from diffexp_jax.errors import InputError
from diffexp_jax.evaluator import Evaluator
from diffexp_jax.models import lora
from diffexp_jax.pipelines import encode_prompts, load_pipeline, make_context, stable_diffusion_3
from diffexp_jax.prompts import PromptSet
from diffexp_jax.run.metrics import read_metrics
from diffexp_jax.settings import checked
from tests.support.pipelines import both_of, saved_lora
from tests.support.sd3 import PROMPTS, TINY, channels_first, pipeline

T5_TOKENS = 16
N_STEPS = 10


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make("sd3.5-medium", with_t5=True): Both, made once."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")

    @functools.cache
    def make(name, with_t5=True):
        folder = tmp_path_factory.mktemp(name)
        theirs = pipeline(name, folder / "tokens", with_t5=with_t5)
        return both_of(theirs, folder / "model", t5_tokens=T5_TOKENS)

    return make


@pytest.fixture
def folder(make, tmp_path):
    """A copy of a folder that a test may break."""
    return shutil.copytree(make("sd3.5-medium").folder, tmp_path / "model")


def close(ours, theirs, relative=1e-4):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= relative * np.abs(theirs).max()


def noise():
    return np.random.default_rng(1).standard_normal((2, 8, 8, 16)).astype(np.float32)


def our_images(both, guidance, collection=None):
    model = both.ours
    steps = model.process.make_steps(model.process.timesteps(N_STEPS), np.full(N_STEPS, guidance), eta=0.0)
    cond, empty = (encode_prompts(model, texts, chunk=2)[0] for texts in (PROMPTS, [""]))
    context = make_context(cond, model.unconditional(jax.tree.map(lambda x: x[0], empty)))
    keys = parallel.sample_keys(jax.random.key(0), 2)
    return np.asarray(both.sample(model.params, collection, noise(), context, steps, keys))


def their_images(both, guidance):
    return both.theirs(
        PROMPTS,
        latents=channels_first(noise()),
        num_inference_steps=N_STEPS,
        guidance_scale=guidance,
        max_sequence_length=T5_TOKENS,
        output_type="np",
    ).images


FAST = {("sd3.5-medium", True)}


@pytest.mark.parametrize(
    "name, with_t5",
    [
        pytest.param(name, t5, marks=[] if (name, t5) in FAST else pytest.mark.slow)
        for name in TINY
        for t5 in (True, False)
    ],
)
def test_embeddings_and_images_are_diffusers(make, name, with_t5):
    """With and without the third encoder, whose place zeros take; diffusers leaves the null half out at guidance 1."""
    both = make(name, with_t5)
    theirs, ours = both[:2]
    options = dict(prompt_2=None, prompt_3=None, device="cpu", max_sequence_length=T5_TOKENS)
    found = theirs.encode_prompt(PROMPTS, **options)
    for texts, joint, pooled in ((PROMPTS, found[0], found[2]), ([""], found[1][:1], found[3][:1])):
        cond, cut = encode_prompts(ours, texts, chunk=2)
        assert not cut and (cond.t5 is not None) == with_t5
        close(cond.pooled, pooled.detach().numpy())
        joint = joint.detach().numpy()
        close(cond.clip, joint[:, :32, :40])
        assert joint.shape == (len(texts), 32 + T5_TOKENS, 48) and not joint[:, :32, 40:].any()
        if with_t5:
            close(cond.t5, joint[:, 32:])
        else:
            assert not joint[:, 32:].any()
    for guidance in (7.0, 1.0):
        want = their_images(both, guidance)
        assert np.abs(our_images(both, guidance) - want).max() <= 2e-3
        assert want.std() > 0.02


def test_prompt_weighting_acts_on_all_tokens_of_a_word(make):
    """Eq. 8 by spans of the text: CLIP's and T5's tokens of the word; the pooled embedding stays."""
    ours = make("sd3.5-medium").ours
    prompts = PromptSet("two", ("a dog riding a bike",), ((),))
    units = ours.units(prompts, "word")
    assert units.shape == (1, 32 + T5_TOKENS) and units.max() == 5
    weights = np.where(units[0] == 2, 1.5, 1.0).astype(np.float32)  # "dog"
    pieces = ours.units_of_text(prompts.texts[0], units[0])
    assert [text for text, unit in pieces if unit == 2] == ["dog"]
    cond, null = (
        jax.tree.map(lambda x: x[0], encode_prompts(ours, texts, chunk=2)[0]) for texts in (prompts.texts, [""])
    )
    moved = ours.reweight(cond, null, weights)
    for tokens, own, none, of in (
        (moved.clip, cond.clip, null.clip, weights[:32]),
        (moved.t5, cond.t5, null.t5, weights[32:]),
    ):
        assert (of != 1.0).any()
        np.testing.assert_array_equal(np.abs(tokens - own).max(1) > 0, of != 1.0)
        np.testing.assert_allclose(tokens, none + of[:, None] * (own - none), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(moved.pooled, cond.pooled)
    without = make("sd3-medium", False).ours
    assert without.units(prompts, "word").shape == (1, 32)


def test_a_prompt_of_no_encoder_is_weighted_alone(make):
    ours = make("sd3-medium", False).ours
    cond, null = (jax.tree.map(lambda x: x[0], encode_prompts(ours, [text], chunk=2)[0]) for text in ("a dog", ""))
    weights = np.linspace(0.5, 2.0, 32, dtype=np.float32)
    moved = ours.reweight(cond, null, weights)
    assert moved.t5 is None
    whole = np.asarray(stable_diffusion_3.joined(jax.tree.map(lambda x: x[None], cond), 48, T5_TOKENS))
    assert whole.shape == (1, 32 + T5_TOKENS, 48) and not whole[:, 32:].any() and not whole[..., 40:].any()
    np.testing.assert_array_equal(whole[0, :32, :40], cond.clip)
    np.testing.assert_array_equal(moved.clip, exploration.reweight_prompt(cond.clip, null.clip, weights))


@pytest.mark.slow  # ten seconds each; test_lora_of_transformers.py has the names and the header
@pytest.mark.parametrize("name", ["sd3.5-medium", "sd3-medium"])
def test_lora_goes_to_diffusers_and_back(make, name, tmp_path):
    pytest.importorskip("peft")
    theirs, ours = (both := make(name))[:2]
    collection = saved_lora(ours, tmp_path, ["attention", "feed_forward"])
    try:
        theirs.load_lora_weights(str(tmp_path))
        tuned = their_images(both, 7.0)
        from peft import get_peft_model_state_dict

        metadata = theirs.transformer.peft_config["default_0"].to_dict()
        layers = get_peft_model_state_dict(theirs.transformer, adapter_name="default_0")
        theirs.save_lora_weights(tmp_path / "back", layers, transformer_lora_adapter_metadata=metadata)
    finally:
        theirs.unload_lora_weights()
    again, scale = lora.load_lora(tmp_path / "back", ours.base, prefix=ours.lora_prefix)
    assert scale == 0.5
    jax.tree.map(np.testing.assert_array_equal, again, collection)
    got = our_images(both, 7.0, lora.scaled(collection, scale))
    assert np.abs(got - tuned).max() <= 2e-3
    assert np.abs(got - our_images(both, 7.0)).max() > 0.01


# ---- sizes


def test_another_size_takes_the_middle_of_the_table(make, folder):
    """Of a file's 24 x 24 places an image of 16 pixels has the middle 4 x 4, one of 32 the middle 8 x 8."""
    table = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")["pos_embed.pos_embed"]
    square = table.reshape(24, 24, 32)
    for size in (16, 32):
        model = load_pipeline(folder, image_size=size, t5_tokens=T5_TOKENS)
        assert model.latent_shape == (size // 2, size // 2, 16)
        first, last = 12 - size // 8, 12 + size // 8
        middle = square[first:last, first:last].reshape(1, -1, 32)
        np.testing.assert_array_equal(model.base["pos_embed"]["pos_embed"], middle)
    for size, said in ((18, "image_size 18"), (100, "image_size 100")):
        with pytest.raises(InputError, match=f"{said}: wants a multiple of 4 pixels, at most 96"):
            load_pipeline(folder, image_size=size)
    change(folder / "transformer" / "config.json", sample_size=7)
    assert "transformer/config.json: sample_size=7: wants a multiple" in refused(folder)


@pytest.mark.slow  # a minute to trace
@pytest.mark.parametrize(
    "name, transformer",
    [
        ("stable-diffusion-3-medium-diffusers", 2_028_328_000),
        ("stable-diffusion-3.5-medium", 2_243_171_520),
        ("stable-diffusion-3.5-large", 8_056_627_520),
    ],
)
def test_published_sizes(name, transformer):
    """Without files: every part's parameters, at 512 pixels; in float16 T5 stays in float32."""
    model = load_pipeline(f"stabilityai/{name}", weights=False, image_size=512, dtype=np.float16)
    counts = {part: dry_run.count(tree) for part, tree in model.params.items()}
    table = 32**2 * model.base["pos_embed"]["pos_embed"].shape[-1]
    assert abs(counts["transformer"] - table - transformer) < 1e6
    assert counts["text_encoder"] == 123_650_304 and counts["text_encoder_2"] == 694_659_840
    assert counts["text_encoder_3"] == 4_762_310_656 and abs(counts["vae"] - 83.8e6) < 1e5
    assert model.latent_shape == (64, 64, 16) and model.lengths == (77, 77, 256)
    kinds = {part: {x.dtype.name for x in jax.tree.leaves(tree)} for part, tree in model.params.items()}
    assert kinds == {part: {"float32" if part == "text_encoder_3" else "float16"} for part in kinds}


# ---- what does not fit


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, **kwargs):
    with pytest.raises(InputError) as error:
        load_pipeline(folder, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_without_the_third_encoder(folder):
    shutil.rmtree(folder / "text_encoder_3")
    assert "text_encoder_3/ is missing" in (said := refused(folder)) and "or null for text_encoder_3" in said
    change(folder / "model_index.json", text_encoder_3=[None, None])
    assert load_pipeline(folder).lengths == (32, 32)


@pytest.mark.parametrize(
    "part, changes, said",
    [
        ("vae", {"latent_channels": 4}, "the transformer has 16 channels, the VAE's latents 4"),
        ("vae", {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}, "latents_mean is not supported"),
        ("text_encoder", {"hidden_size": 32}, "width 56 of both CLIPs, 48 of text_encoder_3; the transformer wants 48"),
        ("text_encoder_3", {"d_model": 40}, "width 40 of both CLIPs, 40 of text_encoder_3; the transformer wants 48"),
        ("text_encoder_2", {"projection_dim": 12}, "have width 24; the transformer wants 28 (pooled_projection_dim)"),
        ("transformer", {"pos_embed_max_size": 16}, "is (1, 576, 32), the config wants (1, 256, 32)"),
        ("transformer", {"num_layers": 2}, "the tensors do not fit the config: "),
    ],
)
def test_parts_that_do_not_fit(folder, part, changes, said):
    change(folder / part / "config.json", **changes)
    assert said in refused(folder)


def test_t5_tokens_are_of_models_with_t5(tiny_model):
    assert refused(tiny_model, t5_tokens=128) == "model.t5_tokens=128: the model has no T5; wants None"


# ---- runs


@pytest.fixture
def settings(make):
    return {
        "model.path": str(make("sd3.5-medium").folder),
        "model.t5_tokens": T5_TOKENS,
        "sampling.steps": 3,
        "sampling.eta": 0.7,
        "iterations": 1,
        "batch.samples": 4,
        "batch.samples_per_forward": 4,
        "eval.every": 0,
        "log.images": 0,
    }


@pytest.mark.slow
@pytest.mark.parametrize("explore, gradient", [(True, "twopass"), (False, "twopass"), (True, "onepass")])
def test_a_run_of_ddpo(make, make_config, tmp_path, settings, explore, gradient):
    """It re-scores under the very conditioning that sampled, and learns."""
    settings |= {"ddpo.updates": 1, "ddpo.gradient": gradient, "exploration.enabled": explore}
    train.run(make_config("ddpo", settings), tmp_path / "run")
    last = read_metrics(tmp_path / "run")[-1]
    assert last["iteration"] == 1 and last["grad_norm"] > 0
    assert abs(last.get("ratio/mean", 1.0) - 1) < 1e-5  # one pass has no other policy
    model = make("sd3.5-medium").ours
    tuned, scale = lora.load_lora(tmp_path / "run", model.base, prefix=model.lora_prefix)
    flat = traverse_util.flatten_dict(tuned)
    assert scale == 1.0 and len(flat) == 2 * (8 + 8 + 7)  # A and B of both streams; the last block has no to_add_out
    images = Evaluator.of_run(tmp_path / "run").images(PROMPTS)
    assert images.shape == (2, 16, 16, 3) and images.std() > 1
    untrained = {".".join(path) for path, x in flat.items() if not np.abs(x).max()}
    assert untrained == {"transformer_blocks.2.attn.add_q_proj.B"}  # nobody reads what the prompt's tokens ask there


@pytest.mark.slow
def test_a_run_goes_on(make_config, tmp_path, settings):
    """A stopped run and one that was not end alike; and what a dry run says of it."""
    settings |= {"exploration.iterations": 2}  # else a run that is made longer keeps the shorter one's
    for name, lengths in (("whole", [2]), ("stopped", [1, 2])):
        for iterations in lengths:
            train.run(make_config("ddpo", settings | {"iterations": iterations}), tmp_path / name)
    whole, stopped = (read_metrics(tmp_path / name)[-1] for name in ("whole", "stopped"))
    assert {key: stopped[key] for key in ("iteration", "loss", "grad_norm", "reward/mean")} == {
        key: whole[key] for key in ("iteration", "loss", "grad_norm", "reward/mean")
    }
    dry_run.dry_run(checked(make_config("ddpo", settings)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prdp", "entropy", "seiko"])
def test_a_run_with_a_chain_of_noise(make_config, tmp_path, settings, method):
    """The untuned model's log-probs, or its means, or those of a round's first model, beside a chain of flow steps."""
    settings |= {"batch.group": 2, "prdp.inner_epochs": 2, "iterations": 2, "exploration.enabled": True}
    settings |= {"seiko.updates": 1, "seiko.inner_epochs": 2, "seiko.fit_epochs": 2, "seiko.truncation_k": 1}
    settings |= {"optim.lr": 0.01, "optim.eps": 1e-8} if method == "seiko" else {}  # its KL is of one update
    train.run(make_config(method, settings), tmp_path / "run")
    first, last = read_metrics(tmp_path / "run")[1:]
    before = 0.0 if method == "seiko" else first["kl/path"]  # of a round's last update
    assert abs(before) < 1e-5 < last["kl/path"] and last["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["draft", "alignprop"])
@pytest.mark.parametrize("explore", [True, False])
def test_a_run_that_follows_the_rewards_gradient(make_config, tmp_path, settings, method, explore):
    settings |= {"exploration.enabled": explore, "sampling.eta": 0.0, "model.remat": "block"}
    train.run(make_config(method, settings), tmp_path / "run")
    last = read_metrics(tmp_path / "run")[-1]
    assert last["iteration"] == 1 and last["grad_norm"] > 0
