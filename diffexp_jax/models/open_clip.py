"""CLIP checkpoints in open_clip's format, read as the `clip.CLIP` that they are under other names (HPSv2's, say)."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from diffexp_jax.errors import InputError
from diffexp_jax.formats import files, pickles
from diffexp_jax.formats.config_keys import Keys, checked
from diffexp_jax.limits import Number, whole
from diffexp_jax.models import clip, clip_files
from diffexp_jax.models.clip_config import CLIP_MEAN, CLIP_STD, CLIPConfig

# What a checkpoint without open_clip_config.json is taken for: ViT-H-14, as HPSv2's own code does.
VIT_H_14 = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}

_RATIO = Number(0.0, 64.0, above=True)
_TOWER = {"width": whole(1, 2**15), "layers": whole(1, 256), "mlp_ratio": _RATIO}
_SAME = {"ls_init_value": (None,), "final_ln_after_pool": (False,), "act_kwargs": (None, {}), "norm_kwargs": (None, {})}
_SAME |= {"pos_embed_type": ("learnable",), "quantization_config": (None,)}
KEYS = Keys(
    read={"embed_dim": whole(1, 2**15), "quick_gelu": bool},
    only={
        "custom_text": (False,),
        "multimodal_cfg": (None,),
        "init_logit_bias": (None,),
        "nonscalar_logit_scale": (False,),
    },
    ignored=frozenset(["vision_cfg", "text_cfg", "init_logit_scale", "output_dict", "cast_dtype"]),
)
VISION_KEYS = Keys(
    read=_TOWER | {"head_width": whole(1, 2**15), "image_size": whole(1, 2**12), "patch_size": whole(1, 2**12)},
    only=_SAME
    | {"attentional_pool": (False,), "no_ln_pre": (False,), "pool_type": ("tok",), "timm_model_name": (None,)}
    | {"input_patchnorm": (False,), "global_average_pool": (False,)},
    ignored=frozenset(["patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads"]),
)
TEXT_KEYS = Keys(
    read=_TOWER | {"heads": whole(1, 2**12), "vocab_size": whole(1, 2**24), "context_length": whole(1, 2**16)},
    only=_SAME
    | {"hf_model_name": (None,), "hf_tokenizer_name": (None,), "embed_cls": (False,), "no_causal_mask": (False,)}
    | {"pool_type": ("argmax",), "proj_bias": (False,), "proj_type": ("linear",)},
    ignored=frozenset(["pad_id", "output_tokens", "tokenizer_kwargs"]),
)
# HPSv2's own code prepares pictures in one way, whatever this says.
PREPROCESS_KEYS = Keys(
    read={},
    only={"mean": CLIP_MEAN, "std": CLIP_STD},
    ignored=frozenset(["interpolation", "resize_mode", "fill_color", "size", "mode"]),
)

_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
# stored as [in, out], which transformers keeps as the [out, in] of a linear layer
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)")
_BLOCK_NAMES = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


class Derived(Mapping[str, np.ndarray]):
    """Tensors that are computed when asked for, by name."""

    def __init__(self, make: Mapping[str, Callable[[], np.ndarray]]):
        self._make = make

    def __getitem__(self, name: str) -> np.ndarray:
        return self._make[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)


def as_transformers(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """A view of an open_clip state dict under the names and in the shapes of transformers' CLIPModel.

    The fused q, k, v are split and the projections transposed; names that are not known are kept as they are.
    """
    make = {}
    for name in tensors:
        if match := _BLOCK.fullmatch(name):
            tower, i, middle, kind = match.groups()
            prefix = f"{'vision' if tower else 'text'}_model.encoder.layers.{i}."
            if middle == "attn.in_proj_":
                for part, letter in enumerate("qkv"):
                    make[f"{prefix}self_attn.{letter}_proj.{kind}"] = lambda name=name, part=part: _third(
                        tensors[name], part
                    )
                continue
            new = prefix + _BLOCK_NAMES[middle] + kind if middle in _BLOCK_NAMES else name
        else:
            new = _NAMES.get(name, name)
        if name in _TRANSPOSED:
            make[_TRANSPOSED[name]] = lambda name=name: np.asarray(tensors[name]).T
        else:
            make[new] = lambda name=name: tensors[name]
    return Derived(make)


def _third(value: np.ndarray, part: int) -> np.ndarray:
    """q, k or v of what holds all three; the whole where that cannot be, whose shape is refused later."""
    return value if value.ndim == 0 or len(value) % 3 else np.split(value, 3)[part]


def config_of(model_cfg: Mapping[str, Any], where: str = "open_clip_config.json") -> CLIPConfig:
    """The sizes in open_clip's words ("model_cfg" of its open_clip_config.json) as ours; `where` is for errors.

    Raises:
      InputError: a size is missing or not accepted, or it is another kind of CLIP.
    """
    whole_model = checked(model_cfg, KEYS, f"{where}: model_cfg")
    parts = (("vision_cfg", VISION_KEYS), ("text_cfg", TEXT_KEYS))
    if absent := [name for name, _ in parts if name not in model_cfg]:
        raise InputError(f"{where}: model_cfg has no {', '.join(map(repr, absent))}")
    vision, text = (checked(model_cfg.get(name), keys, f"{where}: {name}") for name, keys in parts)
    sizes = {"embed_dim": whole_model, "width": vision, "layers": vision, "image_size": vision, "patch_size": vision}
    missing = [repr(key) for key, part in sizes.items() if key not in part]
    missing += [f"text_cfg's {key!r}" for key in ("width", "heads", "layers") if key not in text]
    if missing:
        raise InputError(f"{where}: model_cfg has no {', '.join(missing)}")
    act = "quick_gelu" if whole_model.get("quick_gelu") else "gelu"
    head_width = min(vision.get("head_width", 64), vision["width"])
    return CLIPConfig.from_dict(
        {
            "text_config": {
                "vocab_size": text.get("vocab_size", 49408),
                "hidden_size": text["width"],
                "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
                "num_hidden_layers": text["layers"],
                "num_attention_heads": text["heads"],
                "max_position_embeddings": text.get("context_length", 77),
                "hidden_act": act,
                "projection_dim": whole_model["embed_dim"],
                "eos_token_id": clip.LEGACY_EOS,  # open_clip pools the text where the id is highest
            },
            "vision_config": {
                "hidden_size": vision["width"],
                "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
                "num_hidden_layers": vision["layers"],
                "num_attention_heads": vision["width"] // head_width,
                "image_size": vision["image_size"],
                "patch_size": vision["patch_size"],
                "hidden_act": act,
            },
            "projection_dim": whole_model["embed_dim"],
        },
        where,
    )


def load(path: Path, *, dtype: DTypeLike = jnp.float32) -> tuple[clip.CLIP, dict[str, Any]]:
    """Reads a checkpoint file (.pt, .bin, .safetensors), a state dict or {"state_dict": ...}.

    Args:
      path: the file; its sizes are those of open_clip_config.json beside it, or ViT-H-14's if there is none.
      dtype: of the weights and of the arithmetic; features and `logit_scale` are always float32.

    Raises:
      InputError: a file is missing, broken or refused, or its tensors do not fit the sizes.
    """
    sizes = path.parent / "open_clip_config.json"
    content = files.read_json(sizes) if sizes.is_file() else {"model_cfg": VIT_H_14}
    config = config_of(content.get("model_cfg", {}), str(sizes))
    checked(content.get("preprocess_cfg") or {}, PREPROCESS_KEYS, f"{sizes}: preprocess_cfg")
    return clip_files.from_tensors(config, as_transformers(pickles.open_checkpoint(path)), where=str(path), dtype=dtype)
