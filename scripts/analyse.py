r"""Compares an experiment's arms over seeds: numbers as JSON, a figure, a page, and the documents that show them.

python scripts/analyse.py --experiment fig4_ddpo_pickscore --sweeps runs/sweeps --out docs/evidence/results
python scripts/analyse.py --name mine --out results without=runs/sweeps/runs/A with=runs/sweeps/runs/B
python scripts/analyse.py --pages --figures --readme README.md --out docs/evidence/results

The second compares any runs: NAME=FOLDER, a run or a folder with a subfolder seedN for each; the first is the baseline.
The numbers of an experiment's runs are copied to OUT/sweeps: another machine can analyse them, and a copy of
that folder is a sweep that resumes.

--pages, --figures and --readme write documents, or draw, from all results in --out, also without an experiment to read.
Each experiment also
gets one HTML file with pictures, beside its runs: SWEEPS/experiments/NAME.html, or OUT/NAME.html.
"""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()  # the imports take seconds

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffexp_jax import paths
from diffexp_jax.errors import InputError
from diffexp_jax.formats.files import write_whole
from diffexp_jax.sweeps import document, figure
from diffexp_jax.sweeps import page as results_page
from diffexp_jax.sweeps import results as sweep_results
from diffexp_jax.sweeps import runs as sweep_runs
from diffexp_jax.sweeps.runs import Experiment

KEPT = "sweeps"  # in --out: the numbers of the runs


def main(args: argparse.Namespace) -> None:
    experiments = [sweep_runs.find(args.sweeps, name, args.model) for name in args.experiment]
    if args.runs:
        experiments.append(named_runs(args.name, args.runs))
    documents = [args.out / document.INDEX] * args.pages + ([args.readme] if args.readme else [])
    if not (experiments or documents or args.figures):
        raise InputError("nothing to do: give --experiment, runs as NAME=FOLDER, --pages, --figures or --readme")
    command.check_writable(args.out, "--out")
    for path in documents:
        if not path.is_file():
            raise InputError(f"{path}: the file is missing")
    for experiment in experiments:
        results = json.loads(json.dumps(sweep_results.analyse(experiment)))  # as it will be read
        for arm, content in results["arms"].items():
            print(f"{experiment.name} {arm}: seeds {', '.join(map(str, content['seeds']))}")
        for arm in experiment.arms.keys() - results["arms"].keys():
            print(f"{experiment.name} {arm}: no finished run, left out")
        draw(results, args.out)
        write_whole(args.out / f"{experiment.name}.json", json.dumps(results, separators=(",", ":")) + "\n")
        if experiment.base and args.sweeps.resolve() != (args.out / KEPT).resolve():
            sweep_runs.keep(experiment, args.sweeps, args.out / KEPT)
        page = (args.sweeps / "experiments" if experiment.base else args.out) / f"{experiment.name}.html"
        results_page.save(results, experiment, page)
        print(document.section(results))
        print(f"written: {page}")
    every = document.read_results(args.out)
    for results in every if args.figures else ():
        draw(results, args.out)
    written = document.pages(args.out, every) if args.pages else {}
    if args.readme:
        text = args.readme.read_text(encoding="utf-8")
        written[args.readme] = document.readme(text, every, where=str(args.readme))
    for path, text in written.items():
        write_whole(path, text)
        print(f"written: {path}")


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """The figure of these results, and the README's where it is of them."""
    figure.save(results, folder / results["name"])
    name, prompts, what = document.README_FIGURE
    if results["name"] == name:
        figure.save_panel(results, prompts, what, folder / "readme.png", title=document.README_TITLE)


def named_runs(name: str | None, runs: list[str]) -> Experiment:
    """An experiment of runs that are given by hand.

    Raises:
      InputError: no name, an argument of another form, no such folder, or only one arm.
    """
    if not name:
        raise InputError("runs are given without --name, which their results are written under")
    arms = {}
    for item in runs:
        arm, equals, folder = item.partition("=")
        if not equals or not arm or arm in arms:
            raise InputError(f"{item!r}: wants NAME=FOLDER, each name once")
        arms[arm] = paths.local(f"{arm}=", folder)
        if not arms[arm].is_dir():
            raise InputError(f"{item!r}: no such folder")
    if len(arms) < 2:
        raise InputError("one arm alone is nothing to compare; wants the baseline and another one")
    return Experiment(name, None, f"{', '.join(arms)} compared", None, next(iter(arms)), arms, None, {})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", metavar="NAME=FOLDER", help="arms to compare, the baseline first")
    add("--name", help="of the comparison of such runs")
    add("--experiment", action="append", default=[], help="of scripts/sweep.py (repeat for several)")
    add("--sweeps", type=Path, default=Path("runs/sweeps"), help="what scripts/sweep.py's --out was")
    add("--model", help="where an experiment was run with several")
    add("--out", type=Path, default=Path("docs/evidence/results"), help="folder for NAME.json, NAME.png and NAME.svg")
    add("--pages", action="store_true", help="write the tables of OUT/index.md and of a page for each experiment")
    add("--figures", action="store_true", help="draw the figure of each experiment again")
    add("--readme", type=Path, help="the README, whose table of results over seeds is written from them")
    return parser.parse_args()


if __name__ == "__main__":
    command.guarded(main, parse())
