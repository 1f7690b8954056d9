"""The sizes of a SD3Transformer2DModel: what diffusers' config.json says, and which of it this network does."""

from typing import Any

from flax import struct

from diffexp_jax.errors import InputError
from diffexp_jax.formats.config_keys import Keys, Many, checked, shown
from diffexp_jax.limits import whole

KEYS = Keys(
    read={
        "sample_size": whole(1, 1024),
        "patch_size": whole(1, 16),
        "in_channels": whole(1, 1024),
        "out_channels": whole(1, 1024),
        "num_layers": whole(1, 256),
        "attention_head_dim": whole(1, 2**12),
        "num_attention_heads": whole(1, 2**12),
        "joint_attention_dim": whole(1, 2**15),
        "caption_projection_dim": whole(1, 2**15),
        "pooled_projection_dim": whole(1, 2**15),
        "pos_embed_max_size": whole(1, 1024),
        "dual_attention_layers": Many(whole(0, 255)),
        "qk_norm": ("rms_norm",),  # null: none
    },
    only={"quantization_config": (None,)},
    class_names=("SD3Transformer2DModel",),
)


@struct.dataclass
class MMDiTConfig:
    """Sizes of an MMDiT; fields and defaults are those of diffusers' config.json."""

    sample_size: int = 128  # latent pixels of a side
    patch_size: int = 2  # latent pixels of a token's side
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096  # width of the prompt's tokens
    caption_projection_dim: int = 1152  # the network's width
    pooled_projection_dim: int = 2048  # width of the prompt's pooled embedding
    pos_embed_max_size: int = 96  # positions of a side, of which an image takes the middle ones
    dual_attention_layers: tuple[int, ...] = ()  # whose image tokens also attend to themselves alone
    qk_norm: str | None = None

    @classmethod
    def from_dict(cls, config: Any, where: str = "transformer/config.json") -> "MMDiTConfig":
        """Reads diffusers' config.json; `where` is the file, for the errors.

        Raises:
          InputError: a value that is not accepted, or values that do not fit each other.
        """
        empty = isinstance(config, dict) and config.get("dual_attention_layers") in ([], ())
        known = checked(config | {"dual_attention_layers": None} if empty else config, KEYS, where)
        sizes = cls(**{"out_channels": known.get("in_channels", cls.out_channels)} | known)
        width = sizes.num_attention_heads * sizes.attention_head_dim
        if width != sizes.caption_projection_dim:
            raise InputError(
                f"{where}: caption_projection_dim={sizes.caption_projection_dim}; wants num_attention_heads x "
                f"attention_head_dim, {width}"
            )
        if max(sizes.dual_attention_layers, default=0) >= sizes.num_layers:
            layers = shown(sizes.dual_attention_layers)
            raise InputError(f"{where}: dual_attention_layers={layers}; accepted: 0 to {sizes.num_layers - 1}")
        if sizes.out_channels != sizes.in_channels:
            raise InputError(
                f"{where}: out_channels={sizes.out_channels}; wants in_channels, {sizes.in_channels}: a velocity"
            )
        return sizes
