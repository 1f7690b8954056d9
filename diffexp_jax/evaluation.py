"""Sampling and scoring prompt sets on fixed seeds, without exploration: for evaluations and image grids."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Bool, Float, UInt8

from diffexp_jax import parallel
from diffexp_jax.errors import InputError
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
    keep: Sequence[int] | np.ndarray = (),
    measures: Mapping[str, Callable] | None = None,
    advance: Callable[[int], Any] = lambda n: None,
) -> tuple[UInt8[np.ndarray, "K H W 3"], dict[str, Float[np.ndarray, "N ..."]]]:
    """Scores of every prompt's images, `samples_per_prompt` each, with seeds that depend on nothing else.

    A batch of images is scored and dropped before the next is sampled: what is held does not grow with the prompts.

    Args:
      params: the pipeline's for sampling, on the devices as `lora` and `steps` are.
      scorers: rewards' names and what `programs.make_scorer` makes of them.
      batch: images at once; a multiple of those that a scorer takes at once, or it reads more, smaller batches.
      keep: which images to return, counted prompt by prompt, in ascending order.
      measures: what else is taken of images, by name: functions of [B,H,W,3] that give [B,...].
      advance: called with the number of images just sampled: a progress bar's update.

    Returns:
      The images that `keep` says, {"reward": [N], "reward/part": [N], "measure": [N,...]} of all, prompt by prompt.
    """
    rows = np.repeat(np.arange(len(task.texts)), samples_per_prompt)
    key = parallel.stream(seed, f"eval/{task.name}")
    padded = np.concatenate([rows, np.zeros(-len(rows) % batch, np.int64)])
    kept, found = [], []
    keep = np.asarray(keep, int)
    for start in range(0, len(padded), batch):
        part = padded[start : start + batch]
        context = make_context(jax.tree.map(lambda x, part=part: x[part], task.cond), uncond)
        keys = parallel.keys_of(key, np.arange(start, start + batch))
        inputs = parallel.shard((context, keys), batch)
        n = min(batch, len(rows) - start)
        images = parallel.unshard(generate(params, lora, *inputs, steps))[:n]
        tokens = {name: jax.tree.map(lambda x, part=part[:n]: x[part], task.tokens[name]) for name in scorers}
        found.append(score_all(scorers, images, tokens))
        found[-1] |= {name: np.array(measure(images)) for name, measure in (measures or {}).items()}
        kept.append(images[keep[(start <= keep) & (keep < start + n)] - start])
        del images
        advance(n)
    return np.concatenate(kept), {name: np.concatenate([part[name] for part in found]) for name in found[0]}


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


def means_of(evaluation: str, scores: Mapping[str, Float[np.ndarray, "N"]]) -> dict[str, float]:
    """The mean of each reward and part, by EVALUATION/REWARD; warns of scores that are not finite, which spoil it."""
    for name, values in scores.items():
        if wrong := int((~np.isfinite(values)).sum()):
            line = "%s/%s: %d of %d scores are not finite (NaN or infinite), and so is their mean"
            logging.warning(line, evaluation, name, wrong, len(values))
    return {f"{evaluation}/{name}": float(values.mean()) for name, values in scores.items()}


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
        means |= means_of(f"eval/{task.name}", scores)
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
    images, _ = evaluate(
        generate, {}, params, lora, task, experiment.sampler.uncond, steps, seed=seed, batch=batch, keep=range(n)
    )
    return images, texts
