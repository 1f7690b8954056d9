"""LAION's aesthetic predictor (Schuhmann 2022, v2): a small head on CLIP's image embedding; no prompts."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from diffexp_jax.formats import convert, files, pickles
from diffexp_jax.models import clip, clip_files, sizes
from diffexp_jax.models.blocks import OF_ENCODERS
from diffexp_jax.rewards.preprocess import CLIP, Statistics, clip_pixels, floor_half, official_crop, round_half
from diffexp_jax.rewards.processor import statistics
from diffexp_jax.rewards.reward import SHIPPED, Builtin, Reward, no_tokens, of_pixels

# The linear layers among the entries of LAION's nn.Sequential; the entries between them are dropout.
LAYERS = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")


def load(path: Path, *, clip_folder: Path | None = None, dtype: DTypeLike = jnp.float32) -> Reward:
    """The predicted rating of a picture, from 1 to 10.

    Args:
      path: the head: LAION's .pth or the same as safetensors, under the published names ("layers.0.weight", ...); or
        a folder with one such file; or the folder of a predictor in transformers' format, head and CLIP in one.
      clip_folder: the CLIPModel whose embeddings the head was trained on; default: `clip/` beside the head, or the
        head's own folder if it holds a config.json.
      dtype: of CLIP's weights and arithmetic; the head is float32.

    Raises:
      InputError: a file is missing, broken or refused, or the tensors do not fit.
    """
    folder, tensors = _open_head(path)
    whole = any(name.startswith("vision_model.") for name in tensors)  # transformers' format
    if clip_folder is None:
        clip_folder = folder if (folder / "config.json").is_file() else folder / "clip"
    model, clip_params = clip_files.load_image_tower(clip_folder, tensors if whole else None, dtype=dtype)
    if whole:
        tensors = files.Renamed(tensors, lambda name: name if name.startswith("layers.") else None)
    shapes = head_shapes(_widths(tensors, model.config.projection_dim))
    head = convert.from_torch(tensors, shapes, where=str(path))
    start = floor_half if whole else round_half  # whose processor it is used with
    by = statistics(clip_folder, model.config.vision.image_size)
    return build(model, {"clip": clip_params, "head": head}, start=start, by=by)


def build(model: clip.CLIP, params: Any, *, start: Callable = round_half, by: Statistics = CLIP) -> Reward:
    """The reward of such an image tower and head; `params` may be shapes."""
    size = model.config.vision.image_size

    def score_prepared(
        params, pixels: Float[Array, "B H W 3"], tokens: Int[Array, "B 0"]
    ) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
        return rating(params["head"], embed(params, pixels)), {}

    def embed(params, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B P"]:
        return model.apply({"params": params["clip"]}, pixels, method="embed_image")

    return of_pixels(
        params,
        tokenize=no_tokens,
        pixels=partial(clip_pixels, size=size, start=start, by=by),
        prepare=partial(official_crop, size=size, start=start, by=by),
        score_prepared=score_prepared,
        embed=embed,
        blocks=OF_ENCODERS,
    )


def rating(head: Mapping[str, Any], features: Float[Array, "B P"]) -> Float[Array, " B"]:
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


def _open_head(path: Path) -> tuple[Path, Mapping[str, np.ndarray]]:
    """The folder where the head is, and its tensors. A pickle comes before safetensors: beside it, these are CLIP's."""
    if not path.is_dir():
        return path.parent, pickles.open_checkpoint(path)
    heads = sorted(file for file in path.iterdir() if file.suffix in (".pth", ".pt"))
    if heads:
        return path, pickles.open_checkpoint(files.only_file(path, (".pth", ".pt")))
    if (pickled := path / "pytorch_model.bin").is_file() and not list(path.glob("*.safetensors*")):
        return path, pickles.open_checkpoint(pickled)
    return path, files.open_weights(path)


def _widths(tensors: Mapping[str, np.ndarray], embedding: int) -> list[int]:
    """A head file's widths; 1 in place of a missing layer (of which `from_torch` complains)."""
    biases = [f"{name}.bias" for name in LAYERS[:-1]]
    return [embedding, *(tensors[name].shape[0] if name in tensors else 1 for name in biases), 1]


# ------------------------------------------------------------------------------------------------------------ built in

WIDTHS = (768, 1024, 128, 64, 16, 1)  # of LAION's head, from CLIP L/14's embedding to the rating


def shapes(dtype: DTypeLike) -> Reward:
    """The published one, without its weights."""
    model, params = clip_files.shapes(sizes.CLIP_L14, dtype)
    tower = {part: params[part] for part in ("vision_model", "visual_projection", "logit_scale")}
    return build(model, {"clip": tower, "head": head_shapes(WIDTHS)})


# The weight in a sum is DRaFT's (Clark et al. 2024) and PRDP's (Deng et al. 2024).
BUILTINS = {
    "aesthetic": Builtin(
        "LAION's aesthetic score of the picture alone, about 1 to 10", load, shapes=shapes, weight=0.05, target=10.0
    ),
    "emoji_aesthetic": Builtin(
        "an aesthetic score of the emoji world, which prefers one of the emoji world's two art styles",
        partial(load, clip_folder=SHIPPED / "reward_clip"),
        SHIPPED / "aesthetic",
        weight=0.05,
    ),
}
