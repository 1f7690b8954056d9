"""Do published results hold for seeds that they have not seen? Compares runs of fresh seeds with a results file.

python scripts/sweep.py --experiment methods --arm ddpo --model emoji_hard --first_seed 100 --seeds 3 --out runs/fresh
python tools/studies/fresh_seeds.py --experiment methods --model emoji_hard --sweeps runs/fresh \\
    --document docs/evidence/results/fresh_seeds.md

Of each arm of the sweep with finished runs it says whether the mean of the fresh seeds falls into the published 95 %
interval. The runs' final numbers are kept in RESULTS/fresh.
"""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()  # the imports take seconds

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffexp_jax.errors import InputError
from diffexp_jax.formats.files import read_json, write_whole
from diffexp_jax.report import Table, document_parts
from diffexp_jax.sweeps import cells, results, runs

RESULTS = Path("docs/evidence/results")

markers = partial(document_parts.markers, kind="fresh")


def main(args: argparse.Namespace) -> None:
    experiment = runs.find(args.sweeps, args.experiment, args.model)
    path = args.results / f"{experiment.name}.json"
    if not path.is_file():
        raise InputError(f"{path}: the file is missing; it has the published results of {experiment.name}")
    published = read_json(path, finite=False)
    if args.document:
        document_parts.check(args.document, markers(experiment.name))
    found = compare(experiment, published)
    out = args.results / "fresh" / f"{experiment.name}.json"
    command.check_writable(out.parent, "--results")
    write_whole(out, json.dumps(found) + "\n")
    lines = section(found)
    print("\n".join(lines))
    if args.document:
        document_parts.write_between(args.document, markers(experiment.name), lines)


def compare(experiment: runs.Experiment, published: Mapping[str, Any]) -> dict[str, Any]:
    """Of each arm with fresh runs: its published estimate, the new one, and what each fresh seed reached.

    Raises:
      InputError: no fresh run is finished, the sweep has other settings, an arm or a seed is published already.
    """
    name, known = experiment.name, published["arms"]
    if experiment.overrides != published["overrides"]:
        raise InputError(f"{name}: the sweep sets {experiment.overrides}, the results {published['overrides']}")
    what, sets = cells.telling_reward(published), (published["prompts"], *published["unseen"])
    arms = {}
    for arm, folder in experiment.arms.items():
        finals = {seed: runs.final_means(run.final) for seed, run in runs.read_runs(folder).items() if run.final}
        if not finals:
            continue
        if arm not in known:
            raise InputError(f"{name}: {arm} has no published results; known: {', '.join(known)}")
        seen = sorted(finals.keys() & set(map(int, known[arm]["seeds"])))
        if seen:
            raise InputError(f"{folder}: seed {seen[0]} is published, so not fresh; try --first_seed 100")
        fresh = results.estimates(list(finals.values()))
        arms[arm] = {
            prompts: {
                "published": known[arm]["summary"]["final"][prompts][what],
                "fresh": list(fresh[prompts][what]),
                "seeds": {seed: runs.rounded(final[prompts][what]) for seed, final in finals.items()},
            }
            for prompts in sets
        }
    if not arms:
        raise InputError(f"{name}: the sweep has no finished run")
    return {"name": name, "what": what, "arms": arms}


def falls_inside(one: Mapping[str, Any]) -> bool | None:
    """Whether the fresh mean is in the published interval, ends included; None where one seed has none."""
    _, low, high = one["published"]
    return None if low is None else low <= one["fresh"][0] <= high


_WORDS = {True: "inside", False: "outside", None: "no interval"}


def section(found: Mapping[str, Any]) -> list[str]:
    """The lines of Markdown: a row for each arm and set of prompts."""
    what, rows = found["what"], []
    for arm, of_sets in found["arms"].items():
        for prompts, one in of_sets.items():
            numbers = [cells.cell(one[side], what) for side in ("published", "fresh")]
            each = ", ".join(f"{seed}: {cells.number(x, what)}" for seed, x in one["seeds"].items())
            rows.append([arm, prompts, *numbers, each, _WORDS[falls_inside(one)]])
    header = ["arm", f"{what} of", "published", "fresh seeds", "each seed", "fresh mean"]
    return document_parts.markdown(Table(header, rows))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--experiment", required=True, help="of scripts/sweep.py")
    add("--model", help="where it was run with several")
    add("--sweeps", type=Path, required=True, help="what scripts/sweep.py's --out was, for the fresh seeds alone")
    add("--results", type=Path, default=RESULTS, help="folder with the published NAME.json; writes fresh/NAME.json")
    add("--document", type=Path, help="a document with the lines <!-- fresh: NAME --> and <!-- /fresh: NAME -->")
    return parser.parse_args(argv)


if __name__ == "__main__":
    command.guarded(main, parse())
