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

from diffexp_jax import backend, check, evaluation, parallel
from diffexp_jax.algorithms import Algorithm, Policy, Samples
from diffexp_jax.algorithms.alignprop import alignprop
from diffexp_jax.algorithms.ddpo import ddpo
from diffexp_jax.models.precision import is_full_float32
from diffexp_jax.problem import Problem, model_dtype


class Programs(NamedTuple):
    """One iteration, and evaluation; all but `algorithm` are mapped over the devices."""

    algorithm: Algorithm
    sample: Callable | None  # None where the algorithm samples inside its update
    update: Callable
    generate: Callable


def make_programs(config: ConfigDict, problem: Problem, prediction_type: str) -> Programs:
    """The programs of the configured algorithm on this model and reward, whose arrays may be shapes."""
    algorithm = make_algorithm(config, problem, prediction_type)
    generate = evaluation.make_generate(
        problem.model,
        prediction_type=prediction_type,
        n_chunks=check.batch_split(config)[0],
        lora_scale=config.lora.alpha / config.lora.rank,
    )
    if problem.trained.start:
        sample = sample_and_score(config, problem, prediction_type)
    else:
        sample = algorithm.sample and parallel.pmap(algorithm.sample)
    return Programs(algorithm, sample, parallel.pmap(algorithm.update, donate_argnums=0), generate)


def sample_and_score(config: ConfigDict, problem: Problem, prediction_type: str) -> Callable[..., Samples]:
    """The mapped `Algorithm.sample` for a reward in plain Python: it scores a chunk while the next one samples."""
    (n_chunks, m), reward = check.batch_split(config), problem.trained
    sample = parallel.pmap(make_algorithm(config, problem, prediction_type, n_chunks=1).sample)
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


def make_algorithm(
    config: ConfigDict, problem: Problem, prediction_type: str, *, n_chunks: int | None = None
) -> Algorithm:
    """The configured algorithm, on the loaded model and reward; `n_chunks` None: as many as the config comes to."""
    model, scale = problem.model, config.lora.alpha / config.lora.rank
    reward, n_chunks = problem.trained, n_chunks or check.batch_split(config)[0]
    policy = Policy(
        denoise=lambda frozen, lora: evaluation.denoiser(model, frozen, lora, lora_scale=scale),
        decode=lambda frozen, x_0: model.decode(frozen["model"], x_0),
        score=None if reward.start else lambda frozen, *args: reward.score(frozen["reward"], *args),
        latent_shape=model.latent_shape,
        prediction_type=prediction_type,
    )
    o = config.optim
    optimizer = optax.chain(
        optax.clip_by_global_norm(o.grad_clip),
        optax.adamw(o.lr, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay),
    )
    if config.algorithm == "ddpo":
        d = config.ddpo
        return ddpo(
            policy,
            optimizer,
            n_prompts=len(problem.train.texts),
            n_updates=d.updates,
            n_chunks=n_chunks,
            inner_epochs=d.inner_epochs,
            clip=d.clip,
            advantage_clip=d.advantage_clip,
            stats_buffer=d.stats_buffer,
            stats_min_count=d.stats_min_count,
            old_log_prob=old_log_prob(config),
        )
    a = config.alignprop
    return alignprop(
        policy,
        optimizer,
        n_chunks=n_chunks,
        loss_coefficient=a.loss_coefficient,
        reward_target=a.reward_target,
        truncation=a.truncation,
        truncation_k=a.truncation_k,
        remat=config.model.remat != "none",
    )


def old_log_prob(config: ConfigDict) -> str:
    """What ddpo.old_log_prob comes to on this machine, see `algorithms.ddpo`.

    "auto" in float32 is the ratio of the paper: of the sampling program's log-probs on a CPU, where that program and
    the update's agree to 1e-5, and of recomputed ones on an accelerator. Elsewhere an update changes log-probs by less
    than rounding does, so a ratio would be noise; but samples that are used again cannot do without one.
    """
    if (setting := config.ddpo.old_log_prob) != "auto":
        return setting
    if is_full_float32(config.model.matmul_precision, model_dtype(config)):
        return "sampled" if backend.platform() == "cpu" else "recomputed"
    return "current" if config.ddpo.inner_epochs == 1 else "recomputed"
