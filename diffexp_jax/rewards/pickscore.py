"""PickScore (Kirstain et al. 2023): how alike image and prompt are to a CLIP tuned on people's choices."""

from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from diffexp_jax.models import clip
from diffexp_jax.models.stable_diffusion import load_tokenizer, token_ids
from diffexp_jax.rewards.preprocess import clip_pixels
from diffexp_jax.rewards.reward import Reward


def load(folder: Path, *, dtype: DTypeLike = jnp.float32) -> Reward:
    """exp(logit_scale) cos(image, text): 18 to 26 or so with the published weights (some divide it by 26).

    Args:
      folder: a CLIPModel and its CLIPTokenizer as transformers writes them (yuvalkirstain/PickScore_v1, say).
      dtype: of the weights and of the network's arithmetic.

    Raises:
      InputError: a file is missing or broken, or the tensors do not fit the config.
    """
    model, params = clip.load(folder, dtype=dtype)
    tokenizer = load_tokenizer(folder)
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.text.max_position_embeddings)

    def score(
        params, images: Float[Array, "B H W 3"], ids: Int[Array, "B L"]
    ) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
        pixels = clip_pixels(images, model.config.vision.image_size)
        text, image, scale = model.apply({"params": params}, ids, pixels)
        return scale.astype(jnp.float32) * (clip.unit(text) * clip.unit(image)).sum(-1), {}

    return Reward(params, lambda texts: token_ids(tokenizer, texts)[0], score)
