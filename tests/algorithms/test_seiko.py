"""SEIKO: what a round asks and keeps, its update against a plain loop, and whether it learns."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffexp_jax import parallel, train
from diffexp_jax.algorithms import Batch, Inputs
from diffexp_jax.algorithms.alignprop import live_steps
from diffexp_jax.algorithms.optimizer import averaged, make_optimizer, with_new_moments
from diffexp_jax.algorithms.seiko import SEIKO, Climb, climb_loss, features_of, seiko
from diffexp_jax.errors import InputError
from diffexp_jax.experiment import Experiment
from diffexp_jax.rewards import load_reward
from diffexp_jax.run.metrics import read_metrics
from diffexp_jax.sampling import initial_latents, step_noise
from diffexp_jax.settings import Settings, checked
from tests.support.runs import PLAIN
from tests.support.two_numbers import CONTEXT, GROUP, LORA, POLICY, PROCESS, SHAPE, STEPS, N, T, network

P = int(np.prod(SHAPE))
KEYS = parallel.sample_keys(jax.random.key(3), N)
IDS = np.arange(N, dtype=np.int32) // GROUP
BEFORE = {"a": jnp.float32(0.2), "b": jnp.float32(0.1)}


def flat(frozen, images):
    return images.reshape(len(images), -1)


policy = POLICY._replace(features=flat)


class Answer:
    """A reward to climb that was not fitted to anything: a weighted sum of the features."""

    inverse = None
    weights = np.linspace(-1.0, 2.0, P, dtype=np.float32)

    def __call__(self, features):
        return features @ self.weights


def climb(kl_weight=0.3, **changes):
    options = dict(n_shares=1, n_epochs=1, loss_coefficient=0.5, reward_target=None)
    options |= {"live": partial(live_steps, truncation="fixed", k=2), "chain": {"remat": True, "kl_weight": kl_weight}}
    return Climb(**options | changes)


def algorithm(optimizer, how, **changes):
    options = dict(fit=lambda networks, queries, key: (networks, jnp.float32(0.0)), networks=jnp.zeros(3))
    options |= dict(optimistic=lambda networks, queries: Answer(), buffer=20, label_noise=0.0)
    return seiko(policy, optimizer, climb=how, n_features=P, n_chunks=2, group=GROUP, **options | changes)


def a_round(algorithm, state=None):
    """(samples, state, metrics) of an iteration on all devices."""
    batch = parallel.shard(Batch(IDS, CONTEXT, IDS, KEYS), N, group=GROUP)
    state = algorithm.init(LORA) if state is None else state
    state, frozen, steps, key = parallel.replicate((state, {}, STEPS, jax.random.key(0)))
    samples = parallel.pmap(algorithm.sample)(state, frozen, batch, steps)
    state, metrics = parallel.pmap(algorithm.update)(state, frozen, Inputs(batch, steps, key, samples))
    return samples, parallel.first(state), parallel.first(metrics)


# --------------------------------------------------------------------------------------------------------------- query


def test_a_round_keeps_what_it_asked():
    samples, state, metrics = a_round(algorithm(optax.sgd(0.0), climb()))
    rewards = parallel.unshard(samples.rewards, group=GROUP)
    kept = state.extra.queries
    np.testing.assert_array_equal(kept.rewards[:N], rewards)
    np.testing.assert_array_equal(kept.rewards[N:], 0)
    np.testing.assert_allclose(np.linalg.norm(kept.features[:N], axis=1), 1.0, rtol=1e-6)
    # the reward is 10 times the mean of the numbers that the features are a direction of
    direction = kept.features[:N].sum(1) / P
    scale = rewards / 10.0 / direction
    np.testing.assert_allclose(10.0 * scale * direction, rewards, rtol=1e-5)
    assert int(kept.seen) == N == metrics["surrogate/queries"]
    _, state, metrics = a_round(algorithm(optax.sgd(0.0), climb()), state)
    assert metrics["surrogate/queries"] == 2 * N and metrics["reward/mean"] == pytest.approx(rewards.mean(), rel=1e-6)


def test_images_are_read_times_their_prompts():
    images, text = (
        np.random.default_rng(i).normal(size=(3, *shape)).astype(np.float32) for i, shape in ((0, SHAPE), (1, (P,)))
    )
    alone, both = (features_of(policy, {}, images, which) for which in (None, text))
    image, unit = images.reshape(3, P), text / np.linalg.norm(text, axis=1, keepdims=True)
    image = image / np.linalg.norm(image, axis=1, keepdims=True)
    np.testing.assert_allclose(alone, image, rtol=1e-6)
    np.testing.assert_allclose(both, image * unit * np.sqrt(P), rtol=1e-5)
    np.testing.assert_allclose(both.sum(1) / np.sqrt(P), (image * unit).sum(1), atol=1e-6)  # the cosine


def test_noise_is_added_to_the_answers_alone():
    samples, state, metrics = a_round(algorithm(optax.sgd(0.0), climb(), label_noise=0.5))
    rewards = parallel.unshard(samples.rewards, group=GROUP)
    off = state.extra.queries.rewards[:N] - rewards
    assert 0.1 < off.std() < 1.0
    assert metrics["reward/mean"] == pytest.approx(rewards.mean(), rel=1e-6)


# --------------------------------------------------------------------------------------------------------------- climb


def by_hand(lora, before, keys, *, kl_weight, target, live, context=CONTEXT):
    """The loss of a round's update, step by step: outputs before the cut are constants, of both networks."""
    x, paths = initial_latents(keys, SHAPE), 0.0
    for i in range(T):
        row = jax.tree.map(lambda column, i=i: column[i], STEPS)
        outs = [network({}, which, x, row, context) for which in (lora, before)]
        if not live[i]:
            outs = [jax.lax.stop_gradient(out) for out in outs]
        (mean, std), (other, _) = (PROCESS.transition(x, out, row) for out in outs)
        paths += (jnp.square(mean - other) / (2 * std**2)).mean((1, 2, 3))
        x = mean + std * step_noise(keys, jnp.int32(i), SHAPE)
    features = jax.nn.sigmoid(x).reshape(len(keys), -1)
    predictions = (features / jnp.linalg.norm(features, axis=1, keepdims=True)) @ Answer.weights
    per_sample = -predictions if target is None else jnp.abs(target - predictions)
    return (0.5 * per_sample + kl_weight * paths).mean()


@pytest.mark.parametrize("kl_weight,target", [pytest.param(0.3, None, marks=pytest.mark.slow), (0.3, 4.0), (0.0, None)])
def test_an_update_is_the_plain_loops(kl_weight, target):
    live = np.arange(T) >= T - 2
    chunk = Batch(IDS, CONTEXT, IDS, KEYS)
    how = climb(kl_weight=kl_weight, reward_target=target)

    def ours(lora):
        return climb_loss(policy, how, {}, Answer(), BEFORE, STEPS, lora, chunk, live)[0]

    def theirs(lora):
        return by_hand(lora, BEFORE, KEYS, kl_weight=kl_weight, target=target, live=live)

    (value, grads), (wanted, slopes) = (jax.jit(jax.value_and_grad(f))(LORA) for f in (ours, theirs))
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    for name in LORA:
        np.testing.assert_allclose(grads[name], slopes[name], rtol=1e-4)


def test_a_round_takes_its_updates_on_new_noise():
    """Each from the round's first model: three updates by gradient descent move the LoRA by three gradients."""
    _, state, metrics = a_round(algorithm(optax.sgd(1e-3), climb(n_epochs=3)))
    lora, live = LORA, np.arange(T) >= T - 2
    for i in range(3):
        keys = jax.vmap(lambda key, i=i: jax.random.fold_in(jax.random.fold_in(key, 2**30), i))(KEYS)
        loss = partial(by_hand, before=LORA, keys=keys, kl_weight=0.3, target=None, live=live)
        lora = jax.tree.map(lambda x, g: x - 1e-3 * g, lora, jax.jit(jax.grad(loss))(lora))
    for name in LORA:
        np.testing.assert_allclose(state.lora[name] - LORA[name], lora[name] - LORA[name], rtol=1e-3)
    assert metrics["kl/path"] > 0


def test_a_share_climbs_on_its_own_prompts():
    _, state, _ = a_round(algorithm(optax.sgd(1e-3), climb(n_shares=2)))
    lora, live = LORA, np.arange(T) >= T - 2
    for i in range(2):
        keys = jax.vmap(lambda key, i=i: jax.random.fold_in(jax.random.fold_in(key, 2**30), i))(KEYS)
        rows = slice(i * N // 2, (i + 1) * N // 2)  # on one device
        loss = partial(by_hand, before=LORA, keys=keys[rows], kl_weight=0.3, target=None, live=live)
        context = jax.tree.map(lambda x, rows=rows: x[rows], CONTEXT)
        lora = jax.tree.map(lambda x, g: x - 1e-3 * g, lora, jax.jit(jax.grad(partial(loss, context=context)))(lora))
    for name in LORA:
        np.testing.assert_allclose(state.lora[name] - LORA[name], lora[name] - LORA[name], rtol=1e-3)


@pytest.mark.slow
def test_the_path_kl_holds_a_round_back():
    moved = []
    for kl_weight in (0.0, 3.0):
        _, state, _ = a_round(algorithm(optax.sgd(1e-4), climb(kl_weight=kl_weight, n_epochs=24)))
        moved.append(sum(abs(state.lora[name] - LORA[name]) for name in LORA))
    assert moved[1] < 0.6 * moved[0]


def test_adams_moments_begin_anew_and_the_rest_goes_on():
    optim = Settings().optim
    optimizer = averaged(make_optimizer(optim, 10), 0.5)
    state = optimizer.init(LORA)
    for _ in range(3):
        change, state = optimizer.update(LORA, state, LORA)
    anew = with_new_moments(state)
    adam = anew.inner[1][0]
    assert int(adam.count) == 0 and all(float(x) == 0 for x in jax.tree.leaves((adam.mu, adam.nu)))
    assert int(anew.n) == 3 and jax.tree.leaves(anew.average) == jax.tree.leaves(state.average)
    assert jax.tree.structure(anew) == jax.tree.structure(state)


# ------------------------------------------------------------------------------------------------------------ settings


def test_what_a_round_costs():
    method = SEIKO(inner_epochs=4)
    assert method.chains == 5
    climbing = {"to climb": 1.9, "to climb with a gradient": 2.1}
    expected = {"to sample": 1.0, "of the round's first model": 4.0} | climbing
    assert method.passes(20, True) == pytest.approx(expected)
    assert sum(SEIKO(inner_epochs=4, kl_weight=0.0).passes(20, True).values()) == 5.0


def test_a_target_that_is_none_is_refused_by_its_own_name():
    with pytest.raises(InputError, match="seiko.reward_target='high'"):
        SEIKO(reward_target="high").check(20)


def test_a_reward_that_reads_no_prompts_is_refused(make_config):
    config = make_config("seiko", {"seiko.reads_text": True, "reward": "emoji_aesthetic", "seiko.truncation_k": 3})
    said = "seiko.reads_text=True: the reward of seiko.features='reward' has no features of prompts; wants one that has"
    with pytest.raises(InputError, match=said):
        Experiment.build(checked(config), weights=False)


@pytest.mark.parametrize("features", ["reward", "emoji_pickscore"])
def test_the_texts_of_a_batch_are_its_prompts(make_config, features):
    """Features of the drawn prompts, of the trained reward or of another one."""
    settings = {"seiko.reads_text": True, "seiko.features": features, "seiko.truncation_k": 3}
    settings |= {"reward": "emoji_pickscore" if features == "reward" else "emoji_aesthetic"}
    experiment = Experiment.build(checked(make_config("seiko", settings)))
    batch = experiment.draw_batch(0, None)
    clip = load_reward("emoji_pickscore")
    texts = [experiment.train.texts[i] for i in parallel.unshard(batch.prompt_id)]
    expected = clip.text_features(clip.params, clip.tokenize(texts))
    np.testing.assert_allclose(parallel.unshard(batch.text), expected, atol=1e-5)
    assert len({tuple(row) for row in np.asarray(expected).round(3)}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("optimism", ["ucb", "bootstrap"])
def test_learns_brightness(make_config, tiny_clip, tmp_path, optimism):
    """On a real, tiny model, by a reward in plain Python, which the features of a random CLIP stand for."""
    settings = PLAIN | {"reward": "python:sample_rewards:brightness_of_bytes", "iterations": 6, "sampling.eta": 1.0}
    settings |= {"batch.samples": 32, "batch.samples_per_forward": 16, "exploration.enabled": False}
    settings |= {"optim.lr": 1e-2, "optim.weight_decay": 0.0, "seiko.loss_coefficient": 1.0}
    settings |= {"seiko.features": f"pickscore:{tiny_clip}", "seiko.optimism": optimism, "seiko.fit_batch": 16}
    settings |= {"seiko.updates": 1, "seiko.inner_epochs": 4, "seiko.fit_epochs": 100, "seiko.truncation_k": 3}
    settings |= {"seiko.buffer": 256}
    train.run(make_config("seiko", settings), tmp_path / "run")
    rows = read_metrics(tmp_path / "run")[1:]
    assert rows[-1]["reward/mean"] > rows[0]["reward/mean"] + 0.5
    assert [row["reward_queries"] for row in rows] == [32 * n for n in range(1, 7)]
    assert rows[-1]["surrogate/queries"] == 192
