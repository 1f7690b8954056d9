"""ImageReward (Xu et al. 2023): a BLIP that reads prompt and image together, tuned on people's rankings."""

from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from diffexp_jax.formats import convert, tokenizers
from diffexp_jax.formats.files import only_file
from diffexp_jax.formats.pickles import SUFFIXES
from diffexp_jax.models import blip
from diffexp_jax.models.blocks import OF_ENCODERS
from diffexp_jax.rewards.preprocess import clip_pixels, official_crop, round_half
from diffexp_jax.rewards.reward import Builtin, Cutting, Reward, Tokenize, of_pixels, zero_tokens

# Mean and deviation of the network's output on the training set: published scores are normalised by them.
MEAN, STD = 0.16717362830052426, 1.0333394966054072

LENGTH = 35  # tokens of a prompt


def load(path: Path, *, dtype: DTypeLike = jnp.float32) -> Reward:
    """The network's output, normalised: about -2 to 2 with the published weights.

    Args:
      path: ImageReward.pt or its folder, where med_config.json may lie, and bert-base-uncased's vocab.txt must.
      dtype: of the weights and of the network's arithmetic.

    Raises:
      InputError: a file is missing, broken or refused, or the tensors do not fit the sizes.
    """
    file = only_file(path, (*SUFFIXES, ".safetensors")) if path.is_dir() else path
    model, params = blip.load(file, dtype=dtype)
    length = min(LENGTH, model.config.max_position_embeddings)
    encode = tokenizers.bert(file.parent, length=length, size=model.config.vocab_size)
    return build(model, params, Cutting(encode))


def build(model: blip.ImageReward, params: Any, tokenize: Tokenize) -> Reward:
    """The reward of such a BLIP; `params` may be shapes."""
    size = model.config.image_size

    def score_prepared(
        params, pixels: Float[Array, "B H W 3"], ids: Int[Array, "B L"]
    ) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
        return (model.apply({"params": params}, pixels, ids) - MEAN) / STD, {}

    return of_pixels(
        params,
        tokenize=tokenize,
        pixels=partial(clip_pixels, size=size, start=round_half),
        prepare=partial(official_crop, size=size, start=round_half),
        score_prepared=score_prepared,
        blocks=OF_ENCODERS,
    )


def shapes(dtype: DTypeLike) -> Reward:
    """The published one, without its weights."""
    model = blip.ImageReward(blip.BLIPConfig(), dtype)  # its defaults are the published sizes
    return build(model, convert.typed(blip.abstract_params(model.config), dtype), zero_tokens(LENGTH))


BUILTINS = {
    "imagereward": Builtin("ImageReward: a BLIP tuned on people's rankings (Xu et al. 2023)", load, shapes=shapes)
}
