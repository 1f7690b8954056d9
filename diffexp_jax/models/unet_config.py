"""The sizes of a UNet2DConditionModel: what diffusers' config.json says, and which of it this network does."""

from typing import Any

from flax import struct

from diffexp_jax.errors import InputError
from diffexp_jax.formats.config_keys import Keys, Many, check_divides, check_lengths, checked, shown, uniform
from diffexp_jax.limits import positive, whole

_DEPTH = whole(0, 64)
KEYS = Keys(
    read={
        "sample_size": Many(whole(1, 1024), or_one=True),
        "in_channels": whole(1, 1024),
        "out_channels": whole(1, 1024),
        "block_out_channels": Many(whole(1, 2**15)),
        "down_block_types": Many(("CrossAttnDownBlock2D", "DownBlock2D")),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),  # null: there is none
        "up_block_types": Many(("CrossAttnUpBlock2D", "UpBlock2D")),
        "layers_per_block": Many(whole(1, 16), or_one=True),
        "norm_num_groups": whole(1, 2**15),
        "norm_eps": positive(1.0),
        "cross_attention_dim": Many(whole(1, 2**15), or_one=True),
        "transformer_layers_per_block": Many(Many(_DEPTH, or_one=True), or_one=True),
        "reverse_transformer_layers_per_block": Many(Many(_DEPTH, or_one=True)),
        "attention_head_dim": Many(whole(1, 2**12), or_one=True),  # diffusers: in truth the *number* of heads
        "use_linear_projection": bool,
        "addition_time_embed_dim": whole(1, 2**14),
        "time_embedding_dim": whole(1, 2**17),
    },
    only={
        "act_fn": ("silu", "swish"),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "center_input_sample": (False,),
        "dual_cross_attention": (False,),
        "only_cross_attention": (False,),
        "mid_block_only_cross_attention": (None, False),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "class_embeddings_concat": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "addition_embed_type": (None, "text_time"),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_type": ("positional",),
        "time_cond_proj_dim": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "resnet_skip_time_act": (False,),
        "cross_attention_norm": (None,),
        "num_attention_heads": (None,),  # diffusers refuses it too
        # without parameters of their own, so the accounting of tensors would not notice them
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "resnet_out_scale_factor": (1,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "quantization_config": (None,),
    },
    ignored=frozenset(
        [
            "dropout",  # of training; diffusers samples without it
            "upcast_attention",  # softmax is in float32 always
            "addition_embed_type_num_heads",  # of an addition_embed_type that is refused
            "projection_class_embeddings_input_dim",  # which the tensors' shapes tell
        ]
    ),
    class_names=("UNet2DConditionModel",),
)
_MOST_BLOCKS = 512  # of each kind; SDXL has 70 transformer blocks


@struct.dataclass
class UNetConfig:
    """Sizes of a UNet2DConditionModel, a value per resolution, from fine to coarse."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"  # "UNetMidBlock2D": one residual block; None: nothing
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    # transformer blocks of every layer: a tuple per resolution, in the order of the blocks
    down_depths: tuple[tuple[int, ...], ...] = ((1, 1),) * 4
    mid_depth: int = 1
    up_depths: tuple[tuple[int, ...], ...] = ((1, 1, 1),) * 4
    heads: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int | tuple[int, ...] = 64
    addition_time_embed_dim: int | None = None  # SDXL: width of each of the six sinusoids of sizes and crops
    time_embedding_dim: int | None = None  # None: four times the first resolution's channels

    @property
    def time_width(self) -> int:
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @classmethod
    def from_dict(cls, config: Any, where: str = "unet/config.json") -> "UNetConfig":
        """Reads diffusers' config.json; `where` is the file, for the errors.

        Raises:
          InputError: the config asks for a variant of the network that is not implemented, or has a value of another
            type or size than there can be.
        """
        known = checked(config, KEYS, where)
        if "mid_block_type" in config:  # where null is a value
            known["mid_block_type"] = config["mid_block_type"]
        channels = known.get("block_out_channels", cls.block_out_channels)
        n = len(channels)
        if n > 8:
            raise InputError(f"{where}: block_out_channels has {n} values; accepted: up to 8")
        known["cross_attention_dim"] = uniform(
            known.get("cross_attention_dim", cls.cross_attention_dim), "cross_attention_dim", where
        )
        layers = known.pop("layers_per_block", 2)
        depths = known.pop("transformer_layers_per_block", 1)
        reverse = known.pop("reverse_transformer_layers_per_block", None)
        heads = known.pop("attention_head_dim", 8)
        lists = {key: known.get(key, getattr(cls, key)) for key in ("down_block_types", "up_block_types")}
        lists |= {"layers_per_block": layers, "transformer_layers_per_block": depths, "attention_head_dim": heads}
        lists |= {"reverse_transformer_layers_per_block": reverse}
        check_lengths(lists, n, "block_out_channels", where)
        layers, depths, heads = (x if isinstance(x, tuple) else (x,) * n for x in (layers, depths, heads))
        if reverse is None:
            if any(isinstance(depth, tuple) for depth in depths):  # as diffusers
                raise InputError(
                    f"{where}: transformer_layers_per_block={shown(depths)} wants "
                    "reverse_transformer_layers_per_block beside it"
                )
            reverse = depths[::-1]
        ups = tuple(count + 1 for count in layers[::-1])
        deepest = depths[-1]
        sizes = cls(
            **known,
            heads=heads,
            down_depths=_per_layer(depths, layers, "transformer_layers_per_block", where),
            mid_depth=deepest[0] if isinstance(deepest, tuple) else deepest,
            up_depths=_per_layer(reverse, ups, "reverse_transformer_layers_per_block", where),
        )
        sizes._check(where)
        return sizes

    @property
    def side(self) -> int | None:
        """Latent pixels of a side of the square that the model was trained at; None where that is no square."""
        if isinstance(self.sample_size, int):
            return self.sample_size
        return self.sample_size[0] if self.sample_size[0] == self.sample_size[1] else None

    def _check(self, where: str) -> None:
        """Raises InputError where the sizes do not fit each other, or are more than there can be."""
        groups = (self.norm_num_groups,) * len(self.block_out_channels)
        check_divides(groups, self.block_out_channels, "norm_num_groups", "block_out_channels", where)
        attends = [kind.startswith("CrossAttn") for kind in self.down_block_types]
        attends = [a or b.startswith("CrossAttn") for a, b in zip(attends, self.up_block_types[::-1], strict=True)]
        attends[-1] |= self.mid_block_type == "UNetMidBlock2DCrossAttn"
        heads = [n if on else 1 for n, on in zip(self.heads, attends, strict=True)]
        check_divides(heads, self.block_out_channels, "attention_head_dim", "block_out_channels", where)
        depths = [*self.down_depths, (self.mid_depth,), *self.up_depths]
        if max(sum(map(sum, depths)), sum(map(len, depths))) > _MOST_BLOCKS:
            raise InputError(
                f"{where}: {sum(map(len, depths))} layers with {sum(map(sum, depths))} transformer blocks; accepted: "
                f"up to {_MOST_BLOCKS} of each (layers_per_block, transformer_layers_per_block)"
            )
        if isinstance(self.sample_size, tuple) and len(self.sample_size) != 2:
            raise InputError(f"{where}: sample_size={shown(self.sample_size)}; accepted: a number, or [height, width]")


def _per_layer(
    depths: tuple[int | tuple[int, ...], ...], layers: tuple[int, ...], key: str, where: str
) -> tuple[tuple[int, ...], ...]:
    """The depth of each layer of each block: a number is of all its layers."""
    out = tuple(d if isinstance(d, tuple) else (d,) * n for d, n in zip(depths, layers, strict=True))
    for found, n in zip(out, layers, strict=True):
        if len(found) != n:
            raise InputError(f"{where}: {key} has {shown(found)} for a block of {n} layers; wants as many values")
    return out
