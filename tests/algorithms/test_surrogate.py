"""A reward learnt from queries: the ring of answers, the fit against torch's loop, the bonus against numpy."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax.algorithms import surrogate
from diffexp_jax.algorithms.state import Queries
from diffexp_jax.algorithms.surrogate import Optimistic

P = 6
RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((40, P)).astype(np.float32)
REWARDS = (FEATURES @ RNG.standard_normal(P)).astype(np.float32)


no_queries = jax.jit(surrogate.no_queries, static_argnums=(0, 1))
entered, predicted = jax.jit(surrogate.entered), jax.jit(surrogate.predicted)
fit = jax.jit(surrogate.fit, static_argnames=("n_epochs", "batch", "lr"))


def call(reward, features):
    return jax.jit(lambda x: reward(x))(features)


def bonus(reward, features):
    return jax.jit(reward.bonus)(features)


def queries(n, size=40):
    return entered(no_queries(size, P), FEATURES[:n], REWARDS[:n])


@cache
def networks(n=1):
    init = jax.vmap(partial(surrogate.init_network, n_features=P))
    return jax.jit(lambda key: init(jax.random.split(key, n)))(jax.random.key(1))


def one(networks, i=0):
    return jax.tree.map(lambda x: np.asarray(x)[i], networks)


# ------------------------------------------------------------------------------------------------------------- queries


def test_a_full_buffer_forgets_the_oldest_query():
    kept = no_queries(5, P)
    for start in (0, 3, 6):
        kept = entered(kept, FEATURES[start : start + 3], REWARDS[start : start + 3])
    assert int(kept.seen) == 9 and int(kept.filled) == 5
    np.testing.assert_array_equal(np.sort(kept.rewards), np.sort(REWARDS[4:9]))
    rows = [int(np.flatnonzero(REWARDS == reward)[0]) for reward in np.asarray(kept.rewards)]
    np.testing.assert_array_equal(kept.features, FEATURES[rows])


def test_rows_that_hold_nothing_are_not_counted():
    assert int(queries(7).filled) == 7


# ----------------------------------------------------------------------------------------------------------------- fit


def test_the_network_begins_as_torchs():
    layers = jax.jit(surrogate.init_network, static_argnums=1)(jax.random.key(0), 768)
    layers = jax.tree.map(np.asarray, layers)
    assert [kernel.shape for kernel, _ in layers] == [(768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)]
    for kernel, bias in layers:
        most = len(kernel) ** -0.5
        for x in (kernel, bias):
            assert 0.9 * most * (x.size > 16) <= np.abs(x).max() <= most
        np.testing.assert_allclose(kernel.std(), most / 3**0.5, rtol=0.05 if kernel.size > 100 else 0.4)


def their_fit(torch, layers, features, rewards, n_epochs, lr):
    linear = []
    for kernel, bias in layers:
        layer = torch.nn.Linear(*kernel.shape)
        layer.weight.data, layer.bias.data = torch.tensor(np.array(kernel.T)), torch.tensor(np.array(bias))
        linear.append(layer)
    model = torch.nn.Sequential(*linear)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(n_epochs):
        optimizer.zero_grad()
        torch.nn.MSELoss()(model(torch.tensor(features))[:, 0], torch.tensor(rewards)).backward()
        optimizer.step()
    return lambda x: model(torch.tensor(x))[:, 0].detach().numpy()


def test_the_fit_is_torchs():
    """All queries at a time, so that their order does not count; the newest twentieth is held out."""
    torch = pytest.importorskip("torch")
    start = networks()
    fitted, error = fit(start, queries(40), jax.random.key(0), n_epochs=15, batch=64, lr=1e-3)
    theirs = their_fit(torch, one(start), FEATURES[:38], REWARDS[:38], 15, 1e-3)
    ours = predicted(one(fitted), FEATURES)
    np.testing.assert_allclose(ours, theirs(FEATURES), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(error, np.abs(theirs(FEATURES[38:]) - REWARDS[38:]).mean(), rtol=1e-2)


def test_the_fit_learns_in_batches_and_from_a_buffer_that_is_not_full():
    rows = fit(networks(), queries(30, size=64), jax.random.key(0), n_epochs=120, batch=8, lr=1e-3)[0]
    off = np.abs(predicted(one(rows), FEATURES[:28]) - REWARDS[:28])
    assert off.mean() < 0.1 * np.abs(REWARDS).mean()


def test_the_fit_does_not_depend_on_where_the_ring_begins():
    whole = queries(40)
    turned = Queries(np.roll(whole.features, 7, 0), np.roll(whole.rewards, 7), whole.seen + 7)
    fits = [fit(networks(), x, jax.random.key(0), n_epochs=2, batch=16, lr=1e-3) for x in (whole, turned)]
    for ours, theirs in zip(*map(jax.tree.leaves, fits), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_bootstrapped_networks_are_fitted_to_other_queries():
    same = jax.tree.map(lambda x: np.concatenate([x, x]), networks())
    fitted, _ = fit(same, queries(40), jax.random.key(0), n_epochs=3, batch=16, lr=1e-3)
    first, second = (predicted(one(fitted, i), FEATURES) for i in range(2))
    assert np.abs(first - second).max() > 1e-3


# ------------------------------------------------------------------------------------------------------------ optimism

BOUND = {"alpha": 0.5, "ridge": 1e-3, "most": 10.0}


def test_the_bound_is_of_the_last_layers_covariance():
    """phi^T (Cov + ridge I)^-1 phi by numpy, where np.cov divides by n - 1, of the rows that hold something."""
    layers, kept = networks(), queries(30, size=64)
    reward = Optimistic.of(layers, kept, optimism="ucb", **BOUND)
    phi = np.asarray(FEATURES, np.float64)
    for kernel, bias in one(layers)[:-1]:
        phi = phi @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)
    inverse = np.linalg.inv(np.cov(phi[:30].T) + 1e-3 * np.eye(16))
    wanted = 0.5 * np.sqrt(np.einsum("bi,ij,bj->b", phi, inverse, phi))
    np.testing.assert_allclose(bonus(reward, FEATURES), wanted, rtol=1e-3)
    np.testing.assert_allclose(call(reward, FEATURES), predicted(one(layers), FEATURES) + wanted, rtol=1e-3)


def test_the_bound_is_limited():
    reward = Optimistic.of(networks(), queries(30), optimism="ucb", alpha=100.0, ridge=1e-3, most=0.25)
    np.testing.assert_array_equal(bonus(reward, FEATURES), np.full(40, 0.25, np.float32))


def test_a_bound_that_rounding_puts_below_zero_is_none():
    reward = Optimistic.of(networks(), queries(30), optimism="ucb", **BOUND)
    reward = reward._replace(inverse=-reward.inverse)
    np.testing.assert_array_equal(bonus(reward, FEATURES), np.zeros(40, np.float32))


def test_what_is_far_from_the_queries_has_the_larger_bound():
    reward = Optimistic.of(networks(), queries(30), optimism="ucb", **BOUND)
    near, far = (float(bonus(reward, FEATURES[:30].mean(0)[None] * scale)[0]) for scale in (1.0, 1000.0))
    assert far > 2 * near


def test_no_bonus_is_the_prediction():
    expected = predicted(one(networks()), FEATURES)
    for options in ({"optimism": "none"}, {"optimism": "ucb", "alpha": 0.0}):
        reward = Optimistic.of(networks(), queries(30), **(BOUND | options))
        np.testing.assert_array_equal(call(reward, FEATURES), expected)


def test_bootstrap_is_the_largest_of_its_networks():
    four = networks(4)
    reward = Optimistic.of(four, queries(30), optimism="bootstrap", **BOUND)
    each = np.stack([predicted(one(four, i), FEATURES) for i in range(4)])
    np.testing.assert_allclose(call(reward, FEATURES), each.max(0), rtol=1e-5)
    assert len(set(each.argmax(0))) > 1


def drawn(n_in, n_out, layer):
    rng = np.random.default_rng(layer)
    kernel = (rng.standard_normal((n_in, n_out)) / n_in**0.5).astype(np.float32)
    return kernel, rng.standard_normal(n_out).astype(np.float32)


def test_the_authors_numbers():
    """Of SEIKO's online_AestheticScorerDiff with optimism "UCB" on CLIP L/14's 768 features, run once in torch 2.13."""
    sizes = (768, *surrogate.WIDTHS)
    layers = [drawn(*pair, i) for i, pair in enumerate(zip(sizes, sizes[1:], strict=False))]
    features = np.random.default_rng(9).standard_normal((40, 768)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    kept = Queries(features[:30], np.zeros(30, np.float32), np.int32(30))
    networks = jax.tree.map(lambda x: x[None], layers)
    reward = Optimistic.of(networks, kept, optimism="ucb", alpha=1e-2, ridge=1e-3, most=10.0)
    expected = [-0.16756582, -0.16259193, -0.14134276, -0.16161394]
    np.testing.assert_allclose(predicted(layers, features[36:]), expected, rtol=1e-4)
    np.testing.assert_allclose(call(reward, features[36:]), [1.6335071, 1.6251210, 1.6550181, 1.6380520], rtol=1e-4)
    slopes = jax.jit(jax.grad(lambda x: reward(x / jnp.linalg.norm(x, axis=1, keepdims=True)).sum()))(features[36:])
    np.testing.assert_allclose(np.linalg.norm(slopes, axis=1), [1.0396750, 1.0395341, 1.0393471, 1.0395987], rtol=1e-4)
    np.testing.assert_allclose(slopes[:, 5], [0.008724876, 0.008307557, 0.008076197, 0.009847274], rtol=1e-3)
    limited = Optimistic.of(networks, kept, optimism="ucb", alpha=1.0, ridge=1e-3, most=10.0)
    np.testing.assert_allclose(call(limited, features[36:]), np.array(expected) + 10.0, rtol=1e-5)
