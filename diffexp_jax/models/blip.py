"""ImageReward's network (Xu et al. 2023): BLIP's ViT, a BERT that reads the image by cross-attention, a linear head."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from diffexp_jax.errors import InputError
from diffexp_jax.formats import convert, files, pickles
from diffexp_jax.formats.config_keys import Keys, check_divides, checked
from diffexp_jax.limits import positive, whole
from diffexp_jax.models.attention import attention
from diffexp_jax.models.blocks import BERT_LAYERS, VIT_BLOCKS, in_turn
from diffexp_jax.models.clip_config import GENERIC, ONE_VALUE
from diffexp_jax.models.layers import Conv, Dense, LayerNorm, gelu

_VIT_EPSILON = 1e-6
_HEAD_WIDTH = 64  # of a ViT's attention heads, in BLIP's base and large alike
_PADDING = 0  # BERT's [PAD]
_HEAD_LAYERS = (0, 2, 4, 6, 7)  # the linear ones of the head's nn.Sequential; the entries between them are dropout

# Entries of the checkpoint that scoring does not use: BLIP's contrastive projections, and a constant.
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")

# med_config.json: a BertConfig, and what BLIP adds to it.
KEYS = Keys(
    read={
        "vocab_size": whole(1, 2**24),
        "hidden_size": whole(1, 2**15),
        "intermediate_size": whole(1, 2**17),
        "num_hidden_layers": whole(1, 256),
        "num_attention_heads": whole(1, 2**12),
        "max_position_embeddings": whole(1, 2**16),
        "layer_norm_eps": positive(1.0),
    },
    only=ONE_VALUE
    | {
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
        "pad_token_id": (_PADDING, None),
        "add_cross_attention": (True, False),  # which BLIP's own code sets
        "is_decoder": (False, True),
    },
    ignored=(GENERIC - {"pad_token_id"})
    | {"hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"}
    # its code does without segments, and takes the image's width from the image's tower
    | {"type_vocab_size", "encoder_width", "eos_token_id"},
)


@struct.dataclass
class BLIPConfig:
    """Sizes; the image's are read from the tensors, the text's have the names of med_config.json."""

    vision_width: int = 1024
    vision_layers: int = 24
    image_size: int = 224  # pixels
    patch_size: int = 16  # pixels
    vocab_size: int = 30524
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    head_widths: tuple[int, ...] = (1024, 128, 64, 16, 1)

    @property
    def vision_heads(self) -> int:
        return max(self.vision_width // _HEAD_WIDTH, 1)


class ViTBlock(nn.Module):
    """timm's Block: pre-norm, q, k and v in one projection, exact GELU."""

    config: BLIPConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        width = self.config.vision_width
        h = LayerNorm(_VIT_EPSILON, self.dtype, name="norm1")(x)
        q, k, v = jnp.split(Dense(3 * width, dtype=self.dtype, name="attn.qkv")(h), 3, axis=-1)
        h = attention(q, k, v, self.config.vision_heads)
        x = x + Dense(width, dtype=self.dtype, name="attn.proj")(h)
        h = LayerNorm(_VIT_EPSILON, self.dtype, name="norm2")(x)
        h = gelu(Dense(4 * width, dtype=self.dtype, name="mlp.fc1")(h))
        return x + Dense(width, dtype=self.dtype, name="mlp.fc2")(h)


class ViT(nn.Module):
    """Normalised pixels -> the class token and one per patch, all after the last LayerNorm."""

    config: BLIPConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B N D"]:
        cfg, width, patch = self.config, self.config.vision_width, self.config.patch_size
        none, init = ((0, 0), (0, 0)), nn.initializers.normal(0.02)
        x = Conv(width, patch, patch, none, dtype=self.dtype, name="patch_embed.proj")(pixels)
        x = x.reshape(len(x), -1, width)
        first = self.param("cls_token", init, (1, 1, width)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, width)), x], axis=1)  # [B, N, D]
        positions = (cfg.image_size // patch) ** 2 + 1
        x = x + self.param("pos_embed", init, (1, positions, width)).astype(self.dtype)
        (x,) = in_turn(self, ViTBlock, [(cfg, self.dtype)] * cfg.vision_layers, (x,), name=VIT_BLOCKS)
        return LayerNorm(_VIT_EPSILON, self.dtype, name="norm")(x)


class BertLayer(nn.Module):
    """Post-norm: attention among the words (padding hidden), then to the image, then the MLP."""

    config: BLIPConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], seen: Bool[Array, "B L"], image: Float[Array, "B N V"]
    ) -> Float[Array, "B L D"]:
        cfg, width = self.config, self.config.hidden_size

        def attend(name, keys, **kwargs):
            def dense(part, y):
                return Dense(width, dtype=self.dtype, name=f"{name}.self.{part}")(y)

            q, k, v = dense("query", x), dense("key", keys), dense("value", keys)
            h = attention(q, k, v, cfg.num_attention_heads, **kwargs)
            return add_and_norm(name, h)

        def add_and_norm(name, h):
            h = Dense(width, dtype=self.dtype, name=f"{name}.output.dense".removeprefix("."))(h)
            return LayerNorm(cfg.layer_norm_eps, self.dtype, name=f"{name}.output.LayerNorm".removeprefix("."))(x + h)

        x = attend("attention", x, mask=seen[:, None, None])
        x = attend("crossattention", image)
        h = gelu(Dense(cfg.intermediate_size, dtype=self.dtype, name="intermediate.dense")(x))
        return add_and_norm("", h)


class Bert(nn.Module):
    """Token ids and the image's tokens -> the text's tokens."""

    config: BLIPConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, ids: Int[Array, "B L"], image: Float[Array, "B N V"]) -> Float[Array, "B L D"]:
        cfg = self.config

        def embed(name, size, indices):
            init = nn.initializers.normal(0.02)
            name = f"embeddings.{name}_embeddings"
            return nn.Embed(size, cfg.hidden_size, dtype=self.dtype, embedding_init=init, name=name)(indices)

        words = embed("word", cfg.vocab_size, ids)
        x = words + embed("position", cfg.max_position_embeddings, jnp.arange(ids.shape[1]))
        x = LayerNorm(cfg.layer_norm_eps, self.dtype, name="embeddings.LayerNorm")(x)
        layers = [(cfg, self.dtype)] * cfg.num_hidden_layers
        return in_turn(self, BertLayer, layers, (x,), ids != _PADDING, image, name=BERT_LAYERS)[0]


class ImageReward(nn.Module):
    """Normalised pixels and token ids -> a number per pair, float32, not yet normalised."""

    config: BLIPConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "B H W 3"], ids: Int[Array, "B L"]) -> Float[Array, " B"]:
        image = ViT(self.config, self.dtype, name="blip.visual_encoder")(pixels)
        text = Bert(self.config, self.dtype, name="blip.text_encoder")(ids, image)
        x = text[:, 0].astype(jnp.float32)
        for i, width in zip(_HEAD_LAYERS, self.config.head_widths, strict=True):
            x = Dense(width, name=f"mlp.layers.{i}")(x)
        return x[:, 0]


def config_of(tensors: Mapping[str, np.ndarray], med_config: Mapping[str, Any], *, where: str) -> BLIPConfig:
    """Sizes of a checkpoint: of the image's tower and the head by its tensors, of BERT by med_config.json.

    Raises:
      InputError: tensors that tell the sizes are missing.
    """
    try:
        patch = tensors["blip.visual_encoder.patch_embed.proj.weight"].shape  # [D, 3, p, p]
        tokens = tensors["blip.visual_encoder.pos_embed"].shape[1]
        widths = tuple(tensors[f"mlp.layers.{i}.bias"].shape[0] for i in _HEAD_LAYERS)
    except KeyError as error:
        raise InputError(f"{where}: not an ImageReward checkpoint: the tensor {error} is missing") from None
    blocks = {match[1] for name in tensors if (match := re.match(r"blip\.visual_encoder\.blocks\.(\d+)\.", name))}
    known = checked(med_config, KEYS, "med_config.json")
    sizes = BLIPConfig(
        **known
        | dict(
            vision_width=patch[0],
            vision_layers=len(blocks),
            patch_size=patch[2],
            image_size=round((tokens - 1) ** 0.5) * patch[2],
            head_widths=widths,
        )
    )
    heads = sizes.num_attention_heads, sizes.vision_heads
    widths = sizes.hidden_size, sizes.vision_width
    check_divides(heads, widths, "the number of attention heads", "the width", "med_config.json")
    return sizes


def abstract_params(config: BLIPConfig) -> dict[str, Any]:
    """The shapes of every parameter that scoring uses, without computing anything."""
    pixels = np.zeros((1, config.image_size, config.image_size, 3), np.float32)
    return convert.abstract_params(ImageReward(config), pixels, np.zeros((1, 4), np.int32))


def load(path: Path, *, dtype: DTypeLike = jnp.float32) -> tuple[ImageReward, dict[str, Any]]:
    """Reads ImageReward's checkpoint (.pt or .safetensors) and med_config.json beside it, if there is one.

    Args:
      path: the checkpoint's file.
      dtype: of the weights and of the arithmetic; the head is always float32.

    Raises:
      InputError: a file is missing, broken or refused, or its tensors do not fit the sizes.
    """
    sizes = path.parent / "med_config.json"
    tensors = pickles.open_checkpoint(path)
    tensors = files.Renamed(tensors, lambda name: None if name.startswith(UNUSED) else name)
    config = config_of(tensors, files.read_json(sizes) if sizes.is_file() else {}, where=str(path))
    params = convert.from_torch(tensors, abstract_params(config), where=str(path), dtype=dtype)
    return ImageReward(config, dtype), params
