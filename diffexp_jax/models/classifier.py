"""A small residual ConvNet with two heads: which animal and which object a picture shows."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from diffexp_jax.formats.config_keys import Keys, Many, check_divides, checked
from diffexp_jax.limits import whole
from diffexp_jax.models.layers import Conv, Dense, GroupNorm, ResnetBlock

_EPSILON = 1e-5
_NUMBER = whole(1, 2**12)
KEYS = Keys(
    read={"widths": Many(_NUMBER), "norm_num_groups": _NUMBER, "animals": _NUMBER, "objects": _NUMBER},
    only={},
)


@struct.dataclass
class ClassifierConfig:
    """Sizes of the network, and how many labels each head has.

    The defaults take 0.06 GFLOP an image of 64x64 and have 0.5 M parameters.
    """

    widths: tuple[int, ...] = (16, 40, 80, 112)  # channels per stage; each stage halves the resolution
    norm_num_groups: int = 8
    animals: int = 52
    objects: int = 7

    @classmethod
    def from_dict(cls, config: Any, where: str = "config.json") -> "ClassifierConfig":
        """Raises InputError for what is not accepted; `where` is the file, for the errors."""
        sizes = cls(**checked(config, KEYS, where))
        groups = (sizes.norm_num_groups,) * len(sizes.widths)
        check_divides(groups, sizes.widths, "norm_num_groups", "widths", where)
        return sizes


class Classifier(nn.Module):
    """Images in [0,1] -> logits of the animal and of the object."""

    config: ClassifierConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B A"], Float[Array, "B O"]]:
        cfg = self.config
        x = 2.0 * images - 1.0
        for i, width in enumerate(cfg.widths):
            x = Conv(width, stride=2, dtype=self.dtype, name=f"stages.{i}.conv")(x)
            x = ResnetBlock(width, cfg.norm_num_groups, _EPSILON, self.dtype, name=f"stages.{i}.resnet")(x)
        x = GroupNorm(cfg.norm_num_groups, _EPSILON, self.dtype, silu=True, name="norm")(x).mean((1, 2))  # [B, C]
        heads = (
            Dense(n, dtype=self.dtype, name=name)(x) for name, n in (("animal", cfg.animals), ("object", cfg.objects))
        )
        return tuple(logits.astype(jnp.float32) for logits in heads)
