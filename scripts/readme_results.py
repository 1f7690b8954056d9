r"""Measures the emoji world with the judge and writes the README's results and picture.

python scripts/evaluate.py --workdir runs/quickstart --out runs/quickstart/eval.json
python scripts/readme_results.py --eval "quickstart=runs/quickstart/eval.json" --machine "2 CPU cores" \
    --picture runs/quickstart/eval-animal_activities.png
"""

import argparse
import shutil
from pathlib import Path

from diffexp_jax import InputError, command
from diffexp_jax.emoji.pretraining import ASSETS
from diffexp_jax.emoji.reward_stages import judge_accuracy
from diffexp_jax.formats.files import read_json

START, END = "<!-- results -->", "<!-- /results -->"
COLUMNS = {
    ("animals_with_article", "emoji_judge"): "animal alone: it, and no object",
    ("animal_activities", "emoji_judge"): "activities: animal and object both there",
    ("animal_activities", "emoji_judge/animal"): "activities: right animal",
    ("animal_activities_unseen", "emoji_judge"): "unseen animals: both there",
    ("animal_activities", "emoji_pickscore"): "reward (emoji_pickscore)",
}


def main(args: argparse.Namespace) -> None:
    readme = args.readme.read_text(encoding="utf-8")
    if START not in readme or END not in readme:
        raise InputError(f"{args.readme}: wants the markers {START} and {END}")
    accuracy = judge_accuracy(ASSETS, n=args.scenes)
    lines = [
        f"Measured on {args.machine} by `scripts/evaluate.py` and `scripts/readme_results.py`. The judge (a classifier "
        f"that is never optimised) is right on {_percent(accuracy['clean/animal'])} of the animals and "
        f"{_percent(accuracy['clean/object'])} of the objects of {args.scenes} held-out scenes, and on "
        f"{_percent(accuracy['decoded/animal'])} and {_percent(accuracy['decoded/object'])} after the VAE.",
        "",
        "| model | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (1 + len(COLUMNS)) + "|",
    ]
    shown: list[dict] = []  # ways of sampling whose base model has its row
    for item in args.eval:
        name, _, path = item.partition("=")
        results = read_json(Path(path))
        base = (f"base model, eta {results['sampling']['eta']:g}", "base")
        models = [] if results["sampling"] in shown else [base]
        shown.append(results["sampling"])
        for label, key in [*models, (f"{name}, {results['iteration']} iterations", "tuned")]:
            cells = [_cell(results.get(prompts, {}).get(key, {}).get(what)) for prompts, what in COLUMNS]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    if args.picture:
        picture = args.readme.parent / "docs" / "before_after.png"
        picture.parent.mkdir(exist_ok=True)
        shutil.copyfile(args.picture, picture)
    before, rest = readme.split(START, 1)
    after = rest.split(END, 1)[1]
    args.readme.write_text(before + "\n".join([START, *lines, END]) + after, encoding="utf-8")
    print("\n".join(lines))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _cell(value: dict[str, float] | None) -> str:
    """Shares in percent, rewards as they are, with the standard error."""
    if value is None:
        return "-"
    mean, error = value["mean"], value["standard_error"]
    if 0.0 <= mean <= 1.0:
        return f"{100 * mean:.0f} ± {100 * error:.0f} %"
    return f"{mean:.2f} ± {error:.2f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--eval", action="append", required=True, help="NAME=eval.json, of scripts/evaluate.py (repeat for several)")
    add("--picture", type=Path, help="an image grid of scripts/evaluate.py, for docs/before_after.png")
    add("--machine", required=True, help="what the figures were measured on, in words")
    add("--scenes", type=int, default=2048, help="held-out scenes for the judge's own accuracy")
    add("--readme", type=Path, default=Path("README.md"))
    command.guarded(main, parser.parse_args())
