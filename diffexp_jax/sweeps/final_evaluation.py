"""What a run's final LoRA draws, in numbers: rewards, diversity, and signs of over-optimisation, for every prompt.

python -m diffexp_jax.sweeps.final_evaluation --workdir runs/x --out runs/x/final.json

Images are of the run's evaluation prompts, sampled as its evaluations are, without exploration, on seeds that are the
same for all runs. --base is the model before it was fine-tuned. --explored adds the same by DiffExp's guidance
schedule, --many the same of more images: how often a base model succeeds with each prompt.
"""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()  # the imports take seconds

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from diffexp_jax import backend, paths
from diffexp_jax.chosen_rewards import check_files, load_rewards
from diffexp_jax.evaluator import Evaluator
from diffexp_jax.formats.files import write_whole
from diffexp_jax.limits import SEED, check_number, whole
from diffexp_jax.prompts import load_prompt_sets
from diffexp_jax.rewards import check_trusted, diversity
from diffexp_jax.rewards.scoring import summary
from diffexp_jax.run import checkpoint
from diffexp_jax.settings import Settings, as_dict, changed, check, cpu_devices, read_config
from diffexp_jax.sweeps import image_statistics
from diffexp_jax.task import Task

SIGNS = {
    "luminance": image_statistics.luminance,
    "saturation": image_statistics.saturation,
    "background_share": image_statistics.background_share,
}
DIGITS = 6  # of the numbers that are written


def main(args: argparse.Namespace) -> None:
    check_number("--samples_per_prompt ", args.samples_per_prompt, whole(1, 2**20))
    check_number("--many ", args.many, whole(0, 2**20))
    check_number("--seed ", args.seed, SEED)
    command.check_writable(args.out.parent, "--out")
    settings = run_settings(args.workdir, trusted=args.trust_code)
    backend.set_cpu_devices(cpu_devices(settings))
    if settings.deterministic:
        backend.ask_for_determinism()
    if cache := settings.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(paths.local("compilation_cache=", cache)))
    model = load_model(args, settings)
    results: dict[str, Any] = {"iteration": 0 if args.base else model.iteration}
    results |= {"samples_per_prompt": args.samples_per_prompt, "many_per_prompt": args.many, "seed": args.seed}
    results |= {"features": model.scorers.features and model.scorers.features[0]}
    results |= {"sampling": as_dict(settings.eval_sampling), "machine": backend.machine()}
    ways = {"plain": (args.samples_per_prompt, False)}
    ways |= {"explored": (args.samples_per_prompt, True)} if args.explored else {}
    ways |= {"many": (args.many, False)} if args.many else {}
    tasks = [model.task(prompts) for prompts in load_prompt_sets(settings.eval.prompts)]
    of_each = settings.eval.samples_of_each
    images = sum(len(t.texts) * of_each(len(t.texts), n) for n, _ in ways.values() for t in tasks)
    with tqdm(total=images, desc="final evaluation", unit="image") as bar:
        for way, (n, explore) in ways.items():
            measure = partial(measured, model, schedule=explore, seed=args.seed, advance=bar.update)
            results[way] = {task.name: measure(task, n=of_each(len(task.texts), n)) for task in tasks}
    write_whole(args.out, json.dumps(results) + "\n")


def run_settings(workdir: Path, *, trusted: bool) -> Settings:
    """The run's settings; evaluation is on, and nothing is trained.

    Args:
      trusted: whether code that config.json names may run: rewards, and the compiled programs of its cache.

    Raises:
      InputError: no run, or one whose settings cannot be used.
    """
    path = workdir / "config.json"
    settings, _ = read_config(path)
    check_trusted([settings.reward, *settings.eval.rewards], path, trusted=trusted)
    changes: dict[str, Any] = {"eval.every": settings.eval.every or 1, "reward_dtype": settings.eval.reward_dtype}
    if settings.compilation_cache and not trusted:
        changes["compilation_cache"] = Settings().compilation_cache
    return changed(settings, changes)


def load_model(args: argparse.Namespace, settings: Settings) -> Evaluator:
    """The run's model. Its program is that of the run's own evaluations, so it is compiled already."""
    check(settings)
    check_files(settings, weights=True)
    split, (_, _, rewards) = settings.split, load_rewards(settings)
    options = {"rewards": rewards, "batch": split.samples, "chunks": split.chunks, "strict": False}
    model = Evaluator.of_run(args.workdir, args.checkpoint, settings=settings, **options)
    return model.untuned() if args.base else model


def measured(model: Evaluator, task: Task, *, n: int, **options: Any) -> dict[str, Any]:
    """The scores of n images a prompt, {"means": {what: mean and error}, "prompts": [P], "per_prompt": {what: [P]}}.

    Options are those of `Evaluator.evaluate`.
    """
    measures = SIGNS | diversity.measures(model.scorers.features, n)
    _, values = model.evaluate(task, samples_per_prompt=n, measures=measures, **options)
    features = values.pop(diversity.FEATURES, None)
    per_prompt = {name: x.reshape(-1, n).mean(1) for name, x in values.items()}
    if features is not None:
        spread = diversity.of_prompts(features, n)
        values, per_prompt = values | spread, per_prompt | spread
    return {
        "means": {name: summary(x) for name, x in values.items()},
        "prompts": list(task.texts),
        "per_prompt": {name: np.round(x.astype(float), DIGITS).tolist() for name, x in per_prompt.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="of the run")
    add("--checkpoint", default=checkpoint.NEWEST, help="of the run: newest, best, or the number of an iteration")
    add("--base", action="store_true", help="the model before it was fine-tuned")
    add("--explored", action="store_true", help="also by the guidance schedule of exploration (Eq. 7), without weights")
    add("--samples_per_prompt", type=int, default=4)
    add("--many", type=int, default=0, help="also the means over so many images of each prompt (default: none)")
    add("--seed", type=int, default=1000, help="of the evaluation's noise")
    add("--trust_code", action="store_true", help="run the rewards' functions that config.json names, use its cache")
    add("--out", type=Path, required=True, help="the .json file to write")
    command.guarded(main, parser.parse_args())
