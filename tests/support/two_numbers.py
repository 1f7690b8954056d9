"""An iteration of a method by the log-probs of steps, on a network of two numbers; prompts have two samples each."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffexp_jax import parallel
from diffexp_jax.algorithms import Algorithm, Batch, Inputs, Policy
from diffexp_jax.sampling import Context, Network, load_process, step_log_prob
from tests.support.tiny import SCHEDULER

T, N, GROUP, SHAPE = 3, 8, 2, (2, 2, 3)
PROCESS = load_process(SCHEDULER)
STEPS = PROCESS.make_steps(PROCESS.timesteps(T), np.full(T, 3.0, np.float32), eta=1.0)
LORA = {"a": jnp.float32(0.4), "b": jnp.float32(-0.1)}
CONTEXT = Context(*(np.random.default_rng(i).standard_normal((N, 1, 1)).astype(np.float32) for i in range(2)))


def network(frozen, lora, x_t, step, context):
    a, b = (0.3, 0.0) if lora is None else (lora["a"], lora["b"])
    return jnp.sin(a * x_t) + b * context.cond.mean((1, 2))[:, None, None, None]


POLICY = Policy(
    network=Network(network),
    decode=lambda frozen, x_0: jax.nn.sigmoid(x_0),
    score=lambda frozen, images, tokens: (10.0 * images.mean((1, 2, 3)), {}),
    latent_shape=SHAPE,
    process=PROCESS,
)


def iteration(algorithm: Algorithm, steps: Any = STEPS):
    """((x_T, x_{t-1}, log-probs, rewards) in the global order, state after it, metrics)."""
    ids = np.arange(N, dtype=np.int32) // GROUP
    batch = Batch(ids, CONTEXT, ids, parallel.sample_keys(jax.random.key(3), N))
    batch = parallel.shard(batch, N, group=GROUP)
    state, frozen, steps, key = parallel.replicate((algorithm.init(LORA), {}, steps, jax.random.key(0)))
    samples = parallel.pmap(algorithm.sample)(state, frozen, batch, steps)
    state, metrics = parallel.pmap(algorithm.update)(state, frozen, Inputs(batch, steps, key, samples))

    def in_order(x):  # [devices, chunks, T, m, ...] -> [T, N, ...]
        x = np.asarray(x).swapaxes(1, 2)
        x = x.reshape(len(batch.key), x.shape[1], -1, *x.shape[4:]).swapaxes(1, 2)
        return parallel.unshard(x, group=GROUP).swapaxes(0, 1)

    kept = samples.trajectory
    chains = in_order(kept.x_T[:, :, None]), in_order(kept.x_tm1), in_order(kept.log_prob)
    return (*chains, parallel.unshard(samples.rewards, group=GROUP)), parallel.first(state), parallel.first(metrics)


def learnt(algorithm: Algorithm, lora: dict, iterations: int = 10) -> float:
    """How much the mean reward of 64 samples that are never trained on rises."""
    n, context = 64, jax.tree.map(lambda x: np.resize(x, (64, *x.shape[1:])), CONTEXT)
    ids = np.arange(n, dtype=np.int32) // GROUP

    def batch(it):
        keys = parallel.sample_keys(parallel.stream(0, "noise", it), n)
        return parallel.shard(Batch(ids, context, ids, keys), n, group=GROUP)

    state, steps, key = parallel.replicate((algorithm.init(lora), STEPS, jax.random.key(0)))
    sample, update, frozen = parallel.pmap(algorithm.sample), parallel.pmap(algorithm.update), parallel.replicate({})
    before = sample(state, frozen, batch(1000), steps).rewards.mean()
    for it in range(iterations):
        samples = sample(state, frozen, batch(it), steps)
        state, _ = update(state, frozen, Inputs(batch(it), steps, key, samples))
    return float(sample(state, frozen, batch(1000), steps).rewards.mean() - before)


def log_probs(lora, samples, rows):
    """[T, B] of the samples, differentiable in the LoRA."""
    x_T, x_tm1, _, _ = samples
    context = jax.tree.map(lambda x: jnp.asarray(x)[rows], CONTEXT)

    def one(x_t, x_tm1, step):
        return step_log_prob(PROCESS, partial(network, {}, lora), x_t[rows], x_tm1[rows], step, context)

    return jax.vmap(one)(np.concatenate([x_T, x_tm1[:-1]]), x_tm1, STEPS)
