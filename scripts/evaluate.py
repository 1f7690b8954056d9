"""Samples prompt sets from the base model and from a run's LoRA on the same seeds, and compares their rewards.

python scripts/evaluate.py --workdir runs/x --prompts animal_activities --rewards emoji_judge --out eval.json
"""

import argparse
import json
from pathlib import Path

import jax
import ml_collections
import numpy as np

from diffexp_jax import InputError, backend, checkpoint, command, evaluation, parallel, report
from diffexp_jax.experiment import Experiment
from diffexp_jax.formats.files import read_json
from diffexp_jax.models.lora import scaled
from diffexp_jax.programs import make_generate, make_scorers


def main(args: argparse.Namespace) -> None:
    for flag in ("samples_per_prompt", "batch", "columns", "rows"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag} {getattr(args, flag)}: wants at least 1")
    command.check_writable(args.out.parent, "--out")
    config = ml_collections.ConfigDict(read_json(args.workdir / "config.json"))
    if config.deterministic:
        backend.ask_for_determinism()
    config.eval.every = 1
    config.eval.prompts = tuple(args.prompts.split(",")) if args.prompts else tuple(config.eval.prompts)
    config.eval.rewards = tuple(args.rewards.split(",")) if args.rewards else tuple(config.eval.rewards)
    experiment = Experiment.build(config)
    iteration, lora = checkpoint.newest_lora(args.workdir)
    batch = max(args.batch // jax.device_count(), 1) * jax.device_count()
    generate = make_generate(experiment.pipeline, n_chunks=1, lora_scale=1.0)
    steps, frozen = parallel.replicate((experiment.steps(explore=False), experiment.frozen))
    scorers = make_scorers(experiment, frozen)
    results: dict[str, dict] = {"iteration": iteration, "samples_per_prompt": args.samples_per_prompt}
    results["sampling"] = config.sampling.to_dict()
    for task in experiment.evals:
        captions = [text for text in task.texts for _ in range(args.samples_per_prompt)]
        columns = min(args.columns, len(captions))
        count = columns * min(args.rows, len(captions) // columns)
        stride = args.samples_per_prompt if count <= len(task.texts) else 1  # a prompt's first image, if they suffice
        shown = np.linspace(0, len(captions) // stride - 1, count).round().astype(int) * stride
        pictures = {}
        for name, scale in (("base", 0.0), ("tuned", experiment.lora_scale)):
            images, scores = evaluation.evaluate(
                generate,
                scorers,
                frozen["model"],
                parallel.replicate(scaled(lora, scale)),
                task,
                experiment.uncond,
                steps,
                seed=args.seed,
                batch=batch,
                samples_per_prompt=args.samples_per_prompt,
            )
            pictures[name] = images[shown]
            summary = {
                key: {"mean": float(x.mean()), "standard_error": float(x.std() / len(x) ** 0.5)}
                for key, x in scores.items()
            }
            results.setdefault(task.name, {})[name] = summary
            print(f"{task.name}, {name}: " + ", ".join(f"{key} {v['mean']:.3f}" for key, v in summary.items()))
        grid = args.out.with_name(f"{args.out.stem}-{task.name}.png")
        save_pairs(grid, pictures["base"], pictures["tuned"], [captions[i] for i in shown], columns=columns)
    try:
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--out {args.out}: cannot be written ({error.strerror or error})") from None
    print(f"written: {args.out} and image grids beside it")


def save_pairs(path: Path, before: np.ndarray, after: np.ndarray, captions: list[str], *, columns: int) -> None:
    """A grid whose rows alternate: images of the base model, and below them the tuned one's from the same noise."""
    images, texts = [], []
    for start in range(0, len(captions), columns):
        here = slice(start, start + columns)
        for words, part in (("before", before), ("after", after)):
            images.append(part[here])
            texts += [f"{words}: {caption}" for caption in captions[here]]
    report.save_grid(path, np.concatenate(images), texts, columns=columns)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="of the run")
    add("--prompts", help="built-in sets or files, separated by commas (default: the run's own)")
    add("--rewards", help="rewards to report, separated by commas (default: the run's own)")
    add("--samples_per_prompt", type=int, default=4)
    add("--batch", type=int, default=64, help="images at once, over all devices")
    add("--columns", type=int, default=6, help="of the image grids")
    add("--rows", type=int, default=4, help="of pairs in the image grids; the prompts are evenly spaced in their set")
    add("--seed", type=int, default=1, help="of the evaluation's noise")
    add("--out", type=Path, required=True, help="the .json file to write")
    command.guarded(main, parser.parse_args())
