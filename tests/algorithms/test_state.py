"""Per-prompt reward statistics against a plain-Python version, and literal advantages."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax.algorithms.state import PromptStats, TrainState, advantages, init_stats, update_stats

update = jax.jit(update_stats)
normalise = jax.jit(advantages, static_argnames=("min_count", "clip"))


class PlainStats:
    """A deque per prompt: append the batch, then the prompt's own statistics where there are enough."""

    def __init__(self, buffer_size, min_count, clip):
        self.buffers, self.size, self.min_count, self.clip = {}, buffer_size, min_count, clip

    def advantages(self, prompts, rewards):
        for prompt, reward in zip(prompts, rewards, strict=True):
            self.buffers.setdefault(prompt, deque(maxlen=self.size)).append(float(reward))
        out = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            buffer = self.buffers[prompt]
            values = np.asarray(buffer if len(buffer) >= self.min_count else rewards, np.float64)
            out.append(np.clip((reward - values.mean()) / (values.std() + 1e-6), -self.clip, self.clip))
        return np.array(out)


@pytest.mark.parametrize(
    "n_prompts, batch, buffer_size, min_count, clip",
    [
        (4, 8, 6, 3, 5.0),
        (2, 9, 3, 2, 1.0),  # more rewards of a prompt in a batch than its buffer holds
        (12, 4, 5, 5, 5.0),  # most prompts wait long for their own statistics
        (3, 6, 4, 5, 5.0),  # a threshold that no buffer reaches: the batch's, always
        (5, 7, 4, 1, 5.0),  # own statistics from the first reward, with std 0
    ],
)
def test_against_a_deque_per_prompt(n_prompts, batch, buffer_size, min_count, clip):
    rng, stats = np.random.default_rng(0), init_stats(n_prompts, buffer_size)
    plain, own = PlainStats(buffer_size, min_count, clip), 0
    for _ in range(15):
        prompts = rng.integers(0, n_prompts, batch).astype(np.int32)
        rewards = (10 * prompts + rng.standard_normal(batch) ** 3).astype(np.float32)
        stats = update(stats, prompts, rewards)
        ours = normalise(stats, prompts, rewards, min_count=min_count, clip=clip)
        np.testing.assert_allclose(ours, plain.advantages(prompts.tolist(), rewards), atol=2e-3)
        own += sum(len(plain.buffers[p]) >= min_count for p in prompts.tolist())
    assert (own > 0) == (min_count <= buffer_size)
    for prompt, buffer in plain.buffers.items():
        assert sorted(np.asarray(stats.rewards[prompt])[: len(buffer)].tolist()) == sorted(buffer)


def test_ring_buffer_literal():
    stats = update(init_stats(2, 3), jnp.array([1, 0, 1, 1, 1]), jnp.array([1.0, 9.0, 2.0, 3.0, 4.0]))
    np.testing.assert_array_equal(stats.rewards, [[9.0, 0.0, 0.0], [4.0, 2.0, 3.0]])  # the fourth took the first's
    np.testing.assert_array_equal(stats.seen, [1, 4])
    again = update(stats, jnp.array([1, 1]), jnp.array([5.0, 6.0]))
    np.testing.assert_array_equal(again.rewards[1], [4.0, 5.0, 6.0])


def test_entering_one_by_one_is_entering_a_batch():
    prompts, rewards = jnp.array([0, 1, 0, 0]), jnp.array([1.0, 2.0, 3.0, 4.0])
    whole, stats = update(init_stats(2, 2), prompts, rewards), init_stats(2, 2)
    for i in range(4):
        stats = update(stats, prompts[i : i + 1], rewards[i : i + 1])
    np.testing.assert_array_equal(stats.rewards, whole.rewards)
    np.testing.assert_array_equal(stats.seen, whole.seen)


def test_advantages_of_the_whole_batch_literal():
    """Rewards 1, 3, 5, 7: mean 4, population std sqrt(5)."""
    prompts, rewards = jnp.arange(4), jnp.array([1.0, 3.0, 5.0, 7.0])
    stats = update(init_stats(4, 32), prompts, rewards)
    ours = normalise(stats, prompts, rewards, min_count=16, clip=5.0)
    np.testing.assert_allclose(ours, [-1.3416408, -0.4472136, 0.4472136, 1.3416408], rtol=1e-5)


def test_a_share_of_the_batch_has_the_whole_batch_statistics():
    """A device sees its rows only, but the mean and std are those of all."""
    prompts, rewards = jnp.array([0, 0, 0, 1, 2, 3]), jnp.array([1.0, 2.0, 6.0, 3.0, 5.0, 7.0])
    stats = update(init_stats(4, 8), prompts, rewards)
    whole = normalise(stats, prompts, rewards, min_count=3, clip=5.0)
    for share in (slice(0, 2), slice(2, 6)):
        own = normalise(stats, prompts[share], rewards[share], batch_rewards=rewards, min_count=3, clip=5.0)
        np.testing.assert_allclose(own, whole[share], rtol=1e-5)


def test_advantages_of_a_prompt_literal():
    """Prompt 0 holds 0 and 4 (mean 2, std 2); prompt 1 has too few, so the batch's 4 and 10 count (7, 3)."""
    stats = update(init_stats(2, 4), jnp.array([0]), jnp.array([0.0]))
    prompts, rewards = jnp.array([0, 1]), jnp.array([4.0, 10.0])
    stats = update(stats, prompts, rewards)
    ours = normalise(stats, prompts, rewards, min_count=2, clip=5.0)
    np.testing.assert_allclose(ours, [1.0, 1.0], rtol=1e-5)


@pytest.mark.parametrize("count, expected", [(15, 1.0), (16, 15**0.5)])
def test_min_count_boundary(count, expected):
    """A 1 among n - 1 zeros of its prompt gives sqrt(n - 1); in the batch, a 1 and a 0, it gives 1."""
    stats = update(init_stats(2, 32), jnp.zeros(count - 1, jnp.int32), jnp.zeros(count - 1))
    prompts, rewards = jnp.array([0, 1]), jnp.array([1.0, 0.0])
    stats = update(stats, prompts, rewards)
    ours = normalise(stats, prompts, rewards, min_count=16, clip=5.0)
    assert float(ours[0]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("clip", [5.0, 2.0])
def test_clip(clip):
    rewards = jnp.zeros(100).at[0].set(1.0).at[1].set(-1.0)
    prompts = jnp.arange(100)
    stats = update(init_stats(100, 32), prompts, rewards)
    ours = normalise(stats, prompts, rewards, min_count=16, clip=clip)
    np.testing.assert_array_equal(ours[:3], [clip, -clip, 0.0])


def test_equal_rewards_give_no_advantage():
    """std 0 neither divides by zero nor blows up."""
    prompts, rewards = jnp.zeros(6, jnp.int32), jnp.full(6, 0.25)
    stats = update(init_stats(1, 4), prompts, rewards)
    np.testing.assert_array_equal(normalise(stats, prompts, rewards, min_count=2, clip=5.0), 0.0)


def test_other_prompts_are_untouched():
    stats = PromptStats(jnp.arange(6.0).reshape(3, 2), jnp.array([2, 1, 5]))
    after = update(stats, jnp.array([1]), jnp.array([7.0]))
    np.testing.assert_array_equal(after.rewards, [[0.0, 1.0], [2.0, 7.0], [4.0, 5.0]])
    np.testing.assert_array_equal(after.seen, [2, 2, 5])


def test_train_state_passes_through_jit():
    state = TrainState(jnp.int32(3), {"A": jnp.ones(2)}, (jnp.zeros(1),), init_stats(2, 4))
    after = jax.jit(lambda s: s.replace(iteration=s.iteration + 1))(state)
    assert isinstance(after, TrainState) and int(after.iteration) == 4
    assert [leaf.shape for leaf in jax.tree.leaves(after)] == [(), (2,), (1,), (2, 4), (2,)]
    assert len(jax.tree.leaves(state.replace(extra=None))) == 3  # algorithms without statistics
