"""PickScore (Kirstain et al. 2023): how alike image and prompt are to a CLIP tuned on people's choices."""

from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from diffexp_jax.formats.tokenizers import check_size, load_tokenizer, token_ids
from diffexp_jax.models import clip, clip_files, sizes
from diffexp_jax.models.blocks import OF_ENCODERS
from diffexp_jax.rewards.preprocess import CLIP, Statistics, clip_pixels, floor_half, official_crop
from diffexp_jax.rewards.processor import statistics
from diffexp_jax.rewards.reward import SHIPPED, Builtin, Cutting, Reward, Tokenize, of_pixels, zero_tokens

# What the cosine is multiplied by, of CLIP's own factor exp(logit_scale).
SCALES = {"logit": lambda factor: factor, "logit/26": lambda factor: factor / 26, "cosine": jnp.ones_like}


def load(folder: Path, *, scale: str = "logit", dtype: DTypeLike = jnp.float32) -> Reward:
    """exp(logit_scale) cos(image, text): about 18 to 26 with the published weights.

    Args:
      folder: a CLIPModel and its CLIPTokenizer as transformers writes them (yuvalkirstain/PickScore_v1, say).
      scale: a name in `SCALES`: "logit", or what others report, that divided by 26 or the cosine alone.
      dtype: of the weights and of the network's arithmetic.

    Raises:
      InputError: a file is missing or broken, or the tensors do not fit the config.
    """
    model, params = clip_files.load(folder, dtype=dtype)
    tokenizer = load_tokenizer(folder)
    check_size(tokenizer, model.config.text.vocab_size, folder)
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.text.max_position_embeddings)
    by = statistics(folder, model.config.vision.image_size)
    return build(model, params, Cutting(partial(token_ids, tokenizer)), scale=scale, by=by)


def build(model: clip.CLIP, params: Any, tokenize: Tokenize, *, scale: str = "logit", by: Statistics = CLIP) -> Reward:
    """The reward of such a CLIP; `params` may be shapes."""
    size = model.config.vision.image_size

    def score_prepared(
        params, pixels: Float[Array, "B H W 3"], ids: Int[Array, "B L"]
    ) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
        text, image, factor = model.apply({"params": params}, ids, pixels)
        factor = SCALES[scale](factor.astype(jnp.float32))
        return factor * (clip.unit(text) * clip.unit(image)).sum(-1), {}

    return of_pixels(
        params,
        tokenize=tokenize,
        pixels=partial(clip_pixels, size=size, by=by),
        prepare=partial(official_crop, size=size, start=floor_half, by=by),
        score_prepared=score_prepared,
        embed=lambda params, pixels: model.apply({"params": params}, pixels, method="embed_image"),
        text_features=lambda params, ids: model.apply({"params": params}, ids, method="embed_text"),
        blocks=OF_ENCODERS,
    )


def shapes(dtype: DTypeLike, *, scale: str = "logit") -> Reward:
    """The published one, without its weights."""
    return build(*clip_files.shapes(sizes.CLIP_H14, dtype), zero_tokens(77), scale=scale)


# Weights in a sum: DRaFT's (Clark et al. 2024) and PRDP's (Deng et al. 2024) 10 is of the cosine, about 0.2. The logit
# is 100 times that: times 10 it would leave nothing to the other rewards.
# transformers' processor, which the published code calls, puts transparent pictures on white since its version 5.
BUILTINS = {
    "pickscore": Builtin(
        "PickScore: a CLIP tuned on people's choices (Kirstain et al. 2023)",
        load,
        shapes=shapes,
        weight=0.1,
        on_white=True,
    ),
    "pickscore_26": Builtin(
        "PickScore divided by 26",
        partial(load, scale="logit/26"),
        shapes=partial(shapes, scale="logit/26"),
        weight=2.6,
        on_white=True,
    ),
    "pickscore_cosine": Builtin(
        "PickScore as a cosine, a hundredth of it",
        partial(load, scale="cosine"),
        shapes=partial(shapes, scale="cosine"),
        weight=10.0,
        on_white=True,
    ),
    "emoji_pickscore": Builtin(
        "PickScore of the emoji world: a small CLIP of its captions", load, SHIPPED / "reward_clip", on_white=True
    ),
}
