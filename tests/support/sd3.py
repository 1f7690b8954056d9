"""Tiny transformers of Stable Diffusion 3 and 3.5 that diffusers makes, and the published sizes."""

import numpy as np

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
