"""The published rewards without their weights: shapes in place of arrays, for a dry run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from diffexp_jax.models import blip, clip, convert, sizes
from diffexp_jax.rewards import aesthetic, hpsv2, imagereward, pickscore
from diffexp_jax.rewards.reward import Reward, Tokenize


def _tokenize(length: int) -> Tokenize:
    """Zeros of the right shape."""
    return lambda texts: np.zeros((len(texts), length), np.int32)


def _clip(config: dict[str, Any], dtype: DTypeLike) -> tuple[clip.CLIP, Any]:
    model = clip.CLIP(clip.CLIPConfig.from_dict(config), dtype)
    size = model.config.vision.image_size
    ids, pixels = jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, size, size, 3))
    params = _as(dtype, convert.abstract_params(model, ids, pixels))
    return model, params | {"logit_scale": jax.ShapeDtypeStruct((), jnp.float32)}


def _as(dtype: DTypeLike, shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def _pickscore(dtype: DTypeLike, scale: str = "logit") -> Reward:
    return pickscore.build(*_clip(sizes.CLIP_H14, dtype), _tokenize(77), scale=scale)


def _hpsv2(dtype: DTypeLike) -> Reward:
    return hpsv2.build(*_clip(sizes.CLIP_H14, dtype), _tokenize(77))


def _aesthetic(dtype: DTypeLike) -> Reward:
    model, params = _clip(sizes.CLIP_L14, dtype)
    tower = {part: params[part] for part in ("vision_model", "visual_projection", "logit_scale")}
    return aesthetic.build(model, {"clip": tower, "head": aesthetic.head_shapes(sizes.AESTHETIC_WIDTHS)})


def _imagereward(dtype: DTypeLike) -> Reward:
    model = blip.ImageReward(blip.BLIPConfig(), dtype)  # its defaults are the published sizes
    return imagereward.build(model, _as(dtype, blip.abstract_params(model.config)), _tokenize(imagereward.LENGTH))


SHAPES: dict[str, Callable[[DTypeLike], Reward]] = {
    "pickscore": _pickscore,
    "pickscore_26": partial(_pickscore, scale="logit/26"),
    "pickscore_cosine": partial(_pickscore, scale="cosine"),
    "hpsv2": _hpsv2,
    "aesthetic": _aesthetic,
    "imagereward": _imagereward,
}
