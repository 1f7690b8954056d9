"""Stable Diffusion 1.x, 2.x and XL: tiny pipelines that diffusers makes, saves and runs, against ours."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import random_weights

from diffexp_jax import InputError, evaluation, exploration, parallel
from diffexp_jax.diffusion import make_steps, timesteps
from diffexp_jax.emoji.tokenizer import write_tokenizer
from diffexp_jax.models import convert, families, lora, stable_diffusion
from diffexp_jax.problem import load_schedule
from diffexp_jax.sampling import rollout

PROMPTS = ["a dog riding a bike", "an ant"]
SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
SD15 |= {"set_alpha_to_one": False, "steps_offset": 1}
ATTENTION = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
ATTENTION |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
FAMILIES = {
    "sd15": (
        "StableDiffusionPipeline",
        dict(attention_head_dim=2, cross_attention_dim=16, **ATTENTION),
        [dict(hidden_size=16, hidden_act="quick_gelu")],
        dict(SD15),
    ),
    "sd2": (
        "StableDiffusionPipeline",
        dict(attention_head_dim=[1, 2], cross_attention_dim=24, use_linear_projection=True, **ATTENTION),
        [dict(hidden_size=24, hidden_act="gelu", projection_dim=10)],
        dict(SD15, prediction_type="v_prediction"),
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        dict(
            attention_head_dim=[1, 2],
            cross_attention_dim=40,
            transformer_layers_per_block=[1, 2],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=6,
            projection_class_embeddings_input_dim=6 * 6 + 12,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        [dict(hidden_size=16, hidden_act="quick_gelu"), dict(hidden_size=24, hidden_act="gelu", projection_dim=12)],
        dict(SD15),
    ),
}


def tokenizers(folder, n):
    """As published: the second tokenizer differs by its padding."""
    from transformers import CLIPTokenizer

    write_tokenizer(folder)
    return [CLIPTokenizer.from_pretrained(folder, **({"pad_token": "!"} if i else {})) for i in range(n)]


def pipeline(name, folder):
    """diffusers' pipeline of random weights."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    kind, unet, text, scheduler = FAMILIES[name]
    tokens = tokenizers(folder, len(text))
    sizes = dict(intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=32)
    sizes |= dict(vocab_size=len(tokens[0]), eos_token_id=tokens[0].eos_token_id, initializer_range=0.3)
    texts = [CLIPTextConfig(**sizes, **more) for more in text]
    parts = {
        "unet": diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **unet
        ),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, scaling_factor=0.5,
        ),
        "text_encoder": CLIPTextModel(texts[0]),
        "tokenizer": tokens[0],
        "scheduler": diffusers.DDIMScheduler(**scheduler),
    }  # fmt: skip
    with torch.no_grad():
        for parameter in [*parts["unet"].parameters(), *parts["vae"].parameters()]:
            parameter += 0.05 * torch.randn_like(parameter)
    if len(texts) > 1:
        return diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=CLIPTextModelWithProjection(texts[1]), tokenizer_2=tokens[1], add_watermarker=False
        )
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """(diffusers' pipeline, our model of its files, the folder)."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp(request.param)
    theirs = pipeline(request.param, folder / "tokens")
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder / "model")
    return theirs, stable_diffusion.load(folder / "model"), folder / "model"


def close(ours, theirs, relative=1e-4):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= relative * np.abs(theirs).max()


def embeddings(model, texts=PROMPTS):
    cond, cut = evaluation.encode_prompts(model, texts, chunk=2)
    assert not cut
    empty = jax.tree.map(lambda x: x[0], evaluation.encode_prompts(model, [""], chunk=2)[0])
    return cond, empty, evaluation.unconditional(model, empty)


def test_embeddings_are_diffusers(both):
    theirs, ours, _ = both
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


def test_unet_is_diffusers(both):
    import torch

    theirs, ours, _ = both
    cond = embeddings(ours)[0]
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    t = np.array([981, 21], np.int32)
    out = jax.jit(ours.unet)(ours.params, None, x, t, cond.embedding, cond.added)
    added = dict(zip(("text_embeds", "time_ids"), map(torch.tensor, cond.added or ()), strict=bool(cond.added)))
    with torch.no_grad():
        args = torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(cond.embedding)
        want = theirs.unet(*args, added_cond_kwargs=added).sample.permute(0, 2, 3, 1).numpy()
    close(out, want)


def images(model, x_T, guidance, collection=None):
    """10 DDIM steps of PROMPTS."""
    schedule = load_schedule(model)
    t = timesteps(schedule, 10)
    steps = make_steps(schedule, t, np.full(10, guidance), eta=0.0)
    cond, _, uncond = embeddings(model)
    keys = parallel.sample_keys(jax.random.key(0), 2)

    @jax.jit
    def sample(params, collection, context):
        denoise = evaluation.denoiser(model, {"model": params}, collection)
        x_0, _ = rollout(denoise, x_T, context, steps, keys, prediction_type=schedule.prediction_type)
        return model.decode(params, x_0).clip(0.0, 1.0)

    return np.asarray(sample(model.params, collection, evaluation.make_context(cond, uncond)))


@pytest.mark.parametrize("guidance", [7.5, 1.0])  # diffusers leaves the unconditional half out at 1
def test_images_are_diffusers(both, guidance):
    import torch

    theirs, ours, _ = both
    x_T = np.random.default_rng(1).standard_normal((2, 8, 8, 4)).astype(np.float32)
    noise = torch.tensor(x_T.transpose(0, 3, 1, 2).copy())
    args = dict(num_inference_steps=10, guidance_scale=guidance, output_type="np")
    want = theirs(PROMPTS, latents=noise, **args).images
    got = images(ours, x_T, guidance)
    assert np.abs(got - want).max() <= 2e-3
    assert want.std() > 0.02


def test_lora_goes_to_diffusers_and_back(both, tmp_path):
    import torch

    theirs, ours, _ = both
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
    got = images(ours, x_T, 7.5, lora.scaled(collection, scale))
    assert np.abs(got - tuned).max() <= 2e-3
    assert np.abs(got - images(ours, x_T, 7.5)).max() > 0.01


def test_prompt_weighting_acts_on_both_encoders(both):
    """At the weighted position all of the concatenated embedding moves; the pooled vector is not touched."""
    _, ours, _ = both
    cond, empty, _ = embeddings(ours)
    weights = np.ones(32, np.float32)
    weights[2] = 1.5
    moved = np.asarray(exploration.reweight_prompt(cond.embedding[0], empty.embedding, weights))
    expected = empty.embedding[2] + 1.5 * (cond.embedding[0, 2] - empty.embedding[2])
    np.testing.assert_allclose(moved[2], expected, rtol=1e-5)
    np.testing.assert_array_equal(np.delete(moved, 2, 0), np.delete(cond.embedding[0], 2, 0))
