"""What a run's final LoRA draws, in numbers: rewards, diversity, and signs of over-optimisation, for every prompt.

python -m diffexp_jax.sweeps.final_evaluation --workdir runs/x --out runs/x/final.json

Images are of the run's evaluation prompts, sampled by its own settings without exploration, on seeds that are the same
for all runs. --base is the model before it was fine-tuned. --explored adds the same by DiffExp's guidance schedule,
--many the same of more images: how often a base model succeeds with each prompt.
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
from ml_collections import ConfigDict
from tqdm import tqdm

from diffexp_jax import backend, paths, settings
from diffexp_jax.evaluator import Evaluator
from diffexp_jax.experiment import check_files, load_rewards
from diffexp_jax.formats.files import write_whole
from diffexp_jax.limits import SEED, check_number, whole
from diffexp_jax.prompts import load_prompt_sets
from diffexp_jax.rewards import check_trusted
from diffexp_jax.rewards.scoring import summary
from diffexp_jax.run import checkpoint
from diffexp_jax.sweeps import image_statistics
from diffexp_jax.task import Task

SIGNS = {
    "luminance": image_statistics.luminance,
    "saturation": image_statistics.saturation,
    "background_share": image_statistics.background_share,
}
DIVERSITY = {"distance": image_statistics.mean_pairwise_distance, "vendi": image_statistics.vendi_score}
DIGITS = 6  # of the numbers that are written


def main(args: argparse.Namespace) -> None:
    check_number("--samples_per_prompt ", args.samples_per_prompt, whole(1, 2**20))
    check_number("--many ", args.many, whole(0, 2**20))
    check_number("--seed ", args.seed, SEED)
    command.check_writable(args.out.parent, "--out")
    config = run_settings(args.workdir, trusted=args.trust_code)
    backend.set_cpu_devices(settings.cpu_devices(config))
    if config.deterministic:
        backend.ask_for_determinism()
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(paths.local("compilation_cache=", config.compilation_cache)))
    model = load_model(args, config)
    results: dict[str, Any] = {"iteration": 0 if args.base else model.iteration}
    results |= {"samples_per_prompt": args.samples_per_prompt, "many_per_prompt": args.many, "seed": args.seed}
    results |= {"features": model.scorers.features and model.scorers.features[0]}
    results |= {"sampling": config.sampling.to_dict(), "machine": backend.machine()}
    ways = {"plain": (args.samples_per_prompt, False)}
    ways |= {"explored": (args.samples_per_prompt, True)} if args.explored else {}
    ways |= {"many": (args.many, False)} if args.many else {}
    tasks = [model.task(prompts) for prompts in load_prompt_sets(config.eval.prompts)]
    of_each = partial(settings.samples_of_each, per_set=config.eval.samples_per_set)
    images = sum(len(t.texts) * of_each(len(t.texts), per_prompt=n) for n, _ in ways.values() for t in tasks)
    with tqdm(total=images, desc="final evaluation", unit="image") as bar:
        for way, (n, explore) in ways.items():
            measure = partial(measured, model, schedule=explore, seed=args.seed, advance=bar.update)
            results[way] = {task.name: measure(task, n=of_each(len(task.texts), per_prompt=n)) for task in tasks}
    write_whole(args.out, json.dumps(results) + "\n")


def run_settings(workdir: Path, *, trusted: bool) -> ConfigDict:
    """The run's settings; evaluation is on, and nothing is trained.

    Args:
      trusted: whether code that config.json names may run: rewards, and the compiled programs of its cache.

    Raises:
      InputError: no run, or one whose settings cannot be used.
    """
    path = workdir / "config.json"
    config, _ = settings.read_config(path)
    check_trusted([config.reward, *config.eval.rewards], path, trusted=trusted)
    if config.compilation_cache and not trusted:
        config.compilation_cache = settings.default_config().compilation_cache
    config.eval.every = config.eval.every or 1
    config.reward_dtype = config.eval.reward_dtype
    return config


def load_model(args: argparse.Namespace, config: ConfigDict) -> Evaluator:
    """The run's model. Its program is that of the run's own evaluations, so it is compiled already."""
    settings.check_config(config)
    check_files(config, weights=True)
    split, (_, _, rewards) = settings.batch_split(config), load_rewards(config)
    options = {"rewards": rewards, "batch": split.samples, "chunks": split.chunks, "strict": False}
    model = Evaluator.of_run(args.workdir, args.checkpoint, config=config, **options)
    return model.untuned() if args.base else model


def measured(model: Evaluator, task: Task, *, n: int, **options: Any) -> dict[str, Any]:
    """Of n images a prompt {"means": {what: mean and error}, "prompts": [P], "per_prompt": {what: [P]}}.

    Options are those of `Evaluator.evaluate`.
    """
    measures = SIGNS | ({"features": model.scorers.features[1]} if model.scorers.features and n > 1 else {})
    _, values = model.evaluate(task, samples_per_prompt=n, measures=measures, **options)
    features = values.pop("features", None)
    per_prompt = {name: x.reshape(-1, n).mean(1) for name, x in values.items()}
    if features is not None:
        of_prompts = features.reshape(len(task.texts), n, -1)
        spread = {f"diversity/{name}": np.array([f(x) for x in of_prompts]) for name, f in DIVERSITY.items()}
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
