"""Keys of randomness, from the seed, a name, an iteration and a sample's global index alone."""

import zlib

import jax
import numpy as np
from jaxtyping import Int, PRNGKeyArray


def stream(seed: int, name: str, iteration: int = 0) -> PRNGKeyArray:
    """The key of one kind of randomness at one iteration: nothing else has to be remembered to resume."""
    return _stream(*np.array([seed, zlib.crc32(name.encode()) & 0x7FFFFFFF, iteration], np.uint32))


@jax.jit
def _stream(seed, name, iteration):
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), name), iteration)


def sample_keys(key: PRNGKeyArray, n_samples: int) -> jax.Array:
    """A key per sample of the whole batch, from its global index alone."""
    return keys_of(key, np.arange(n_samples))


def keys_of(key: PRNGKeyArray, index: Int[np.ndarray, " N"]) -> jax.Array:
    """A key for each of these numbers; equal numbers have the same."""
    return _keys_of(key, index)


_keys_of = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))
