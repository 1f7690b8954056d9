"""The compiled programs of a run, made from its settings and its problem: training and the dry run use the same."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from diffexp_jax import check, evaluation, parallel
from diffexp_jax.algorithms import Algorithm, Policy
from diffexp_jax.algorithms.alignprop import alignprop
from diffexp_jax.algorithms.ddpo import ddpo
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
        problem.rewards,
        prediction_type=prediction_type,
        n_chunks=check.batch_split(config)[0],
        lora_scale=config.lora.alpha / config.lora.rank,
    )
    sample = parallel.pmap(algorithm.sample) if algorithm.sample else None
    return Programs(algorithm, sample, parallel.pmap(algorithm.update, donate_argnums=0), generate)


def make_algorithm(config: ConfigDict, problem: Problem, prediction_type: str) -> Algorithm:
    """The configured algorithm, on the loaded model and reward."""
    model, scale = problem.model, config.lora.alpha / config.lora.rank
    reward, (n_chunks, _) = problem.rewards[problem.reward], check.batch_split(config)
    policy = Policy(
        denoise=lambda frozen, lora: evaluation.denoiser(model, frozen, lora, lora_scale=scale),
        decode=lambda frozen, x_0: model.decode(frozen["model"], x_0),
        score=lambda frozen, images, tokens: reward.score(frozen["rewards"][problem.reward], images, tokens),
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
            recompute_log_prob=recomputes_log_prob(config),
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


def recomputes_log_prob(config: ConfigDict) -> bool:
    """What ddpo.recompute_log_prob comes to on this machine.

    "auto" spares the emoji world a third forward pass: in float32 on CPU, sampling and scoring agree to 1e-5. On an
    accelerator even float32 does not make them agree (TF32, bfloat16 passes), and the clip is at 1e-4.
    """
    exact = model_dtype(config) == jnp.float32 and jax.default_backend() == "cpu"
    return {"auto": not exact, "always": True, "never": False}[config.ddpo.recompute_log_prob]
