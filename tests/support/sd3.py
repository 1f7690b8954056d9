"""Tiny models of Stable Diffusion 3 and 3.5 that diffusers makes, and the published sizes."""

import numpy as np

from tests.support.pipelines import tokenizers
from tests.support.tiny import write_t5_tokenizer

PROMPTS = ["a dog riding a bike", "an ant"]
CLIPS = [dict(hidden_size=16, projection_dim=12), dict(hidden_size=24, projection_dim=16, hidden_act="gelu")]
T5 = dict(d_model=48, d_kv=8, d_ff=24, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
SHAPE = (12, 20, 16)  # of latents
SIZES = dict(sample_size=16, num_layers=3, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=48)
SIZES |= dict(caption_projection_dim=32, pooled_projection_dim=28, pos_embed_max_size=24)
TINY = {
    "sd3-medium": SIZES,
    "sd3.5-medium": SIZES | dict(qk_norm="rms_norm", dual_attention_layers=[0, 1]),
    "sd3.5-large": SIZES | dict(qk_norm="rms_norm"),
}
_DEPTHS = {"sd3-medium": 24, "sd3.5-medium": 24, "sd3.5-large": 38}
PUBLISHED = {
    name: dict(
        sample_size=128,
        num_layers=n,
        num_attention_heads=n,
        caption_projection_dim=64 * n,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=384 if name == "sd3.5-medium" else 192,
        **({} if name == "sd3-medium" else dict(qk_norm="rms_norm")),
        **(dict(dual_attention_layers=list(range(13))) if name == "sd3.5-medium" else {}),
    )
    for name, n in _DEPTHS.items()
}


def transformer(config, noise=0.1):
    """diffusers' network with every parameter away from its first value."""
    import diffusers
    import torch

    torch.manual_seed(0)
    theirs = diffusers.SD3Transformer2DModel(**config).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter += noise * torch.randn_like(parameter)
    return theirs


def inputs(config, shape=SHAPE, n=2, length=9, seed=0):
    """x_t, t, the prompt's tokens and its pooled embedding."""
    rng = np.random.default_rng(seed)
    x_t, text, pooled = (
        rng.standard_normal((n, *size), np.float32)
        for size in (shape, (length, config["joint_attention_dim"]), (config["pooled_projection_dim"],))
    )
    return x_t, np.linspace(961.0, 27.5, n, dtype=np.float32), text, pooled


def channels_first(x):
    import torch

    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy())


def pipeline(name, folder, *, with_t5):
    """diffusers' tiny pipeline of random weights: 8x8x16 latents, 16x16 images, prompts of 32 tokens."""
    import diffusers
    import torch
    import transformers

    network = transformer(TINY[name] | dict(sample_size=8))
    torch.manual_seed(1)
    tokens = tokenizers(folder / "clip", 2)
    sizes = dict(intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=32)
    sizes |= dict(vocab_size=len(tokens[0]), eos_token_id=tokens[0].eos_token_id, initializer_range=0.3)
    clips = [
        transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**sizes | clip)).eval() for clip in CLIPS
    ]
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=16,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, scaling_factor=1.5305,
        shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    t5 = t5_tokenizer = None
    if with_t5:
        write_t5_tokenizer(folder / "t5")
        t5_tokenizer = transformers.T5Tokenizer.from_pretrained(folder / "t5")
        t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(t5_tokenizer), **T5)).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return diffusers.StableDiffusion3Pipeline(
        transformer=network, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=clips[0], tokenizer=tokens[0], text_encoder_2=clips[1], tokenizer_2=tokens[1],
        text_encoder_3=t5, tokenizer_3=t5_tokenizer,
    )  # fmt: skip
