"""Rotary embeddings (Su et al. 2021) of places in an image, as FLUX has them."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BASE = 10_000.0


class Rotation(NamedTuple):
    """By what angle each pair of neighbouring numbers of a head is turned: its cosine and sine, for both numbers."""

    cos: Float[Array, "L d"]
    sin: Float[Array, "L d"]

    def turned(self, x: Float[Array, "B L D"], heads: int) -> Float[Array, "B L D"]:
        """(a, b) -> (a cos - b sin, b cos + a sin) of each pair of each head, in float32."""
        of_heads = x.reshape(*x.shape[:-1], heads, -1).astype(jnp.float32)
        first = np.arange(of_heads.shape[-1]) % 2 == 0
        other = jnp.where(first, -jnp.roll(of_heads, -1, -1), jnp.roll(of_heads, 1, -1))
        return (of_heads * self.cos[:, None] + other * self.sin[:, None]).reshape(x.shape).astype(x.dtype)


def of_image(height: int, width: int, n_text: int, axes: tuple[int, int, int]) -> Rotation:
    """Of the tokens of an image, row by row, and then so many of a prompt, which are not turned.

    Args:
      axes: so many of a head's numbers are for nothing, for the row, for the column.
    """
    unused, *angles = (
        np.arange(n)[:, None] * BASE ** (-np.arange(0, size, 2) / size)
        for n, size in zip((1, height, width), axes, strict=True)
    )
    rows, columns = angles

    def of_tokens(function):
        tables = function(unused)[None], function(rows)[:, None], function(columns)[None]
        tables = [jnp.broadcast_to(x.astype(np.float32), (height, width, x.shape[-1])) for x in tables]
        image = jnp.concatenate(tables, axis=-1).reshape(height * width, -1)  # [S, d / 2]
        return jnp.pad(image, ((0, n_text), (0, 0)), constant_values=function(0.0)).repeat(2, axis=-1)

    return Rotation(of_tokens(np.cos), of_tokens(np.sin))
