"""T5's text encoder (Raffel et al. 2020) of version 1.1, in transformers' layout and names: SD3's third, FLUX's second.

It differs from CLIP's in all that matters: no biases, norms without a mean, positions as a bias of the attention's
logits, which are not divided by the root of the head's width, and a product of two layers in the feed-forward part.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from diffexp_jax.errors import InputError
from diffexp_jax.formats import files
from diffexp_jax.formats.config_keys import Keys, checked
from diffexp_jax.limits import positive, whole
from diffexp_jax.models.attention import attention
from diffexp_jax.models.blocks import T5_BLOCKS, in_turn
from diffexp_jax.models.clip_config import GENERIC, ONE_VALUE
from diffexp_jax.models.layers import Dense, RMSNorm, gelu_tanh

_WIDTH = whole(1, 2**17)
KEYS = Keys(
    read={
        "vocab_size": whole(1, 2**24),
        "d_model": _WIDTH,
        "d_kv": whole(1, 2**12),
        "d_ff": _WIDTH,
        "num_layers": whole(1, 256),
        "num_heads": whole(1, 2**12),
        "relative_attention_num_buckets": whole(4, 2**12),
        "relative_attention_max_distance": whole(2, 2**16),
        "layer_norm_epsilon": positive(1.0),
        "n_positions": whole(1, 2**16),
        "feed_forward_proj": ("gated-gelu",),  # of version 1.1; an absent one is version 1.0's
    },
    only=ONE_VALUE,
    ignored=GENERIC
    | frozenset(
        "dropout_rate num_decoder_layers classifier_dropout eos_token_id dense_act_fn is_gated_act output_past "
        "scalable_attention scale_decoder_outputs".split()
    ),
)


@struct.dataclass
class T5Config:
    """Sizes of the encoder; fields and defaults are those of transformers' config.json."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64  # of a head
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32  # of distances, in both directions together
    relative_attention_max_distance: int = 128  # tokens; all farther ones are one distance
    layer_norm_epsilon: float = 1e-6
    n_positions: int | None = None  # tokens of a prompt that it was trained with; the encoder takes any number

    def prompt_length(self, published: int) -> int:
        """Tokens of a prompt, where nothing else is asked for: a pipeline's number, but no more than it knows."""
        return min(published, self.n_positions or published)

    @classmethod
    def from_dict(cls, config: Any, where: str = "T5 config") -> "T5Config":
        """Raises InputError for what is not accepted; `where` is the file, for the errors."""
        known = checked(config, KEYS, where)
        if known.pop("feed_forward_proj", None) is None:
            raise InputError(f"{where}: feed_forward_proj is missing; wants 'gated-gelu', of T5 version 1.1")
        sizes = cls(**known)
        exact, far = sizes.relative_attention_num_buckets // 4, sizes.relative_attention_max_distance
        if far <= exact:
            accepted = f"more than {exact}, a quarter of relative_attention_num_buckets"
            raise InputError(f"{where}: relative_attention_max_distance={far}; accepted: {accepted}")
        return sizes


def distance_buckets(n_tokens: int, *, n_buckets: int, max_distance: int) -> Int[np.ndarray, "Lq Lk"]:
    """The number of the bucket that the distance of each key from each query is in.

    Half of the buckets are for keys that follow the query. In each half, half of the buckets are of one distance each
    (0, 1, ...), the others grow by a constant factor up to `max_distance`; the last one has all that are farther.
    """
    offset = np.arange(n_tokens)[None] - np.arange(n_tokens)[:, None]
    half, exact, far = n_buckets // 2, n_buckets // 4, np.abs(offset)
    share = np.log(np.maximum(far, exact) / exact) / math.log(max_distance / exact)
    growing = exact + (share * (half - exact)).astype(int)
    return (offset > 0) * half + np.where(far < exact, far, np.minimum(growing, half - 1))


class Block(nn.Module):
    """Self-attention and a gated feed-forward part, each after a norm and added to x, which stays in float32."""

    config: T5Config
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], bias: Float[Array, "1 heads L L"], mask: Bool[Array, "B 1 1 L"] | None
    ) -> Float[Array, "B L D"]:
        cfg = self.config
        norm = partial(RMSNorm, cfg.layer_norm_epsilon, self.dtype)
        dense = partial(Dense, use_bias=False, dtype=self.dtype)
        h = norm(name="layer.0.layer_norm")(x)
        q, k, v = (dense(cfg.num_heads * cfg.d_kv, name=f"layer.0.SelfAttention.{c}")(h) for c in "qkv")
        h = attention(q, k, v, cfg.num_heads, bias=bias, mask=mask, scale=1.0)
        x = x + dense(cfg.d_model, name="layer.0.SelfAttention.o")(h)
        h = norm(name="layer.1.layer_norm")(x)
        gate, h = (dense(cfg.d_ff, name=f"layer.1.DenseReluDense.wi_{i}")(h) for i in range(2))
        return x + dense(cfg.d_model, name="layer.1.DenseReluDense.wo")(gelu_tanh(gate) * h)


class T5Encoder(nn.Module):
    """transformers' T5EncoderModel: its last hidden state, after the final norm.

    `dtype` should not be float16, whose range the activations of trained T5s leave.
    """

    config: T5Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "B L"], mask: Bool[Array, "B L"] | None = None) -> Float[Array, "B L D"]:
        """Without a mask the padding is read as any token, as SD3 and FLUX do; with one, only where it is true."""
        cfg, heads = self.config, self.config.num_heads
        init = nn.initializers.normal(1.0)
        x = nn.Embed(cfg.vocab_size, cfg.d_model, dtype=self.dtype, embedding_init=init, name="shared")(ids)
        buckets = distance_buckets(
            ids.shape[1],
            n_buckets=cfg.relative_attention_num_buckets,
            max_distance=cfg.relative_attention_max_distance,
        )
        name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"  # the first block's, for all
        bias = nn.Embed(cfg.relative_attention_num_buckets, heads, dtype=self.dtype, name=name)(buckets)  # [L, L, H]
        bias = bias.transpose(2, 0, 1)[None]
        keys = None if mask is None else mask[:, None, None]
        kinds = [(cfg, self.dtype)] * cfg.num_layers
        (x,) = in_turn(self, Block, kinds, (x.astype(jnp.float32),), bias, keys, name=T5_BLOCKS)
        return RMSNorm(cfg.layer_norm_epsilon, self.dtype, name="encoder.final_layer_norm")(x)


def canonical_names(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """T5's tensors under the names of `T5Encoder`, without the decoder.

    Files have the table of tokens under one of two names, or under both.
    """
    twice = {"shared.weight", "encoder.embed_tokens.weight"} <= tensors.keys()

    def rename(name):
        if name == "encoder.embed_tokens.weight":
            return None if twice else "shared.weight"
        return None if name.startswith(("decoder.", "lm_head.")) else name

    return files.Renamed(tensors, rename)
