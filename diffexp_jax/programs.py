"""The compiled programs of a run, made from its settings and its problem: training and the dry run use the same."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from diffexp_jax import check, evaluation, parallel
from diffexp_jax.algorithms import METHODS, Algorithm, Policy, Samples, Setup
from diffexp_jax.models.precision import is_full_float32
from diffexp_jax.problem import Problem, model_dtype


class Programs(NamedTuple):
    """One iteration, and evaluation; all but `algorithm` are mapped over the devices."""

    algorithm: Algorithm
    sample: Callable | None  # None where the algorithm samples inside its update
    update: Callable
    generate: Callable


def make_programs(config: ConfigDict, problem: Problem) -> Programs:
    """The programs of the configured algorithm on this model and reward, whose arrays may be shapes."""
    algorithm = make_algorithm(config, problem)
    generate = evaluation.make_generate(
        problem.model,
        n_chunks=check.batch_split(config)[0],
        lora_scale=config.lora.alpha / config.lora.rank,
    )
    if problem.trained.start:
        sample = sample_and_score(config, problem)
    else:
        sample = algorithm.sample and parallel.pmap(algorithm.sample)
    return Programs(algorithm, sample, parallel.pmap(algorithm.update, donate_argnums=0), generate)


def sample_and_score(config: ConfigDict, problem: Problem) -> Callable[..., Samples]:
    """The mapped `Algorithm.sample` for a reward in plain Python: it scores a chunk while the next one samples."""
    (n_chunks, m), reward = check.batch_split(config), problem.trained
    sample = parallel.pmap(make_algorithm(config, problem, n_chunks=1).sample)
    slices = [slice(i * m, (i + 1) * m) for i in range(n_chunks)]
    split = parallel.pmap(lambda batch: [jax.tree.map(operator.itemgetter(own), batch) for own in slices])
    join = parallel.pmap(lambda chunks: jax.tree.map(lambda *x: jnp.concatenate(x), *chunks))
    to_bytes = parallel.pmap(evaluation.as_bytes)

    def all_chunks(state, frozen, batch, steps) -> Samples:
        chunks, waits = [], []
        for chunk in split(batch):
            chunks.append(sample(state, frozen, chunk, steps))
            images = to_bytes(chunks[-1].images)  # not there yet: the thread is who waits for the device
            waits.append(reward.start(partial(parallel.unshard, images), parallel.unshard(chunk.tokens)))
        samples = jax.block_until_ready(join(chunks))  # what a reward may take is counted from here
        return samples._replace(rewards=parallel.place(np.concatenate([wait() for wait in waits])))

    return all_chunks


def make_scorers(config: ConfigDict, problem: Problem, frozen: Any) -> dict[str, Callable]:
    """What evaluation scores with, by name: every reward on its published path."""
    batch = check.batch_split(config)[1] * jax.device_count()
    return {
        name: evaluation.make_official_scorer(
            reward, batch=batch, params=frozen["reward"] if reward is problem.trained else None
        )
        for name, reward in problem.rewards.items()
    }


def make_algorithm(config: ConfigDict, problem: Problem, *, n_chunks: int | None = None) -> Algorithm:
    """The configured algorithm, on the loaded model and reward; `n_chunks` None: as many as the config comes to."""
    model, scale = problem.model, config.lora.alpha / config.lora.rank
    reward, n_chunks = problem.trained, n_chunks or check.batch_split(config)[0]
    policy = Policy(
        denoise=lambda frozen, lora: evaluation.denoiser(model, frozen, lora, lora_scale=scale),
        decode=lambda frozen, x_0: model.decode(frozen["model"], x_0),
        score=None if reward.start else lambda frozen, *args: reward.score(frozen["reward"], *args),
        latent_shape=model.latent_shape,
        process=model.process,
    )
    o = config.optim
    optimizer = optax.chain(
        optax.clip_by_global_norm(o.grad_clip),
        optax.adamw(o.lr, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay),
    )
    setup = Setup(
        policy,
        optimizer,
        n_chunks=n_chunks,
        n_prompts=len(problem.train.texts),
        remat=config.model.remat != "none",
        full_float32=is_full_float32(config.model.matmul_precision, model_dtype(config)),
    )
    return METHODS[config.algorithm].make(setup, check.method_settings(config))
