"""Sampling and scoring prompt sets on fixed seeds, without exploration: for evaluations and image grids."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8

from diffexp_jax import InputError, parallel
from diffexp_jax.experiment import Experiment, Task
from diffexp_jax.limits import one_of
from diffexp_jax.pipelines import Conditioning, make_context
from diffexp_jax.sampling import Steps


def evaluate(
    generate: Callable,
    scorers: Mapping[str, Callable],
    params: Any,
    lora: Any,
    task: Task,
    uncond: Conditioning,
    steps: Steps,
    *,
    seed: int,
    batch: int,
    samples_per_prompt: int = 1,
    advance: Callable[[int], Any] = lambda n: None,
) -> tuple[UInt8[np.ndarray, "N H W 3"], dict[str, Float[np.ndarray, "N"]]]:
    """Images and scores of every prompt, `samples_per_prompt` each, with seeds that depend on nothing else.

    `params` are the pipeline's for sampling, on the devices as `lora` and `steps` are.
    `scorers` are rewards' names and what `programs.make_scorer` makes of them.
    `advance` is called with the number of images just sampled: a progress bar's update.

    Returns:
      The images, prompt by prompt; {"reward": [N], "reward/part": [N]} in the same order.
    """
    rows = np.repeat(np.arange(len(task.texts)), samples_per_prompt)
    key = parallel.stream(seed, f"eval/{task.name}")
    padded = np.concatenate([rows, np.zeros(-len(rows) % batch, np.int64)])
    images = []
    for start in range(0, len(padded), batch):
        part = padded[start : start + batch]
        context = make_context(jax.tree.map(lambda x, part=part: x[part], task.cond), uncond)
        keys = parallel.keys_of(key, np.arange(start, start + batch))
        inputs = parallel.shard((context, keys), batch)
        images.append(parallel.unshard(generate(params, lora, *inputs, steps)))
        advance(min(batch, len(rows) - start))
    images = np.concatenate(images)[: len(rows)]
    tokens = {name: jax.tree.map(lambda x: x[rows], task.tokens[name]) for name in scorers}
    return images, score_all(scorers, images, tokens)


def score_all(
    scorers: Mapping[str, Callable], images: Any, tokens: Mapping[str, Any]
) -> dict[str, Float[np.ndarray, "N"]]:
    """{"reward": [N], "reward/part": [N]} of several rewards.

    Args:
      images: bytes [H,W,3], which may differ in size: an array or a list.
      tokens: of the images' prompts, by reward.
    """
    scores = {}
    for name, scorer in scorers.items():
        found = scorer(images, tokens[name])
        scores |= {f"{name}/{part}" if part else name: x for part, x in found.items()}
    return scores


def check_pictures(finite: Bool[np.ndarray, " N"]) -> None:
    """Raises InputError where a picture has a number that is not finite."""
    if wrong := int((~np.asarray(finite)).sum()):
        raise InputError(
            f"{wrong} of {len(finite)} pictures are not finite: the model, its VAE or the LoRA overflows; wants "
            "another type of numbers (float32, or bfloat16 in place of float16), another LoRA or less guidance"
        )


def check_scores(scores: Mapping[str, Float[np.ndarray, "N"]]) -> None:
    """Raises InputError where a score is not finite."""
    for name, values in scores.items():
        if wrong := int((~np.isfinite(values)).sum()):
            raise InputError(f"reward {name}: {wrong} of {len(values)} scores are not finite (NaN or infinite)")


def summary(values: Float[np.ndarray, "N"]) -> dict[str, float]:
    """The mean, and its standard error as of N independent values."""
    return {"mean": float(values.mean()), "standard_error": float(values.std() / len(values) ** 0.5)}


def samples_of_each(n_prompts: int, *, per_prompt: int, per_set: int) -> int:
    """Images of each of a set's prompts: at least `per_prompt`, and at least `per_set` of the whole set."""
    return max(per_prompt, -(-per_set // n_prompts))


def evaluate_all(
    experiment: Experiment, generate: Callable, scorers: Mapping[str, Callable], params: Any, lora: Any, steps: Steps
) -> dict[str, float]:
    """Mean of every reward and part over every evaluation prompt set, as eval/SET/REWARD.

    Raises:
      InputError: the best checkpoint is to be that by another evaluation than these.
    """
    config, means = experiment.config, {}
    for task in experiment.evals:
        n = samples_of_each(
            len(task.texts), per_prompt=config.eval.samples_per_prompt, per_set=config.eval.samples_per_set
        )
        _, scores = evaluate(
            generate,
            scorers,
            params,
            lora,
            task,
            experiment.sampler.uncond,
            steps,
            seed=config.seed,
            batch=experiment.split.samples,
            samples_per_prompt=n,
        )
        means |= {f"eval/{task.name}/{name}": float(score.mean()) for name, score in scores.items()}
    if (best := config.checkpoint.best).startswith("eval/"):
        one_of("checkpoint.best", best, means)
    return means


def fixed_samples(
    experiment: Experiment, generate: Callable, params: Any, lora: Any, steps: Steps, *, n: int
) -> tuple[UInt8[np.ndarray, "N H W 3"], tuple[str, ...]]:
    """n images of evenly spaced training prompts, of a few several each, on fixed seeds; and their prompts."""
    rows = np.linspace(0, len(experiment.train.texts) - 1, n).round().astype(int)
    texts = tuple(experiment.train.texts[i] for i in rows)
    task = Task("grid", texts, jax.tree.map(lambda x: x[rows], experiment.train.cond), {})
    seed, batch = experiment.config.seed, experiment.split.samples
    images, _ = evaluate(generate, {}, params, lora, task, experiment.sampler.uncond, steps, seed=seed, batch=batch)
    return images, texts
