"""Stable Diffusion 1.x, 2.x and XL: tiny pipelines that diffusers makes, saves and runs, against ours."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import base
from diffexp_jax import exploration, parallel, train
from diffexp_jax import sampler as sampler_module
from diffexp_jax.cost import dry_run
from diffexp_jax.errors import InputError
from diffexp_jax.models import lora
from diffexp_jax.pipelines import encode_prompts, families, load_pipeline, make_context, stable_diffusion
from diffexp_jax.run.metrics import read_metrics
from diffexp_jax.sampler import Sampler
from diffexp_jax.settings import parsed
from tests.support.pipelines import FAMILIES, PROMPTS, both_of, pipeline, sampler
from tests.support.published import PUBLISHED


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make("sdxl"): Both, made once."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        return both_of(pipeline(name, folder / "tokens"), folder / "model")

    return make


@pytest.fixture(params=FAMILIES)
def both(request, make):
    return make(request.param)


@pytest.fixture
def sdxl(make, tmp_path):
    """A copy of the SDXL folder that a test may break."""
    return shutil.copytree(make("sdxl").folder, tmp_path / "model")


def close(ours, theirs, relative=1e-4):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= relative * np.abs(theirs).max()


def embeddings(model, texts=PROMPTS):
    cond, cut = encode_prompts(model, texts, chunk=2)
    assert not cut
    empty = jax.tree.map(lambda x: x[0], encode_prompts(model, [""], chunk=2)[0])
    return cond, empty, model.unconditional(empty)


def test_prompt_sets_of_all_sizes_are_encoded_by_one_program(make, compiles):
    model = make("sdxl").ours
    texts = [f"a {animal} riding a bike" for animal in ("dog", "cat", "ant")] * 6
    cond, _ = encode_prompts(model, texts)
    compiled = compiles.count
    for n in (1, 3, 17):
        some, _ = encode_prompts(model, texts[:n])
        jax.tree.map(np.testing.assert_array_equal, some, jax.tree.map(lambda x, n=n: x[:n], cond))
    assert compiles.count == compiled


def test_embeddings_are_diffusers(both):
    theirs, ours = both[:2]
    cond, empty, uncond = embeddings(ours)
    found = theirs.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    wanted = [x.detach().numpy() for x in found]
    close(cond.embedding, wanted[0])
    np.testing.assert_allclose(uncond.embedding, wanted[1][0], atol=1e-4 * np.abs(wanted[0]).max())
    assert np.abs(empty.embedding).min(-1).max() > 0  # Eq. 8's null is the encoders' own
    if len(wanted) == 4:
        close(cond.added[0], wanted[2])
        assert not uncond.embedding.any() and not uncond.added[0].any() and not wanted[3].any()
        np.testing.assert_array_equal(cond.added[1], [[16, 16, 0, 0, 16, 16]] * 2)
        own = theirs.encode_prompt("", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        close(empty.embedding, own[0][0].detach().numpy())
        close(empty.added[0], own[2][0].detach().numpy())
    else:
        np.testing.assert_array_equal(uncond.embedding, empty.embedding)


@pytest.mark.slow  # test_unet.py has the network alone; test_images_are_diffusers has it in each of these pipelines
def test_unet_is_diffusers(both):
    import torch

    theirs, ours = both[:2]
    cond = embeddings(ours)[0]
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    t = np.array([981, 21], np.int32)
    out = jax.jit(ours.denoise)(ours.params, None, x, ours.process.training_row(t), cond)
    added = dict(zip(("text_embeds", "time_ids"), map(torch.tensor, cond.added or ()), strict=bool(cond.added)))
    with torch.no_grad():
        args = torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(cond.embedding)
        want = theirs.unet(*args, added_cond_kwargs=added).sample.permute(0, 2, 3, 1).numpy()
    close(out, want)


def images(both, x_T, guidance, collection=None, uncond=None):
    """10 DDIM steps of PROMPTS."""
    model = both.ours
    t = model.process.timesteps(10)
    steps = model.process.make_steps(t, np.full(10, guidance), eta=0.0)
    cond, _, none = embeddings(model)
    uncond = none if uncond is None else uncond
    context, keys = make_context(cond, uncond), parallel.sample_keys(jax.random.key(0), 2)
    return np.asarray(both.sample(model.params, collection, x_T, context, steps, keys))


# diffusers leaves the unconditional half out at 1
@pytest.mark.parametrize("guidance", [7.5, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "both", [pytest.param(x, marks=[pytest.mark.slow] * (x != "sd15")) for x in FAMILIES], indirect=True
)
def test_images_are_diffusers(both, guidance):
    import torch

    theirs, ours = both[:2]
    x_T = np.random.default_rng(1).standard_normal((2, 8, 8, 4)).astype(np.float32)
    noise = torch.tensor(x_T.transpose(0, 3, 1, 2).copy())
    args = dict(num_inference_steps=10, guidance_scale=guidance, output_type="np")
    want = theirs(PROMPTS, latents=noise, **args).images
    got = images(both, x_T, guidance)
    assert np.abs(got - want).max() <= 2e-3
    assert want.std() > 0.02


@pytest.mark.parametrize("name", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_negative_prompt_is_diffusers(make, name, monkeypatch):
    """Its embedding, pooled too, in place of none or zeros; Eq. 8's null stays that of ""."""
    import torch

    both = make(name)
    monkeypatch.setattr(sampler_module, "load_pipeline", lambda *args, **kwargs: both.ours)
    config, negative = base.default(), "a cat, blurry"
    none = Sampler.build(parsed(config))
    jax.tree.map(np.testing.assert_array_equal, none.uncond, both.ours.unconditional(none.empty))
    config.sampling.negative_prompt = negative
    ours = Sampler.build(parsed(config))
    jax.tree.map(np.testing.assert_array_equal, ours.empty, none.empty)
    options = dict(device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=negative)
    found = both.theirs.encode_prompt(PROMPTS[0], **options)
    wanted = found[1::2] if name == "sdxl" else found[1:2]
    for part, want in zip((ours.uncond.embedding, *(ours.uncond.added or ())[:1]), wanted, strict=True):
        close(part, want[0].detach().numpy())
    x_T = np.random.default_rng(1).standard_normal((2, 8, 8, 4)).astype(np.float32)
    noise = torch.tensor(x_T.transpose(0, 3, 1, 2).copy())
    args = dict(num_inference_steps=10, guidance_scale=7.5, output_type="np")
    want = both.theirs(PROMPTS, negative_prompt=[negative] * 2, latents=noise, **args).images
    got = images(both, x_T, 7.5, uncond=ours.uncond)
    assert np.abs(got - want).max() <= 2e-3 < 0.02 < np.abs(got - images(both, x_T, 7.5)).max()


@pytest.mark.slow
@pytest.mark.parametrize("dtype, most", [(jnp.float16, 4e-3), (jnp.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_images_in_half_precision(make, name, dtype, most):
    """Ten steps from the same noise: a pixel moves by that much at most, on average."""
    both = make(name)
    model = load_pipeline(both.folder, dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(model.params["unet"])} == {jnp.dtype(dtype)}
    x_T = np.random.default_rng(1).standard_normal((2, 8, 8, 4)).astype(np.float32)
    low = images(both._replace(ours=model, sample=sampler(model)), x_T, 5.0)
    assert 1e-6 < np.abs(low.astype(np.float32) - images(both, x_T, 5.0)).mean() <= most


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_lora_goes_to_diffusers_and_back(make, name, tmp_path):
    import torch

    theirs, ours = (both := make(name))[:2]
    rng = np.random.default_rng(2)
    start = lora.init_lora(jax.random.key(0), ours.params["unet"], rank=3)
    collection = jax.tree.map(lambda x: np.asarray(x) + rng.standard_normal(x.shape, np.float32) / 4, start)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    lora.save_lora(file, collection, alpha=1.5)
    x_T = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
    args = dict(num_inference_steps=10, guidance_scale=7.5, output_type="np")
    noise = torch.tensor(x_T.transpose(0, 3, 1, 2).copy())
    try:
        theirs.load_lora_weights(str(tmp_path))
        tuned = theirs(PROMPTS, latents=noise, **args).images
        metadata = theirs.unet.peft_config["default_0"].to_dict()
        from peft import get_peft_model_state_dict

        layers = get_peft_model_state_dict(theirs.unet, adapter_name="default_0")
        theirs.save_lora_weights(tmp_path / "back", layers, unet_lora_adapter_metadata=metadata)
    finally:
        theirs.unload_lora_weights()
    again, scale = lora.load_lora(tmp_path / "back", ours.params["unet"])
    assert scale == 0.5
    jax.tree.map(np.testing.assert_array_equal, again, collection)
    got = images(both, x_T, 7.5, lora.scaled(collection, scale))
    assert np.abs(got - tuned).max() <= 2e-3
    assert np.abs(got - images(both, x_T, 7.5)).max() > 0.01


def test_prompt_weighting_acts_on_both_encoders(both):
    """At the weighted position all of the concatenated embedding moves; the pooled vector is not touched."""
    ours = both.ours
    cond, empty, _ = embeddings(ours)
    weights = np.ones(32, np.float32)
    weights[2] = 1.5
    moved = np.asarray(exploration.reweight_prompt(cond.embedding[0], empty.embedding, weights))
    expected = empty.embedding[2] + 1.5 * (cond.embedding[0, 2] - empty.embedding[2])
    np.testing.assert_allclose(moved[2], expected, rtol=1e-5)
    np.testing.assert_array_equal(np.delete(moved, 2, 0), np.delete(cond.embedding[0], 2, 0))


# ---- full size, from the published configs

COUNTS = {
    "StableDiffusionPipeline": dict(unet=859_520_964, vae=83_653_863, text_encoder=123_060_480),
    "StableDiffusionXLPipeline": dict(
        unet=2_567_463_684, vae=83_653_863, text_encoder=123_060_480, text_encoder_2=694_659_840
    ),
}


@pytest.mark.slow  # test_dry_run.py counts them by default
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_of_the_published_sizes(name):
    config = families.model_config({"_class_name": name}, PUBLISHED[name])
    shapes = stable_diffusion.abstract_params(config)
    assert {part: dry_run.count(tree) for part, tree in shapes.items()} == COUNTS[name]


def test_sdxl_at_its_sizes():
    config = families.model_config({"_class_name": "StableDiffusionXLPipeline"}, PUBLISHED["StableDiffusionXLPipeline"])
    assert config.vae.scaling_factor == 0.13025 and config.zero_uncond
    for size in (512, 768, 1024):
        assert stable_diffusion.build(config, image_size=size).latent_shape == (size // 8, size // 8, 4)
    with pytest.raises(InputError, match="image_size 1020: wants a multiple of 8 pixels"):
        stable_diffusion.build(config, image_size=1020)
    # its VAE overflows in float16, and in nothing else
    kept = {dtype: np.dtype(config.dtype("vae", dtype)).name for dtype in ("float16", "bfloat16", "float32")}
    assert kept == {"float16": "float32", "bfloat16": "bfloat16", "float32": "float32"}


# ---- what does not fit


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, **kwargs):
    with pytest.raises(InputError) as error:
        load_pipeline(folder, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["StableDiffusion3InpaintPipeline", "StableDiffusionInpaintPipeline", None])
def test_another_family(sdxl, name):
    change(sdxl / "model_index.json", _class_name=name)
    shown = "null" if name is None else repr(name)
    said = f"_class_name={shown} is not supported; accepted: StableDiffusionPipeline, StableDiffusionXLPipeline"
    assert said in refused(sdxl)


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_a_missing_part_of_sdxl(sdxl, part):
    shutil.rmtree(sdxl / part)
    assert f"the subfolder {part}/ is missing" in refused(sdxl)


def test_parts_of_different_models(sdxl):
    change(sdxl / "model_index.json", _class_name="StableDiffusionPipeline")
    assert "the UNet wants text embeddings of width 40, text_encoder give 16" in refused(sdxl)
    change(sdxl / "unet" / "config.json", cross_attention_dim=16)
    assert "a StableDiffusionPipeline cannot have addition_time_embed_dim" in refused(sdxl)
    change(sdxl / "model_index.json", _class_name="StableDiffusionXLPipeline")
    change(sdxl / "unet" / "config.json", cross_attention_dim=40, in_channels=9)
    assert "the UNet has 9 input and 4 output channels" in refused(sdxl)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_of_another_vocabulary(sdxl, part):
    path = sdxl / part / "tokenizer.json"
    content = json.loads(path.read_text())
    del content["model"]["merges"][-1]
    token = max(content["model"]["vocab"].items(), key=lambda item: item[1] if "|" not in item[0] else -1)[0]
    del content["model"]["vocab"][token]
    path.write_text(json.dumps(content))
    assert "does not fit" in refused(sdxl) and f"{part} " in refused(sdxl)


def test_a_tokenizer_that_is_too_long(sdxl):
    change(sdxl / "tokenizer_2" / "tokenizer_config.json", model_max_length=77)
    assert "tokenizer_2 does not fit its text encoder: length 77, accepted: to 32" in refused(sdxl)
    change(sdxl / "tokenizer_2" / "tokenizer_config.json", model_max_length=16)
    assert "tokenizer_2 does not fit the first tokenizer" in refused(sdxl)


def test_end_token_of_another_tokenizer(sdxl):
    change(sdxl / "text_encoder_2" / "config.json", eos_token_id=7)
    assert "the end token's id is 719, the encoder's config says 7" in refused(sdxl)


def test_an_sdxl_lora_on_sd15(make, tmp_path):
    collection = lora.init_lora(jax.random.key(0), make("sdxl").ours.params["unet"], rank=2)
    lora.save_lora(tmp_path / "x.safetensors", collection, alpha=2.0)
    with pytest.raises(InputError, match="a LoRA of another model") as error:
        lora.load_lora(tmp_path / "x.safetensors", make("sd15").ours.params["unet"])
    assert "\n" not in str(error.value)


def test_zeros_only_where_the_folder_says_so(sdxl):
    change(sdxl / "model_index.json", force_zeros_for_empty_prompt=False)
    model = load_pipeline(sdxl)
    _, empty, uncond = embeddings(model)
    jax.tree.map(np.testing.assert_array_equal, uncond, empty)


@pytest.mark.slow
def test_a_run_on_sdxl(make, make_config, tmp_path):
    """One iteration of DDPO with exploration: it re-scores under the very conditioning that sampled, and learns."""
    settings = {"model.path": str(make("sdxl").folder), "iterations": 1, "sampling.steps": 2, "ddpo.updates": 1}
    settings |= {"ddpo.gradient": "twopass"}  # which has a ratio
    settings |= {"batch.samples": 4, "batch.samples_per_forward": 4, "eval.every": 0, "log.images": 0}
    train.run(make_config("ddpo", settings), tmp_path / "run")
    last = read_metrics(tmp_path / "run")[-1]
    assert last["iteration"] == 1 and abs(last["ratio/mean"] - 1) < 1e-5 and last["grad_norm"] > 0
    tuned, scale = lora.load_lora(tmp_path / "run", make("sdxl").ours.params["unet"])
    flat = traverse_util.flatten_dict(tuned)
    assert scale == 1.0 and len(flat) == 2 * 4 * 2 * 8  # A and B of 4 projections, 2 attentions, 8 transformer blocks
    assert all(np.abs(x).max() > 0 for x in flat.values())
