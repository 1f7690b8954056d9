"""An iteration of a method that learns from images alone, on a network of three numbers, and the same in torch."""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from diffexp_jax import parallel
from diffexp_jax.algorithms import METHODS, Batch, Inputs, Policy, Setup
from diffexp_jax.algorithms.denoising import UPDATE, folded
from diffexp_jax.sampling import CLASSIFIER_FREE, Context, load_process, sample_noise
from diffexp_jax.sampling.flow import SCHEDULER as FLOW
from tests.support.tiny import SCHEDULER

PROCESSES = {
    "epsilon": load_process(SCHEDULER),
    "v": load_process(SCHEDULER | {"prediction_type": "v_prediction"}),
    "flow": load_process({"_class_name": FLOW, "shift": 3.0}),
}
N, GROUP, T, SHAPE, RATE = 8, 2, 4, (2, 2, 3), 0.05
IDS = np.array([0, 0, 1, 1, 2, 2, 1, 1], np.int32)  # a prompt may be drawn twice
W_T = np.array([1.0, 3.0, 3.0, 3.0], np.float32)  # guidance, low at first as DiffExp's
LORA = {"a": jnp.float32(0.7), "b": jnp.float32(-0.4), "c": jnp.float32(0.3)}
UNTUNED = {"a": 0.5, "b": 0.1, "c": 0.2}
CONTEXT = Context(*(np.random.default_rng(i).standard_normal((N, 1, 1)).astype(np.float32) for i in range(2)))
KEYS = parallel.sample_keys(jax.random.key(3), N)

# Of two samples: x_0, noise, outputs of the trained policy and of another; noise levels
X_0, NOISE, OUT, OTHER = np.array(
    [
        [0.0, 0.3, -0.27, -0.89, -0.45, -0.99, 0.06, 1.34],
        [-0.49, -0.62, 0.49, 0.36, 0.11, -0.93, -0.03, 0.7],
        [-1.34, -0.46, -1.9, -1.29, -1.84, -0.24, -1.27, 0.27],
        [0.16, -0.19, -2.52, -0.54, -0.05, 0.11, -1.53, -0.48],
    ],
    np.float32,
).reshape(4, 2, 2, 2, 1)
LEVEL = np.array([0.9, 0.4], np.float32)


def evaluate(frozen, lora, x_t, step, cond):
    lora = UNTUNED if lora is None else lora
    t = jnp.reshape(step.t, (-1, 1, 1, 1)) / 1000
    return jnp.sin(lora["a"] * x_t) + lora["b"] * cond[:, :, :, None] + lora["c"] * t


def policy(process, reward=lambda images: 10.0 * images.mean((1, 2, 3))) -> Policy:
    return Policy(
        network=CLASSIFIER_FREE.network(evaluate, W_T),
        decode=lambda frozen, x_0: jax.nn.sigmoid(x_0),
        score=lambda frozen, images, tokens: (reward(images), {}),
        latent_shape=SHAPE,
        process=process,
    )


class Iteration(NamedTuple):
    x_0: np.ndarray  # [N, h, w, c], in the global order
    untuned: np.ndarray | None
    rewards: np.ndarray
    state: Any  # after it
    metrics: dict


def algorithm_of(method: str, process, n_chunks: int = 2, reward=None, optimizer=None, **settings):
    sizes = dict(n_samples=N // jax.device_count(), n_chunks=n_chunks, n_prompts=3, n_steps=T, lora_size=3)
    sizes |= dict(group=GROUP, remat=True, full_float32=True, stream=partial(parallel.stream, 0))
    rewarded = policy(process, reward) if reward else policy(process)
    return METHODS[method](**settings).make(Setup(rewarded, optimizer or optax.sgd(RATE), **sizes))


@cache
def programs(algorithm):
    """The mapped functions of an algorithm, which further iterations of it share."""
    return parallel.pmap(algorithm.sample), parallel.pmap(algorithm.update)


def iteration(algorithm, process, state=None) -> Iteration:
    """Without noise in the sampler's steps; `state` None: the first one, of LORA."""
    steps = process.make_steps(process.timesteps(T), W_T, eta=0.0)
    batch = parallel.shard(Batch(IDS, CONTEXT, IDS, KEYS), N, group=GROUP)
    state = algorithm.init(LORA) if state is None else state
    state, frozen, steps, key = parallel.replicate((state, {}, steps, jax.random.key(0)))
    sample, update = programs(algorithm)
    samples = sample(state, frozen, batch, steps)
    state, metrics = update(state, frozen, Inputs(batch, steps, key, samples))

    def in_order(x):  # [devices, chunks, B, ...]
        return x if x is None else parallel.unshard(np.asarray(x).reshape(len(x), -1, *x.shape[3:]), group=GROUP)

    latents = (in_order(x) for x in samples.trajectory)
    rewards = parallel.unshard(samples.rewards, group=GROUP)
    return Iteration(*latents, rewards, *parallel.first((state, metrics)))


# --------------------------------------------------------------------------------------------------- the same in torch


class Drawn(NamedTuple):
    """What a torch loop learns from, of the samples of an update."""

    x_t: torch.Tensor
    target: torch.Tensor
    t: torch.Tensor  # [B, 1, 1, 1]
    signal: torch.Tensor
    noise: torch.Tensor
    rows: np.ndarray  # the samples' indices


def update_keys(epoch: int) -> jax.Array:
    return folded(KEYS, UPDATE + epoch)


def drawn(kind: str, x_0: np.ndarray, t: Any, keys: jax.Array, rows: np.ndarray) -> Drawn:
    """x_0 noised at t, and what a network of this kind is to predict: the formulas written out."""
    t = np.asarray(t, np.float64)[rows]
    if kind == "flow":
        signal, noise = 1 - t / 1000, t / 1000
    else:
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        alpha_bar = np.cumprod(1 - betas)[t.astype(int)]
        signal, noise = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    t, signal, noise = (torch.tensor(x).reshape(-1, 1, 1, 1) for x in (t, signal, noise))
    x_0 = torch.tensor(np.asarray(x_0, np.float64)[rows])
    eps = torch.tensor(np.asarray(sample_noise(keys, SHAPE), np.float64)[rows])
    target = {"epsilon": eps, "v": signal * eps - noise * x_0, "flow": eps - x_0}[kind]
    return Drawn(signal * x_0 + noise * eps, target, t, signal, noise, rows)


def output(lora: dict, at: Drawn, w_t: np.ndarray | None = None) -> torch.Tensor:
    """The network's output for the prompts alone, or guided by these scales [N]."""
    lora = {name: x if isinstance(x, torch.Tensor) else float(x) for name, x in lora.items()}
    cond, uncond = (torch.tensor(x[at.rows].astype(np.float64)).reshape(-1, 1, 1, 1) for x in CONTEXT)
    if w_t is None:
        return torch.sin(lora["a"] * at.x_t) + lora["b"] * cond + lora["c"] * at.t / 1000
    w = torch.tensor(w_t[at.rows].astype(np.float64)).reshape(-1, 1, 1, 1)
    halves = (torch.sin(lora["a"] * at.x_t) + lora["b"] * x + lora["c"] * at.t / 1000 for x in (cond, uncond))
    return w * next(halves) + (1 - w) * next(halves)


def nearest_guidance(process, t: Any) -> np.ndarray:
    """Of the sampler's step whose timestep is the nearest, for each t."""
    steps = np.asarray(process.timesteps(T), np.float64)
    return W_T[np.abs(steps - np.asarray(t)[:, None]).argmin(1)]


def descended(lora: dict, loss) -> dict:
    """One step of gradient descent on loss(lora), in float64."""
    numbers = {name: torch.tensor(float(x), dtype=torch.float64, requires_grad=True) for name, x in lora.items()}
    loss(numbers).backward()
    return {name: float(x.detach() - RATE * x.grad) for name, x in numbers.items()}


def shares(n_updates: int) -> list[np.ndarray]:
    """The samples of each update: of one device the halves, groups together."""
    return np.split(np.arange(N), n_updates)


def assert_moved_as(found: dict, expected: dict, start: dict = LORA, rel: float = 2e-4) -> None:
    for name, x in start.items():
        change = float(expected[name]) - float(x)
        assert abs(change) > 1e-5, name
        np.testing.assert_allclose(float(found[name]) - float(x), change, rtol=rel)
