"""What the tests of the reward models share: scores and gradients against torch."""

import jax
import numpy as np
import torch

from diffexp_jax.rewards import preprocess


def perturbed(model: torch.nn.Module, size: float = 0.1) -> torch.nn.Module:
    """The model with noise on every tensor: biases and norms that matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def torch_pixels(images):
    """[N,3,H,W] with a gradient, and the same normalised."""
    raw = torch.tensor(images.transpose(0, 3, 1, 2)).requires_grad_()
    mean, std = (torch.tensor(x)[:, None, None] for x in (preprocess.CLIP_MEAN, preprocess.CLIP_STD))
    return raw, (raw - mean) / std


def assert_same_score_and_gradient(reward, images, texts, raw, expected):
    """Scores within 1e-4 of the largest, gradients with respect to the images within 1e-3."""
    tokens = reward.tokenize(texts)
    score = jax.jit(reward.score)
    scores, _ = score(reward.params, images, tokens)
    np.testing.assert_allclose(scores, expected.detach(), atol=1e-4 * expected.abs().max().item(), rtol=0)
    (theirs,) = torch.autograd.grad(expected.sum(), raw)
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    ours = jax.jit(jax.grad(lambda x: score(reward.params, x, tokens)[0].sum()))(images)
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max(), rtol=0)
