"""HPSv2 (Wu et al. 2023), v2.0 and v2.1: the cosine of image and prompt to a CLIP tuned on people's choices."""

from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from diffexp_jax.formats import tokenizers
from diffexp_jax.formats.files import only_file
from diffexp_jax.formats.pickles import SUFFIXES
from diffexp_jax.models import clip, clip_files, open_clip, sizes
from diffexp_jax.models.blocks import OF_ENCODERS
from diffexp_jax.rewards.preprocess import CLIP, Statistics, normalise, official_pad, resize_and_pad
from diffexp_jax.rewards.processor import statistics
from diffexp_jax.rewards.reward import Builtin, Cutting, Reward, Tokenize, of_pixels, zero_tokens


def load(path: Path, *, dtype: DTypeLike = jnp.float32) -> Reward:
    """cos(image, text): about 0.2 to 0.35 with the published weights (tables print it times 100).

    v2.0 and v2.1 are different weights; their scores are not comparable. Images are made square by black borders, not
    by a crop, as the published scoring does (`img_score.py`; antialiased, as torchvision does it since 0.17).

    Args:
      path: the checkpoint in open_clip's format (HPS_v2_compressed.pt, HPS_v2.1_compressed.pt), or its folder; or the
        folder of the same as transformers' CLIPModel. CLIP's vocabulary lies beside it, see `tokenizers.open_clip`.
      dtype: of the weights and of the network's arithmetic.

    Raises:
      InputError: a file is missing, broken or refused, or the tensors do not fit the sizes.
    """
    folder, by = path if path.is_dir() else path.parent, CLIP
    if path.is_dir() and (path / "config.json").is_file():
        model, params = clip_files.load(path, dtype=dtype)
        by = statistics(path, model.config.vision.image_size)
    else:
        file = only_file(path, (*SUFFIXES, ".safetensors")) if path.is_dir() else path
        model, params = open_clip.load(file, dtype=dtype)
    text = model.config.text
    encode = tokenizers.open_clip(folder, length=text.max_position_embeddings, size=text.vocab_size)
    return build(model, params, Cutting(encode), by)


def build(model: clip.CLIP, params: Any, tokenize: Tokenize, by: Statistics = CLIP) -> Reward:
    """The reward of such a CLIP; `params` may be shapes."""
    size = model.config.vision.image_size

    def score_prepared(
        params, pixels: Float[Array, "B H W 3"], ids: Int[Array, "B L"]
    ) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
        text, image, _ = model.apply({"params": params}, ids, pixels)
        return (clip.unit(text) * clip.unit(image)).sum(-1), {}

    return of_pixels(
        params,
        tokenize=tokenize,
        pixels=lambda images: normalise(resize_and_pad(images, size), by),
        prepare=partial(official_pad, size=size, by=by),
        score_prepared=score_prepared,
        embed=lambda params, pixels: model.apply({"params": params}, pixels, method="embed_image"),
        text_features=lambda params, ids: model.apply({"params": params}, ids, method="embed_text"),
        blocks=OF_ENCODERS,
    )


def shapes(dtype: DTypeLike) -> Reward:
    """The published one, without its weights."""
    return build(*clip_files.shapes(sizes.CLIP_H14, dtype), zero_tokens(77))


# The weight in a sum is DRaFT's (Clark et al. 2024) and PRDP's (Deng et al. 2024).
BUILTINS = {
    "hpsv2": Builtin(
        "HPS v2.1 or v2.0: a CLIP tuned on people's choices (Wu et al. 2023)", load, shapes=shapes, weight=2.0
    )
}
