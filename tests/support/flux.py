"""Tiny models of FLUX.1 that diffusers makes, and the published sizes."""

import numpy as np

from tests.support.pipelines import tokenizers
from tests.support.tiny import write_t5_tokenizer

PROMPTS = ["a dog riding a bike", "an ant"]
SIZES = dict(in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2)
SIZES |= dict(joint_attention_dim=48, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8])
TINY = {"dev": SIZES | dict(guidance_embeds=True), "schnell": SIZES | dict(guidance_embeds=False)}
_WHOLE = dict(num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24, in_channels=64)
_WHOLE |= dict(joint_attention_dim=4096, pooled_projection_dim=768, axes_dims_rope=[16, 56, 56])
PUBLISHED = {"dev": _WHOLE | dict(guidance_embeds=True), "schnell": _WHOLE | dict(guidance_embeds=False)}
SCHEDULERS = {"dev": dict(shift=3.0, use_dynamic_shifting=True), "schnell": dict(shift=1.0)}
T5 = dict(d_model=48, d_kv=8, d_ff=24, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")


def transformer(config, noise=0.1):
    """diffusers' network with every parameter away from its first value."""
    import diffusers
    import torch

    torch.manual_seed(0)
    theirs = diffusers.FluxTransformer2DModel(**config).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter += noise * torch.randn_like(parameter)
    return theirs


def inputs(config, shape=(12, 20, 16), n=2, length=9, seed=0):
    """x_t, t, the prompt's tokens and its pooled embedding, guidance."""
    rng = np.random.default_rng(seed)
    x_t, text, pooled = (
        rng.standard_normal((n, *size), np.float32)
        for size in (shape, (length, config["joint_attention_dim"]), (config["pooled_projection_dim"],))
    )
    return x_t, np.linspace(961.0, 27.5, n, dtype=np.float32), text, pooled, np.linspace(1.0, 0.25, n, dtype=np.float32)


def output(theirs, x_t, t, text, pooled, guidance, *, keep=False):
    """What diffusers' network makes of such inputs, which its pipeline packs.

    `keep`: as a tensor with a gradient; x_t may be one too.
    """
    import torch
    from diffusers import FluxPipeline

    n, h, w, c = x_t.shape
    latents = torch.as_tensor(x_t).permute(0, 3, 1, 2)
    packed = FluxPipeline._pack_latents(latents, n, c, h, w)
    ids = FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, "cpu", torch.float32)
    out = theirs(
        hidden_states=packed,
        encoder_hidden_states=torch.tensor(text),
        pooled_projections=torch.tensor(pooled),
        timestep=torch.tensor(t) / 1000,
        img_ids=ids,
        txt_ids=torch.zeros(text.shape[1], 3),
        guidance=torch.tensor(guidance) if theirs.config.guidance_embeds else None,
    ).sample
    out = FluxPipeline._unpack_latents(out, 8 * h, 8 * w, 8).permute(0, 2, 3, 1)
    return out if keep else out.numpy()


def pipeline(name, folder):
    """diffusers' tiny pipeline of random weights: 8x8x16 latents, 64x64 images, prompts of 32 tokens for CLIP."""
    import diffusers
    import torch
    import transformers

    network = transformer(TINY[name])
    torch.manual_seed(1)
    (tokens,) = tokenizers(folder / "clip", 1)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, projection_dim=12)
    sizes |= dict(vocab_size=len(tokens), eos_token_id=tokens.eos_token_id, max_position_embeddings=32)
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, initializer_range=0.3)).eval()
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=16,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=0.3611,
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    write_t5_tokenizer(folder / "t5")
    t5_tokenizer = transformers.T5Tokenizer.from_pretrained(folder / "t5")
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(t5_tokenizer), **T5)).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return diffusers.FluxPipeline(
        transformer=network, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULERS[name]), vae=vae,
        text_encoder=clip, tokenizer=tokens, text_encoder_2=t5, tokenizer_2=t5_tokenizer,
    )  # fmt: skip
