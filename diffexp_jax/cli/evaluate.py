"""Samples prompt sets from the base model and from a run's LoRA on the same seeds, and compares their rewards.

Where a reward has features of images, it also says how much the images of a prompt differ from each other.

python scripts/evaluate.py --workdir runs/x --prompts animal_activities --rewards emoji_judge --out eval.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from diffexp_jax import backend, command, report
from diffexp_jax.chosen_rewards import check_files, load_rewards
from diffexp_jax.errors import InputError
from diffexp_jax.evaluator import Evaluator
from diffexp_jax.formats.files import replaced
from diffexp_jax.limits import LORA_SCALE, SEED, check_number, whole
from diffexp_jax.prompts import load_prompt_sets
from diffexp_jax.rewards import check_trusted, diversity
from diffexp_jax.rewards.scoring import check_scores, summary
from diffexp_jax.run import checkpoint
from diffexp_jax.settings import Settings, as_dict, changed, cpu_devices, read_config, warn_of_bare_names


def main(args: argparse.Namespace) -> None:
    for flag in ("samples_per_prompt", "batch", "columns", "rows"):
        check_number(f"--{flag} ", getattr(args, flag), whole(1, 2**20))
    check_number("--seed ", args.seed, SEED)
    check_number("--lora_scale ", args.lora_scale, LORA_SCALE)
    command.check_writable(args.out.parent, "--out")
    settings = run_settings(args)
    backend.set_cpu_devices(cpu_devices(settings))
    if settings.deterministic:
        backend.ask_for_determinism()
    prompt_sets = load_prompt_sets(settings.eval.prompts)
    warn_of_bare_names(settings.model.path, settings.eval.prompts)
    _, _, rewards = load_rewards(settings)
    options = {"lora_scale": args.lora_scale, "rewards": rewards, "batch": args.batch}
    tuned = Evaluator.of_run(args.workdir, args.checkpoint, settings=settings, **options)
    models = {"base": tuned.untuned(), "tuned": tuned}
    results: dict[str, Any] = {"iteration": tuned.iteration, "samples_per_prompt": args.samples_per_prompt}
    results["lora_scale"] = args.lora_scale
    results["sampling"] = as_dict(settings.eval_sampling)
    n_images = 2 * args.samples_per_prompt * sum(map(len, prompt_sets))
    with tqdm(total=n_images, desc="evaluating", unit="image") as bar:
        for prompts in prompt_sets:
            task = tuned.task(prompts)
            results[task.name] = {}
            captions, shown = shown_images(args, task.texts)
            pictures = {}
            for name, model in models.items():
                n, taken = args.samples_per_prompt, {"keep": shown.tolist(), "advance": bar.update}
                taken["measures"] = diversity.measures(model.scorers.features, n)
                pictures[name], scores = model.evaluate(task, seed=args.seed, samples_per_prompt=n, **taken)
                features = scores.pop(diversity.FEATURES, None)
                check_scores(scores)
                scores |= {} if features is None else diversity.of_prompts(features, n)
                results[task.name][name] = {key: summary(x) for key, x in scores.items()}
                line = ", ".join(f"{key} {x['mean']:.3f}" for key, x in results[task.name][name].items())
                tqdm.write(f"{task.name}, {name}: {line}")
            grid = args.out.with_name(f"{args.out.stem}-{task.name}.png")
            columns = min(args.columns, len(captions))
            try:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                save_pairs(grid, pictures["base"], pictures["tuned"], [captions[i] for i in shown], columns=columns)
                with replaced(args.out) as partial:
                    partial.write_text(json.dumps(results, indent=2) + "\n")  # what is there so far
            except OSError as error:
                raise InputError(f"--out {args.out}: cannot be written ({error.strerror or error})") from None
    print(f"written: {args.out} and image grids beside it")


def run_settings(args: argparse.Namespace) -> Settings:
    """The run's settings, with what the flags say of evaluation.

    Raises:
      InputError: no run, or one whose settings cannot be used.
    """
    path = args.workdir / "config.json"
    settings, _ = read_config(path)
    from_file = [settings.reward, *(() if args.rewards else settings.eval.rewards)]
    check_trusted(from_file, path, trusted=args.trust_code)
    changes: dict[str, Any] = {"eval.every": 1, "reward_dtype": settings.eval.reward_dtype}  # nothing is trained
    changes |= {"eval.prompts": command.split_list(args.prompts)} if args.prompts else {}
    changes |= {"eval.rewards": command.split_list(args.rewards)} if args.rewards else {}
    settings = changed(settings, changes)
    check_files(settings, weights=True)
    return settings


def shown_images(args: argparse.Namespace, texts: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    """The prompt of every image, and which images the grid shows: evenly spaced, first images of prompts if they do."""
    captions = [text for text in texts for _ in range(args.samples_per_prompt)]
    columns = min(args.columns, len(captions))
    count = columns * min(args.rows, len(captions) // columns)
    stride = args.samples_per_prompt if count <= len(texts) else 1
    return captions, np.linspace(0, len(captions) // stride - 1, count).round().astype(int) * stride


def save_pairs(path: Path, before: np.ndarray, after: np.ndarray, captions: list[str], *, columns: int) -> None:
    """A grid whose rows alternate: images of the base model, and below them the tuned one's from the same noise."""
    images, texts = [], []
    for start in range(0, len(captions), columns):
        here = slice(start, start + columns)
        for words, part in (("before", before), ("after", after)):
            images.append(part[here])
            texts += [f"{words}: {caption}" for caption in captions[here]]
    report.save_grid(path, np.concatenate(images), texts, columns=columns)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of a command line; None: the program's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="of the run")
    add("--checkpoint", default=checkpoint.NEWEST, help="of the run: newest, best, or the number of an iteration")
    add("--lora_scale", type=float, default=1.0, help="factor of the LoRA: 0 is the base model, 1 the tuned one")
    add("--prompts", help="built-in sets, files or prompts, separated by commas without a blank (default: the run's)")
    add("--rewards", help="rewards to report besides the run's, separated by commas (default: those that it reports)")
    add("--samples_per_prompt", type=int, default=4)
    add("--batch", type=int, default=64, help="images at once, over all devices")
    add("--columns", type=int, default=6, help="of the image grids")
    add("--rows", type=int, default=4, help="of pairs in the image grids; the prompts are evenly spaced in their set")
    add("--seed", type=int, default=1, help="of the evaluation's noise")
    add("--trust_code", action="store_true", help="run the rewards' functions that the run's config.json names")
    add("--out", type=Path, required=True, help="the .json file to write")
    return parser.parse_args(words)


def run() -> None:
    command.guarded(main, arguments())
