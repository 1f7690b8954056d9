"""PickScore (Kirstain et al. 2023): how alike image and prompt are to a CLIP tuned on people's choices."""

from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from diffexp_jax.models import clip
from diffexp_jax.models.stable_diffusion import load_tokenizer, token_ids
from diffexp_jax.rewards.preprocess import clip_pixels, floor_half, official_crop
from diffexp_jax.rewards.reward import Reward, Tokenize, of_pixels

# What the cosine is multiplied by, of CLIP's own factor exp(logit_scale).
SCALES = {"logit": lambda factor: factor, "logit/26": lambda factor: factor / 26, "cosine": jnp.ones_like}


def load(folder: Path, *, scale: str = "logit", dtype: DTypeLike = jnp.float32) -> Reward:
    """exp(logit_scale) cos(image, text): 18 to 26 or so with the published weights.

    Args:
      folder: a CLIPModel and its CLIPTokenizer as transformers writes them (yuvalkirstain/PickScore_v1, say).
      scale: a name in `SCALES`: "logit", or what others report, that divided by 26 or the cosine alone.
      dtype: of the weights and of the network's arithmetic.

    Raises:
      InputError: a file is missing or broken, or the tensors do not fit the config.
    """
    model, params = clip.load(folder, dtype=dtype)
    tokenizer = load_tokenizer(folder)
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.text.max_position_embeddings)
    return build(model, params, lambda texts: token_ids(tokenizer, texts)[0], scale=scale)


def build(model: clip.CLIP, params: Any, tokenize: Tokenize, *, scale: str = "logit") -> Reward:
    """The reward of such a CLIP; `params` may be shapes."""
    size = model.config.vision.image_size

    def rate(
        params, pixels: Float[Array, "B H W 3"], ids: Int[Array, "B L"]
    ) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
        text, image, factor = model.apply({"params": params}, ids, pixels)
        factor = SCALES[scale](factor.astype(jnp.float32))
        return factor * (clip.unit(text) * clip.unit(image)).sum(-1), {}

    return of_pixels(
        params,
        tokenize=tokenize,
        pixels=partial(clip_pixels, size=size),
        prepare=partial(official_crop, size=size, start=floor_half),
        rate=rate,
    )
