"""A reward that is learnt from queries of the true one, optimistic where it knows little (SEIKO, Uehara et al. 2024b).

It is a network on an image's features: linear layers without activations, as LAION's aesthetic head has them. What it
was fitted to is kept, and fitted again after every round of queries.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from diffexp_jax.algorithms.state import Queries

WIDTHS = (1024, 128, 64, 16, 1)  # of the layers' outputs
HELD_OUT = 20  # one in so many queries, the newest, is not fitted to
OPTIMISMS = ("ucb", "bootstrap", "none")


def no_queries(size: int, n_features: int) -> Queries:
    return Queries(jnp.zeros((size, n_features)), jnp.zeros(size), jnp.zeros((), jnp.int32))


def entered(queries: Queries, features: Float[Array, "B P"], rewards: Float[Array, "B"]) -> Queries:
    """With these after the others, in order; a full buffer forgets its oldest."""
    slots = (queries.seen + jnp.arange(len(rewards))) % len(queries.rewards)
    return Queries(
        queries.features.at[slots].set(features),
        queries.rewards.at[slots].set(rewards),
        queries.seen + len(rewards),
    )


# ------------------------------------------------------------------------------------------------------------- network

Layers = Sequence[tuple[Array, Array]]  # (kernel [in, out], bias [out]); of several networks with a leading axis


def init_network(key: PRNGKeyArray, n_features: int) -> Layers:
    """Numbers as torch's Linear begins with: uniform between -+ 1 / sqrt(in)."""
    layers = []
    for i, (n_in, n_out) in enumerate(zip((n_features, *WIDTHS), WIDTHS, strict=False)):
        draw, most = jax.random.fold_in(key, i), n_in**-0.5
        both = jax.random.uniform(draw, (n_in + 1, n_out), minval=-most, maxval=most)
        layers.append((both[:-1], both[-1]))
    return tuple(layers)


def last_hidden(layers: Layers, features: Float[Array, "B P"]) -> Float[Array, "B 16"]:
    """What the last layer reads: the features that uncertainty is measured in."""
    for kernel, bias in layers[:-1]:
        features = jnp.matmul(features, kernel, precision=jax.lax.Precision.HIGHEST) + bias
    return features


def predicted(layers: Layers, features: Float[Array, "B P"]) -> Float[Array, "B"]:
    """The reward that one network expects."""
    (kernel, bias), hidden = layers[-1], last_hidden(layers, features)
    return jnp.matmul(hidden, kernel[:, 0], precision=jax.lax.Precision.HIGHEST) + bias[0]


# ----------------------------------------------------------------------------------------------------------------- fit


def fit(
    networks: Layers, queries: Queries, key: PRNGKeyArray, *, n_epochs: int, batch: int, lr: float
) -> tuple[Layers, Float[Array, ""]]:
    """(the networks after so many epochs of Adam on the squared error, mean |error| on the queries held out).

    The published code draws dropout in the first epoch alone and ends with the last epoch's numbers; there is no
    dropout here.

    Args:
      networks: several, along a leading axis, from where the last fit left them. Where they are several, each is fitted
        to as many queries, drawn with replacement (bootstrap).
      batch: queries at a time; the last batch of an epoch may be smaller.
    """
    n, n_networks, rows = queries.filled, len(networks[0][1]), len(queries.rewards)
    oldest = (queries.seen - n) % rows
    n_fitted = jnp.maximum(n - n // HELD_OUT, 1)
    n_batches = -(-n_fitted // batch)
    optimizer = optax.adam(lr)
    draws = jax.random.randint(jax.random.fold_in(key, 0), (n_networks, rows), 0, n_fitted)
    picks = draws if n_networks > 1 else jnp.arange(rows)[None]

    def errors(layers, picked):  # of the queries by their age, 0 the oldest
        at = (oldest + picked) % rows
        return predicted(layers, queries.features[at]) - queries.rewards[at]

    def loss(networks, order, valid):
        squares = jax.vmap(lambda layers, picks: jnp.square(errors(layers, picks[order])))(networks, picks)
        return (squares * valid).sum() / valid.sum() / n_networks

    def one_epoch(i, carry):
        shuffled = jax.random.uniform(jax.random.fold_in(key, 1 + i), (rows,))
        order = jnp.argsort(jnp.where(jnp.arange(rows) < n_fitted, shuffled, 2.0))  # those that are not fitted last

        def one_batch(j, carry):
            networks, state = carry
            at = j * batch + jnp.arange(batch)
            grads = jax.grad(loss)(networks, order[jnp.minimum(at, rows - 1)], at < n_fitted)
            change, state = optimizer.update(grads, state)
            return optax.apply_updates(networks, change), state

        return jax.lax.fori_loop(0, n_batches, one_batch, carry)

    networks, _ = jax.lax.fori_loop(0, n_epochs, one_epoch, (networks, optimizer.init(networks)))
    held_out = (jnp.arange(rows) >= n_fitted) & (jnp.arange(rows) < n)
    off = jnp.abs(jax.vmap(lambda layers: errors(layers, jnp.arange(rows)))(networks)).mean(0)
    return networks, jnp.where(held_out, off, 0.0).sum() / jnp.maximum(held_out.sum(), 1)


# ------------------------------------------------------------------------------------------------------------ optimism


class Optimistic(NamedTuple):
    """A fitted reward with a bonus where it has seen little. Call it on features [B P] for rewards [B].

    "ucb": the prediction + min(alpha sqrt(phi^T (C + ridge I)^-1 phi), most), where phi is `last_hidden` and C its
    covariance over the queries. "bootstrap": the largest prediction of several networks. "none": the prediction.
    """

    networks: Layers
    inverse: Float[Array, "16 16"] | None  # (C + ridge I)^-1
    alpha: float
    most: float

    @classmethod
    def of(
        cls, networks: Layers, queries: Queries, *, optimism: str, alpha: float, ridge: float, most: float
    ) -> "Optimistic":
        inverse = None
        if optimism == "ucb":
            hidden = last_hidden(_only(networks), queries.features)
            covariance = covariance_of(hidden, jnp.arange(len(hidden)) < queries.filled)
            inverse = jnp.linalg.inv(covariance + ridge * jnp.eye(len(covariance)))
        return cls(networks, inverse, alpha, most)

    def __call__(self, features: Float[Array, "B P"]) -> Float[Array, "B"]:
        rewards = jax.vmap(predicted, in_axes=(0, None))(self.networks, features).max(0)
        return rewards if self.inverse is None else rewards + self.bonus(features)

    def bonus(self, features: Float[Array, "B P"]) -> Float[Array, "B"]:
        """What "ucb" adds."""
        phi = last_hidden(_only(self.networks), features)
        # Large terms cancel here: accelerators' default would round them, even to below 0
        form = jnp.einsum("bi,ij,bj->b", phi, self.inverse, phi, precision=jax.lax.Precision.HIGHEST)
        return jnp.minimum(self.alpha * jnp.sqrt(jnp.maximum(form, 0.0)), self.most)


def _only(networks: Layers) -> Layers:
    """The first network's layers."""
    return jax.tree.map(lambda x: x[0], networks)


def covariance_of(x: Float[Array, "N D"], valid: Array) -> Float[Array, "D D"]:
    """The covariance of the valid rows, divided by their number less one (torch.cov)."""
    n = valid.sum()
    centred = jnp.where(valid[:, None], x - (x * valid[:, None]).sum(0) / n, 0.0)
    return jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST) / jnp.maximum(n - 1, 1)
