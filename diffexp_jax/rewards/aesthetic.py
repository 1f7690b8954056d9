"""LAION's aesthetic predictor (Schuhmann 2022, v2): a small head on CLIP's image embedding; no prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from diffexp_jax.models import clip, convert, files
from diffexp_jax.rewards.preprocess import clip_pixels
from diffexp_jax.rewards.reward import Reward

# The linear layers among the entries of LAION's nn.Sequential; the entries between them are dropout.
LAYERS = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")

_IMAGE_PARTS = (
    "vision_model",
    "visual_projection",
    "logit_scale",
)  # of CLIP: the text tower need not be kept


def load(folder: Path, *, clip_folder: Path | None = None, dtype: DTypeLike = jnp.float32) -> Reward:
    """The predicted rating of a picture, from 1 to 10.

    Args:
      folder: holds the head as model.safetensors, under the published names ("layers.0.weight", ...).
      clip_folder: the CLIPModel whose embeddings the head was trained on; default: `clip/` in `folder`.
      dtype: of CLIP's weights and arithmetic; the head is float32.

    Raises:
      InputError: a file is missing or broken, or the tensors do not fit.
    """
    model, params = clip.load(clip_folder or folder / "clip", dtype=dtype)
    tensors = files.open_weights(folder)
    shapes = head_shapes(_widths(tensors, model.config.projection_dim))
    head = convert.from_torch(tensors, shapes, where=str(folder))

    def score(
        params, images: Float[Array, "B H W 3"], tokens: Int[Array, "B 0"]
    ) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
        pixels = clip_pixels(images, model.config.vision.image_size)
        features = model.apply({"params": params["clip"]}, pixels, method="embed_image")
        return rate(params["head"], features), {}

    def tokenize(texts: Sequence[str]) -> Int[np.ndarray, "B 0"]:
        return np.zeros((len(texts), 0), np.int32)

    return Reward({"clip": {part: params[part] for part in _IMAGE_PARTS}, "head": head}, tokenize, score)


def rate(head: Mapping[str, Any], features: Float[Array, "B P"]) -> Float[Array, " B"]:
    """The head: five linear layers on the unit-length embedding, without activations (as published)."""
    x = clip.unit(features)
    for name in LAYERS:
        x = x @ head[name]["kernel"] + head[name]["bias"]
    return x[:, 0]


def head_shapes(widths: Sequence[int]) -> dict[str, Any]:
    """The parameter tree of a head with these six widths, from the embedding's to 1, as shapes."""

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    pairs = zip(LAYERS, widths[:-1], widths[1:], strict=True)
    return {name: {"kernel": shape(before, after), "bias": shape(after)} for name, before, after in pairs}


def _widths(tensors: Mapping[str, np.ndarray], embedding: int) -> list[int]:
    """A head file's widths; 1 in place of a missing layer (of which `from_torch` complains)."""
    biases = [f"{name}.bias" for name in LAYERS[:-1]]
    return [embedding, *(tensors[name].shape[0] if name in tensors else 1 for name in biases), 1]
