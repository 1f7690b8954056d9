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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from diffexp_jax import backend, evaluation, parallel, paths, settings
from diffexp_jax.experiment import Experiment, Task
from diffexp_jax.formats.files import write_whole
from diffexp_jax.limits import check_number, whole
from diffexp_jax.programs import make_embedder, make_generate, make_scorers
from diffexp_jax.rewards import check_trusted
from diffexp_jax.run import checkpoint
from diffexp_jax.sweeps import image_statistics

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
    check_number("--seed ", args.seed, settings.NUMBERS["seed"])
    command.check_writable(args.out.parent, "--out")
    config = run_settings(args.workdir, trusted=args.trust_code)
    backend.set_cpu_devices(settings.cpu_devices(config))
    if config.deterministic:
        backend.ask_for_determinism()
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(paths.local("compilation_cache=", config.compilation_cache)))
    iteration, lora = checkpoint.read_lora(args.workdir, args.checkpoint)
    if args.base:
        iteration, lora = 0, jax.tree.map(np.zeros_like, lora)  # an update of nothing
    model = Model.build(Experiment.build(config), lora)
    results: dict[str, Any] = {"iteration": iteration, "samples_per_prompt": args.samples_per_prompt}
    results |= {"many_per_prompt": args.many, "seed": args.seed, "features": model.features}
    results |= {"sampling": config.sampling.to_dict(), "machine": backend.machine()}
    ways = {"plain": (args.samples_per_prompt, False)}
    ways |= {"explored": (args.samples_per_prompt, True)} if args.explored else {}
    ways |= {"many": (args.many, False)} if args.many else {}
    tasks = model.experiment.evals
    of_each = partial(evaluation.samples_of_each, per_set=config.eval.samples_per_set)
    images = sum(len(t.texts) * of_each(len(t.texts), per_prompt=n) for n, _ in ways.values() for t in tasks)
    with tqdm(total=images, desc="final evaluation", unit="image") as bar:
        for way, (n, explore) in ways.items():
            measure = partial(model.measure, explore=explore, seed=args.seed, advance=bar.update)
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


class Model(NamedTuple):
    """A model with its LoRA, ready to sample and to be measured; arrays are on the devices."""

    experiment: Experiment
    generate: Any
    scorers: dict[str, Any]
    embed: Any  # None where no reward has features of images
    features: str | None  # the name of the reward whose features they are
    params: Any
    lora: Any

    @classmethod
    def build(cls, experiment: Experiment, lora: Any) -> "Model":
        """The programs are those of the run's own evaluations, so they are compiled already."""
        frozen, split = parallel.share(experiment.frozen), experiment.split
        pipeline, batch = experiment.sampler.pipeline, split.per_forward * split.devices
        features = next((name for name, reward in experiment.rewards.items() if reward.embed), None)
        return cls(
            experiment,
            make_generate(pipeline, n_chunks=split.chunks, lora_scale=experiment.lora_scale),
            make_scorers(experiment, frozen),
            make_embedder(experiment.rewards[features], batch=batch) if features else None,
            features,
            frozen["model"],
            parallel.replicate(lora),
        )

    def measure(self, task: Task, *, n: int, explore: bool, seed: int, advance: Callable) -> dict[str, Any]:
        """Of n images a prompt {"means": {what: mean and error}, "prompts": [P], "per_prompt": {what: [P]}}."""
        measures = SIGNS | ({"features": self.embed} if self.embed and n > 1 else {})
        _, values = evaluation.evaluate(
            self.generate,
            self.scorers,
            self.params,
            self.lora,
            task,
            self.experiment.sampler.uncond,
            parallel.replicate(self.experiment.sampler.steps(explore=explore)),
            seed=seed,
            batch=self.experiment.split.samples,
            samples_per_prompt=n,
            measures=measures,
            advance=advance,
        )
        features = values.pop("features", None)
        per_prompt = {name: x.reshape(-1, n).mean(1) for name, x in values.items()}
        if features is not None:
            of_prompts = features.reshape(len(task.texts), n, -1)
            spread = {f"diversity/{name}": np.array([f(x) for x in of_prompts]) for name, f in DIVERSITY.items()}
            values, per_prompt = values | spread, per_prompt | spread
        return {
            "means": {name: evaluation.summary(x) for name, x in values.items()},
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
