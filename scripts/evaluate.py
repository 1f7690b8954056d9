"""Samples prompt sets from the base model and from a run's LoRA on the same seeds, and compares their rewards.

python scripts/evaluate.py --workdir runs/x --prompts animal_activities --rewards emoji_judge --out eval.json
"""

import argparse
import json
from pathlib import Path

import jax
import ml_collections
import numpy as np

from diffexp_jax import InputError, checkpoint, command, evaluation, parallel, report
from diffexp_jax.models.files import read_json
from diffexp_jax.models.lora import scaled
from diffexp_jax.problem import frozen_arrays, load_problem, load_schedule, sampling_steps


def main(args: argparse.Namespace) -> None:
    for flag in ("samples_per_prompt", "batch"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag} {getattr(args, flag)}: wants at least 1")
    command.check_writable(args.out.parent, "--out")
    config = ml_collections.ConfigDict(read_json(args.workdir / "config.json"))
    config.eval.every = 1
    config.eval.prompts = tuple(args.prompts.split(",")) if args.prompts else tuple(config.eval.prompts)
    config.eval.rewards = tuple(args.rewards.split(",")) if args.rewards else tuple(config.eval.rewards)
    problem = load_problem(config)
    iteration, lora = checkpoint.newest_lora(args.workdir)
    schedule = load_schedule(problem.model)
    batch = max(args.batch // jax.device_count(), 1) * jax.device_count()
    generate = evaluation.make_generate(
        problem.model, problem.rewards, prediction_type=schedule.prediction_type, n_chunks=1, lora_scale=1.0
    )
    steps, frozen = sampling_steps(config, schedule, explore=False), frozen_arrays(problem)
    results: dict[str, dict] = {"iteration": iteration, "samples_per_prompt": args.samples_per_prompt}
    for task in problem.evals:
        for name, scale in (("base", 0.0), ("tuned", config.lora.alpha / config.lora.rank)):
            images, scores = evaluation.evaluate(
                generate,
                frozen,
                parallel.replicate(scaled(lora, scale)),
                task,
                problem.uncond,
                steps,
                seed=args.seed,
                batch=batch,
                samples_per_prompt=args.samples_per_prompt,
            )
            captions = [text for text in task.texts for _ in range(args.samples_per_prompt)]
            shown = np.linspace(0, len(images) - 1, min(24, len(images))).round().astype(int)
            grid = args.out.with_name(f"{args.out.stem}-{task.name}-{name}.png")
            report.save_grid(grid, images[shown], [captions[i] for i in shown], columns=6)
            summary = {
                key: {"mean": float(x.mean()), "standard_error": float(x.std() / len(x) ** 0.5)}
                for key, x in scores.items()
            }
            results.setdefault(task.name, {})[name] = summary
            print(f"{task.name}, {name}: " + ", ".join(f"{key} {v['mean']:.3f}" for key, v in summary.items()))
    try:
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--out {args.out}: cannot be written ({error.strerror or error})") from None
    print(f"written: {args.out} and image grids beside it")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="of the run")
    add("--prompts", help="built-in sets or files, separated by commas (default: the run's own)")
    add("--rewards", help="rewards to report, separated by commas (default: the run's own)")
    add("--samples_per_prompt", type=int, default=4)
    add("--batch", type=int, default=64, help="images at once, over all devices")
    add("--seed", type=int, default=1, help="of the evaluation's noise")
    add("--out", type=Path, required=True, help="the .json file to write")
    command.guarded(main, parser.parse_args())
