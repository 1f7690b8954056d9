"""Is there anything to explore? What the base model does with each prompt, plainly and by ways of exploring.

python tools/studies/headroom.py --model emoji_hard --out docs/evidence/results/headroom/emoji_hard.json \\
    --document docs/evidence/results/headroom.md

Nothing is trained. Of every training prompt it samples images plainly, by Eq. 7 with several thresholds, by Eq. 8, and
by both, on the same noise, and compares how often they succeed, how far a prompt's rewards and images differ from
each other, and how good the best of them are. Prompts are sorted by how often the base model succeeds with them,
in images of other noise (--many), so that none is put somewhere by the luck of the images that are compared.
"""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()  # the imports take seconds

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from tqdm import tqdm

from diffexp_jax import backend
from diffexp_jax.chosen_rewards import load_rewards
from diffexp_jax.errors import InputError
from diffexp_jax.evaluator import Evaluator
from diffexp_jax.formats.files import write_whole
from diffexp_jax.limits import check_number, one_of, whole
from diffexp_jax.prompts import PromptSet, load_prompts
from diffexp_jax.report import Table, document_parts
from diffexp_jax.rewards import diversity
from diffexp_jax.settings import Settings, as_dict, check, cpu_devices, parsed
from diffexp_jax.sweeps import cells, comparison, plan

_PLAIN = {"t_thresh": 1000}  # no step is above it
_NO_WEIGHTS = {"weight_range": (1.0, 1.0)}
WAYS = {  # name: what it sets of exploration
    "plain": _PLAIN | _NO_WEIGHTS,
    "weights": _PLAIN,
    **{f"t > {t}": {"t_thresh": t} | _NO_WEIGHTS for t in (900, 800, 700, 600)},
    "both": {},
}
BEST_OF = 8
_STATISTICS = {  # of a prompt's images: heading of the table
    "success": "images that succeed",
    "never": "prompts without one",
    "mean": "reward",
    "std": "its std in a prompt",
    "best": f"best of {BEST_OF}",
    "distance": "distance",
}


def main(args: argparse.Namespace, rest: Sequence[str]) -> None:
    check_number("--samples_per_prompt ", args.samples_per_prompt, whole(BEST_OF, 2**16))
    check_number("--many ", args.many, whole(1, 2**16))
    command.check_writable(args.out.parent, "--out")
    if args.document:
        document_parts.check(args.document, markers(args.out.stem))
    overrides = dict(map(plan.parse_override, rest)) | {"eval.every": 1}
    argument = f"paper.py:{args.experiment}" + (f",model={args.model}" if args.model else "")
    changes = {"eval.prompts": lambda config: (config.prompts,), "exploration.enabled": True}
    config, _ = plan.changed_config(argument, changes, overrides)
    settings = parsed(config)
    backend.set_cpu_devices(cpu_devices(settings))
    found = {"argument": argument, "settings": about(settings), "machine": backend.machine()} | measure(settings, args)
    write_whole(args.out, json.dumps(found) + "\n")
    print("\n".join(section(found)))
    if args.document:
        write_section(args.document, args.out.stem, found)


def about(settings: Settings) -> dict[str, Any]:
    """What the numbers depend on."""
    return {"model": settings.model.path, **as_dict(settings.sampling), **as_dict(settings.exploration)}


# ----------------------------------------------------------------------------------------------------------- measuring


def measure(settings: Settings, args: argparse.Namespace) -> dict[str, Any]:
    """Samples and scores; of every way and prompt the statistics, and how often the base model succeeds."""
    check(settings)
    split, (reward, _, rewards) = settings.split, load_rewards(settings)
    success, least = parse_success(args.success, rewards)
    model = Evaluator.of_settings(settings, rewards=rewards, batch=split.samples, chunks=split.chunks)
    prompts, n = load_prompts(settings.prompts), args.samples_per_prompt
    with tqdm(total=len(prompts) * (args.many + n * len(WAYS)), desc="headroom", unit="image") as bar:
        many, _ = sample(model, prompts, args.many, WAYS["plain"], seed=args.seed + 1, bar=bar)
        base = (many[success] >= least).reshape(len(prompts), -1).mean(1)
        ways = {}
        for name, changes in WAYS.items():
            scores, features = sample(model, prompts, n, changes, seed=args.seed, bar=bar)
            ways[name] = statistics(features, scores[reward].reshape(-1, n), scores[success].reshape(-1, n) >= least)
    names = {"reward": reward, "success": [success, least], "many": args.many}
    names["samples_per_prompt"] = n
    return names | {"prompts": prompts.texts, "base": rounded(base), "ways": ways}


def parse_success(text: str, rewards: Collection[str]) -> tuple[str, float]:
    """ "emoji_judge:0.5" -> the reward's name, and from what on an image succeeds.

    Raises:
      InputError: it is not written so, or evaluation does not report such a reward.
    """
    name, _, least = text.rpartition(":")
    try:
        number = float(least)
    except ValueError:
        raise InputError(f"--success {text}: wants REWARD:NUMBER, as in emoji_judge:0.5") from None
    one_of("--success", name, rewards)
    return name, number


def sample(
    model: Evaluator, prompts: PromptSet, n: int, changes: Mapping[str, Any], *, seed: int, bar: tqdm
) -> tuple[dict[str, Float[np.ndarray, " N"]], Float[np.ndarray, "N F"] | None]:
    """Scores and features of n images of each prompt, sampled with these numbers of exploration."""
    model, task = model.sampled_by(exploration=replace(model.sampler.exploration, **changes)), model.task(prompts)
    if model.sampler.exploration.weight_range != (1.0, 1.0):
        (task, _), n = model.weighted(prompts, samples_per_prompt=n, seed=seed), 1
    options = {"measures": {"features": model.scorers.features[1]} if model.scorers.features else {}}
    _, scores = model.evaluate(task, seed=seed, samples_per_prompt=n, schedule=True, advance=bar.update, **options)
    return scores, scores.pop("features", None)


def statistics(
    features: Float[np.ndarray, "N F"] | None,
    rewards: Float[np.ndarray, "P n"],
    succeeds: Bool[np.ndarray, "P n"],
) -> dict[str, list]:
    """Statistics of each prompt's n images, {name: [P]}."""
    found = {"success": succeeds.mean(1), "mean": rewards.mean(1), "std": rewards.std(1)}
    found["best"] = best_of(rewards, BEST_OF)
    if features is not None:
        of_prompts = features.reshape(*rewards.shape, -1)
        found["distance"] = np.array([diversity.mean_pairwise_distance(x) for x in of_prompts])
    return {name: rounded(x) for name, x in found.items()}


def best_of(rewards: Float[np.ndarray, "P n"], k: int) -> Float[np.ndarray, " P"]:
    """The expected best of k of the n, drawn without replacement: unbiased in n."""
    n = rewards.shape[1]
    # the i-th smallest is the best of k where the other k - 1 are among the i - 1 below it
    below = np.arange(n)
    logs = np.array([_log_choose(i, k - 1) - _log_choose(n, k) for i in below])
    return np.sort(rewards, axis=1) @ np.exp(logs)


def _log_choose(n: int, k: int) -> float:
    if k > n:
        return -np.inf
    return float(np.log(np.arange(n - k + 1, n + 1)).sum() - np.log(np.arange(1, k + 1)).sum())


def rounded(x: np.ndarray) -> list[float]:
    return np.round(np.asarray(x, np.float64), 5).tolist()


# ------------------------------------------------------------------------------------------------------------ document


markers = partial(document_parts.markers, kind="headroom")


def section(found: Mapping[str, Any]) -> list[str]:
    """The lines of Markdown: a table of all prompts, and of success by how often the base model succeeds."""
    ways = {name: {what: np.array(x) for what, x in way.items()} for name, way in found["ways"].items()}
    shown = [what for what in _STATISTICS if what == "never" or what in ways["plain"]]
    rows = [[name, *(_shown(way, what) for what in shown)] for name, way in ways.items()]
    base, bins = np.array(found["base"]), []
    for above, upto, inside in comparison.prompts_by_base_share(base):
        shares = [f"{100 * way['success'][inside].mean():.1f} %" for way in ways.values()]
        bins.append([cells.bin_name({"above": above, "upto": upto}), str(inside.sum()), *shares])
    s, (success, least) = found["settings"], found["success"]
    said = (
        f"{len(base)} prompts, {found['samples_per_prompt']} images each and way; {s['steps']} steps, guidance "
        f"{s['guidance']:g}, w_low {s['w_low']:g}, weights {s['weight_range'][0]:g} to {s['weight_range'][1]:g} of a "
        f"{s['unit']}, both: t > {s['t_thresh']:g}. An image succeeds with {success} >= "
        f"{least:g}; rewards are of {found['reward']}. {found['machine']['devices']}, jax {found['machine']['jax']}."
    )
    first = Table(["way", *(_STATISTICS[what] for what in shown)], rows)
    second = Table([f"base model succeeds in, of {found['many']}", "prompts", *ways], bins)
    return [said, "", *document_parts.markdown(first), "", *document_parts.markdown(second)]


def _shown(way: Mapping[str, np.ndarray], what: str) -> str:
    if what == "never":
        return f"{100 * (way['success'] == 0).mean():.0f} %"
    mean = way[what].mean()
    return f"{100 * mean:.1f} %" if what == "success" else f"{mean:.3f}" if what == "distance" else f"{mean:.2f}"


def write_section(document: Path, name: str, found: Mapping[str, Any]) -> None:
    document_parts.write_between(document, markers(name), section(found))


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and what is left: settings of the experiment."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--experiment", default="fig4_ddpo_pickscore", help="of configs/paper.py: prompts, reward, sampling")
    add("--model", help="of configs/models.py (default: the experiment's)")
    add("--success", default="emoji_judge:0.5", metavar="REWARD:NUMBER", help="an image with so much of it succeeds")
    add("--samples_per_prompt", type=int, default=16)
    add("--many", type=int, default=64, help="images of a prompt that say how often the base model succeeds")
    add("--seed", type=int, default=2000, help="of the noise")
    add("--out", type=Path, required=True, help="the .json file to write")
    add("--document", type=Path, help="a document with the lines <!-- headroom: NAME --> and <!-- /headroom: NAME -->")
    return parser.parse_known_args(argv)


if __name__ == "__main__":
    command.guarded(main, *parse())
