"""What a run works on, loaded and ready: model, rewards, prompts; and what every iteration draws of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from diffexp_jax import InputError, backend, evaluation, exploration, parallel
from diffexp_jax.algorithms import METHODS, Batch
from diffexp_jax.models import stable_diffusion
from diffexp_jax.models.stable_diffusion import TextEmbedding
from diffexp_jax.process import Process
from diffexp_jax.prompts import PromptSet, load_prompts
from diffexp_jax.prompts.units import unit_ids
from diffexp_jax.rewards import Reward, load_reward, reward_name
from diffexp_jax.sampling import Steps


class Problem(NamedTuple):
    """What a run works on; arrays are on the host, a row per prompt."""

    model: stable_diffusion.StableDiffusion
    reward: str  # the name of the trained one
    trained: Reward  # as training uses it, in reward_dtype
    rewards: dict[str, Reward]  # as evaluation reports them, in eval.reward_dtype: it, and those that are only reported
    units: Int[np.ndarray, "P L"]  # of the training prompts, see prompts.units
    train: evaluation.Task
    evals: list[evaluation.Task]
    empty: TextEmbedding  # of "": the null of Eq. 8
    uncond: TextEmbedding  # of guidance (Eq. 4): the same, or zeros (SDXL)


def model_dtype(config: ConfigDict) -> np.dtype:
    """What model.dtype comes to on this machine."""
    auto = "float32" if backend.platform() == "cpu" else "bfloat16"
    return jnp.dtype(auto if config.model.dtype == "auto" else config.model.dtype)


def model_options(config: ConfigDict) -> dict[str, Any]:
    """The settings that `stable_diffusion.build` takes."""
    m = config.model
    options = {"image_size": m.image_size, "remat_blocks": m.remat == "block", "vae_slice": m.vae_slice}
    return {"dtype": model_dtype(config), "matmul_precision": m.matmul_precision} | options


def load_rewards(config: ConfigDict, *, shapes_only: bool = False) -> tuple[str, Reward, dict[str, Reward]]:
    """The trained reward's name, that reward, and what evaluation reports by name; `shapes_only` as in `load_reward`.

    Where both have the same type, the trained one is also the one that is reported, and loaded once.
    """
    specs = dict.fromkeys([config.reward, *(config.eval.rewards if config.eval.every else ())])
    norm, options = config.textnorm, {"shapes_only": shapes_only}
    options |= {"temperature": norm.temperature, "contrast": norm.contrast}
    options |= {"timeout": config.host_reward.timeout, "workers": config.host_reward.workers}
    weights = {config.reward: tuple(config.reward_weights)}
    names = [reward_name(spec) for spec in specs]
    if len(set(names)) < len(names):
        raise InputError(f"reward and eval.rewards: two of {', '.join(specs)} have the same name")

    def load(spec, dtype):
        return load_reward(spec, weights=weights.get(spec, ()), dtype=dtype, **options)

    trained = load(config.reward, config.reward_dtype)
    if METHODS[config.algorithm].needs.reward_gradient and trained.start:
        others = ", ".join(name for name, method in METHODS.items() if not method.needs.reward_gradient)
        raise InputError(
            f"reward={config.reward!r}: {config.algorithm} needs the reward's gradient, and plain Python has none; "
            f"wants algorithm {others}, or a function of JAX: jax:MODULE:FUNCTION"
        )
    once = config.reward_dtype == config.eval.reward_dtype or not config.eval.every or bool(trained.start)
    rewards = {
        name: trained if once and spec == config.reward else load(spec, config.eval.reward_dtype)
        for name, spec in zip(names, specs, strict=True)
    }
    return names[0], trained, rewards


def load_problem(config: ConfigDict) -> Problem:
    """Loads what the config names; prompts are encoded once, here."""
    prompts = load_prompts(config.prompts)
    eval_sets = [load_prompts(name) for name in config.eval.prompts] if config.eval.every else []
    m, (name, trained, rewards) = config.model, load_rewards(config)
    model = stable_diffusion.load(m.path, revision=m.revision, variant=m.variant, **model_options(config))

    def task(prompts: PromptSet) -> evaluation.Task:
        cond, cut = evaluation.encode_prompts(model, prompts.texts)
        for text in cut:
            logging.warning("prompt cut to %d tokens: %r", model.tokenizer.model_max_length, text)
        tokens = {name: reward.tokenize(prompts.texts) for name, reward in rewards.items()}
        return evaluation.Task(prompts.name, prompts.texts, cond, tokens)

    units = unit_ids(model.tokenizer, prompts, config.exploration.unit)
    empty = evaluation.encode_empty(model)
    uncond = evaluation.unconditional(model, empty)
    return Problem(model, name, trained, rewards, units, task(prompts), [task(s) for s in eval_sets], empty, uncond)


def frozen_params(problem: Problem) -> Any:
    """The arrays (or shapes) that training reads and leaves alone."""
    model = {part: problem.model.params[part] for part in ("unet", "vae")}
    return {"model": model, "reward": problem.trained.params}


def frozen_arrays(problem: Problem) -> Any:
    """The same on every device."""
    return parallel.replicate(frozen_params(problem))


def sampling_steps(config: ConfigDict, process: Process, *, explore: bool) -> Steps:
    """The run's sampling steps on every device; guidance follows Eq. 7 where `explore`, else it is constant."""
    t, e = process.timesteps(config.sampling.steps), config.exploration
    w_t = exploration.guidance_schedule(
        t, w_low=e.w_low, w_high=config.sampling.guidance, t_thresh=e.t_thresh, active=explore
    )
    return parallel.replicate(process.make_steps(t, w_t, eta=config.sampling.eta))


def make_explore(config: ConfigDict) -> Callable[..., jax.Array]:
    """A mapped program (cond, null, unit ids, keys) -> the randomly reweighted embeddings, one draw per image."""
    weight_range = tuple(config.exploration.weight_range)

    def one(cond, null, units, key):
        weights = exploration.sample_phrase_weights(key, units, weight_range=weight_range)
        return exploration.reweight_prompt(cond, null, weights)

    return parallel.pmap(jax.vmap(one))


def draw_batch(config: ConfigDict, problem: Problem, it: int, explore: Callable[..., Array] | None) -> Batch:
    """Random prompts of iteration `it` with all that the algorithm needs of them, split among the devices.

    `explore` (see `make_explore`) reweights their embeddings; None leaves them as they are.
    """
    n, task = config.batch.samples, problem.train
    ids = jax.random.randint(parallel.stream(config.seed, "prompts", it), (n,), 0, len(task.texts))
    ids = np.asarray(ids)
    noise = parallel.sample_keys(parallel.stream(config.seed, "noise", it), n)
    cond, tokens = jax.tree.map(lambda x: x[ids], (task.cond, task.tokens[problem.reward]))
    batch = Batch(ids, evaluation.make_context(cond, problem.uncond), tokens, noise)
    batch = parallel.shard(batch, n)
    if explore is not None:
        keys = parallel.sample_keys(parallel.stream(config.seed, "weights", it), n)
        null = np.broadcast_to(problem.empty.embedding, (n, *problem.empty.embedding.shape))
        null, units, keys = parallel.shard((null, problem.units[ids], keys), n)
        batch = batch._replace(context=batch.context._replace(cond=explore(batch.context.cond, null, units, keys)))
    return batch
