"""The sizes of CLIPs: what transformers' config.json says, and which of it these networks do."""

from collections.abc import Mapping
from typing import Any

from flax import struct

from diffexp_jax.errors import InputError
from diffexp_jax.formats.config_keys import Keys, Many, check_divides, checked, shown, uniform
from diffexp_jax.limits import positive, whole
from diffexp_jax.models.layers import ACTIVATIONS

# OpenAI's statistics of red, green and blue, which every published CLIP kept but a few, and BLIP took over.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Of every model's config in transformers: of training, of outputs that are not asked for, of generating text.
GENERIC = frozenset(
    "architectures model_type transformers_version torch_dtype dtype torchscript return_dict output_hidden_states "
    "output_attentions output_scores return_dict_in_generate problem_type id2label label2id finetuning_task "
    "task_specific_params tokenizer_class prefix chunk_size_feed_forward initializer_range initializer_factor "
    "attention_dropout dropout pad_token_id bos_token_id sep_token_id decoder_start_token_id tie_word_embeddings "
    "tie_encoder_decoder use_bfloat16 tf_legacy_loss gradient_checkpointing do_sample early_stopping num_beams "
    "num_beam_groups num_return_sequences diversity_penalty temperature top_k top_p typical_p repetition_penalty "
    "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids max_length min_length "
    "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens is_encoder_decoder use_cache".split()
)
# What would be another network.
ONE_VALUE: dict[str, tuple] = {
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
_WIDTH = whole(1, 2**15)
_TOWER = {
    "hidden_size": _WIDTH,
    "intermediate_size": whole(1, 2**17),
    "num_hidden_layers": whole(1, 256),
    "num_attention_heads": whole(1, 2**12),
    "hidden_act": tuple(ACTIVATIONS),
    "layer_norm_eps": positive(1.0),
}
TEXT_KEYS = Keys(
    read=_TOWER
    | {
        "vocab_size": whole(1, 2**24),
        "max_position_embeddings": whole(1, 2**16),
        "projection_dim": _WIDTH,
        "eos_token_id": Many(whole(0, 2**24), or_one=True),
    },
    only=ONE_VALUE,
    ignored=GENERIC,
)
VISION_KEYS = Keys(
    read=_TOWER | {"image_size": Many(whole(1, 2**12), or_one=True), "patch_size": Many(whole(1, 2**12), or_one=True)},
    only=ONE_VALUE | {"num_channels": (3,)},
    ignored=GENERIC | {"projection_dim"},  # the whole CLIP's counts
)
CLIP_KEYS = Keys(
    read={"projection_dim": _WIDTH},
    only=ONE_VALUE,
    # The parts' configs have tables of their own. transformers' newer vision configs are in the file of a whole one.
    ignored=GENERIC
    | {"text_config", "vision_config", "text_config_dict", "vision_config_dict", "logit_scale_init_value"},
)


def _tower(config: Any, keys: Keys, where: str) -> dict[str, Any]:
    """The entries that are read; a list of equal values is the one."""
    return {key: uniform(value, key, where) for key, value in checked(config, keys, where).items()}


@struct.dataclass
class CLIPTextConfig:
    """Sizes of a text encoder; fields and defaults are those of transformers' config.json."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    eos_token_id: int = 49407

    @classmethod
    def from_dict(cls, config: Any, where: str = "CLIP config") -> "CLIPTextConfig":
        """Raises InputError for what is not accepted; `where` is the file, for the errors."""
        sizes = cls(**_tower(config, TEXT_KEYS, where))
        check_divides([sizes.num_attention_heads], [sizes.hidden_size], "num_attention_heads", "hidden_size", where)
        return sizes


@struct.dataclass
class CLIPVisionConfig:
    """Sizes of an image encoder (a ViT); fields and defaults are those of transformers' config.json."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224  # pixels
    patch_size: int = 32  # pixels
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_dict(cls, config: Any, where: str = "CLIP config") -> "CLIPVisionConfig":
        """Raises InputError for what is not accepted; `where` is the file, for the errors."""
        sizes = cls(**_tower(config, VISION_KEYS, where))
        check_divides([sizes.num_attention_heads], [sizes.hidden_size], "num_attention_heads", "hidden_size", where)
        if not sizes.patch_size <= sizes.image_size <= 256 * sizes.patch_size:
            accepted = f"{sizes.patch_size} to {256 * sizes.patch_size}, by patch_size"
            raise InputError(f"{where}: image_size={sizes.image_size}; accepted: {accepted}")
        return sizes


@struct.dataclass
class CLIPConfig:
    """Sizes of a whole CLIP, as in transformers' CLIPModel."""

    text: CLIPTextConfig = CLIPTextConfig()
    vision: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512

    @classmethod
    def from_dict(cls, config: Any, where: str = "CLIP config") -> "CLIPConfig":
        """Raises InputError for what is not accepted; `where` is the file, for the errors."""
        known = checked(config, CLIP_KEYS, where)
        text, vision = (_part(config, key, where) for key in ("text_config", "vision_config"))
        return cls(
            CLIPTextConfig.from_dict(text, f"{where}: text_config"),
            CLIPVisionConfig.from_dict(vision, f"{where}: vision_config"),
            **known,
        )


def _part(config: Any, key: str, where: str) -> Any:
    """The config of a tower. Old files have it twice; transformers takes what the second says.

    Raises:
      InputError: the two say different things.
    """
    part, old = (config.get(name) or {} for name in (key, f"{key}_dict"))
    for name, value in old.items() if isinstance(old, Mapping) and isinstance(part, Mapping) else ():
        if name in part and part[name] != value:
            both = f"{name}={shown(part[name])} in {key} and {shown(value)} in {key}_dict"
            raise InputError(f"{where}: {both}; wants the same")
    return old | part if isinstance(old, dict) and isinstance(part, dict) else part
