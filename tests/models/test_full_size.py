"""The published size of Stable Diffusion 1.5, random weights, one forward pass against PyTorch. Minutes, and 20 GiB."""

import gc
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax.formats import convert, files
from diffexp_jax.models import clip, clip_files, unet
from tests.support.published import PUBLISHED, SD15

pytestmark = pytest.mark.slow


def peak_gib():
    """Of this process since it started."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def moved(model):
    """Norms and biases, which start at 1 and 0, count too."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def test_unet(tmp_path):
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    theirs = moved(UNet2DConditionModel(**SD15))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 64, 64, 4)).astype(np.float32)
    context = rng.standard_normal((1, 77, 768)).astype(np.float32)
    with torch.no_grad():
        want = theirs(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(501), torch.tensor(context)).sample
        want = want.permute(0, 2, 3, 1).numpy()
    theirs.save_pretrained(tmp_path)
    del theirs
    gc.collect()
    ours, inputs = unet.UNet(unet.UNetConfig.from_dict(SD15)), (jnp.asarray(x), jnp.int32(501), jnp.asarray(context))
    shapes = convert.abstract_params(ours, *inputs)
    params = convert.from_torch(files.open_weights(tmp_path), shapes, where=str(tmp_path))
    out = jax.jit(ours.apply)({"params": params}, *inputs)
    assert np.abs(out - want).max() <= 1e-3 * np.abs(want).max()
    assert peak_gib() < 20


def test_text_encoder(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = next(iter(PUBLISHED.values()))["text_encoder"]
    theirs = moved(CLIPTextModel(CLIPTextConfig(**sizes)))
    ids = np.random.default_rng(0).integers(0, 49408, (2, 77)).astype(np.int32)
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).last_hidden_state.numpy()
    theirs.save_pretrained(tmp_path)
    ours = clip.TextTransformer(clip.CLIPTextConfig.from_dict(sizes))
    tensors = clip_files.canonical_text_names(files.open_weights(tmp_path))
    params = convert.from_torch(tensors, convert.abstract_params(ours, jnp.asarray(ids)), where=str(tmp_path))
    out = jax.jit(ours.apply)({"params": params}, jnp.asarray(ids)).last_hidden_state
    assert np.abs(out - want).max() <= 1e-3 * np.abs(want).max()
    assert peak_gib() < 20
