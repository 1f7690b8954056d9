"""The sections of docs/evidence/results.md and the README's table, written from docs/evidence/results/*.json."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffexp_jax.errors import InputError
from diffexp_jax.formats.files import read_json
from diffexp_jax.report import Table
from diffexp_jax.report.document_parts import between, markdown, markers
from diffexp_jax.sweeps.tables import (
    SHARES,
    SIGNS,
    cell,
    difference_table,
    final_table,
    measured,
    ratio_cell,
    ratio_table,
    share_table,
    words,
)

Results = Sequence[Mapping[str, Any]]  # of every file, by name

NONE_YET = "No results over seeds have been measured yet."
README = ("<!-- results over seeds -->", "<!-- /results over seeds -->")
OVERVIEW = "all"  # the section before those of the experiments


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, by name."""
    return [read_json(path, finite=False) for path in sorted(folder.glob("*.json"))]


def settings_line(results: Mapping[str, Any]) -> str:
    """What all arms have, and what each changes."""
    shown = ", ".join(f"{key} {value}" for key, value in results["settings"].items())
    lines = [f"All arms: {shown}."]
    for arm, content in results["arms"].items():
        if content["differs"]:
            changed = ", ".join(f"`{key}={value}`" for key, value in content["differs"].items())
            lines.append(f"{arm}: {changed}.")
    return " ".join(lines)


def machine_line(results: Mapping[str, Any]) -> str:
    machines = [
        f"{machine['devices']}, " + ", ".join(f"{name} {machine[name]}" for name in ("python", "jax", "numpy"))
        for machine in results["machines"]
    ]
    return f"Measured on {'; '.join(machines) or 'a machine that was not recorded'}."


def command_line(results: Mapping[str, Any]) -> str:
    """What made the runs, where a sweep did."""
    if not results["experiment"]:
        return ""
    model = f" --model {results['model']}" if results["model"] else ""
    given = "".join(f" {shlex.quote(f'--config.{key}={value}')}" for key, value in results["overrides"].items())
    return f"`python scripts/sweep.py --experiment {results['experiment']}{model}{given}`"


def unfinished_line(results: Mapping[str, Any]) -> str:
    """Which runs are not in the tables: a method that fails with some seeds must not look better for it."""
    left_out = [
        f"{arm} seed {seed} ({done} of {planned} iterations)"
        for arm, seeds in results["unfinished"].items()
        for seed, (done, planned) in seeds.items()
    ]
    return f"Not finished, so left out: {', '.join(left_out)}."


def section(results: Mapping[str, Any]) -> str:
    """All that is written of one experiment."""
    name, columns = results["name"], measured(results)
    n = results["samples_per_prompt"]
    images = f"{n[0]} images of each prompt" if len(n) == 1 else "images"
    signs = [(results["prompts"], sign) for sign in SIGNS]
    tables = [
        final_table(results, columns, [f"{prompts}: {what}" for prompts, what in columns]),
        difference_table(results),
        ratio_table(results),
        final_table(results, signs, list(map(words, SIGNS))),
        share_table(results),
    ]
    parts = [
        [f"{results['shows'][:1].upper()}{results['shows'][1:]}. The baseline is *{results['baseline']}*."],
        [settings_line(results)],
        [f"{machine_line(results)} {command_line(results)}".strip()],
        [unfinished_line(results)] if results["unfinished"] else [],
        [f"![Curves of {name}](results/{name}.png)"],
        [f"Final models, {images} sampled without exploration:"],
        *map(markdown, tables),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


_COMPARED = ["before", "without", "with DiffExp", "difference"]
_QUERIES = ["queries, evaluated", "queries, training samples"]


def overview(every: Results) -> str:
    """The comparisons of DiffExp with plain fine-tuning, all that is measured of each."""
    rows = []
    for results in comparisons(every):
        for i, (prompts, what) in enumerate(measured(results)):
            first, queries = ["", ""], ["", ""]
            if i == 0:
                first, queries = label(results, results["name"]), queries_cells(results)
            rows.append([*first, f"{what}, {prompts}", *compared_cells(results, prompts, what), *queries])
    return "\n".join(markdown(Table(["experiment", "seeds", "what", *_COMPARED, *_QUERIES], rows))) or NONE_YET


def brief_overview(every: Results, page: str) -> str:
    """The comparisons with a row each, of the reward that says most; `page` is the document that has their sections."""
    rows = []
    for results in comparisons(every):
        what = telling_reward(results)
        unseen = [compared_cells(results, prompts, what)[-1] for prompts in results["unseen"][:1]] or ["-"]
        cells = [*compared_cells(results, results["prompts"], what), *unseen, *queries_cells(results)]
        rows.append([*label(results, results["experiment"], page), what, *cells])
    header = ["experiment", "seeds", "what", *_COMPARED, "difference, unseen prompts", *_QUERIES]
    return "\n".join(markdown(Table(header, rows))) or NONE_YET


def comparisons(every: Results) -> Results:
    """Those of DiffExp with plain fine-tuning over two seeds or more: one says too little."""
    return [
        results
        for results in every
        if results["name"].startswith("fig")
        and results["arms"].keys() >= {"baseline", "diffexp"}
        and results["arms"]["diffexp"]["summary"]["paired"] > 1
    ]


def label(results: Mapping[str, Any], text: str, page: str = "") -> list[str]:
    """A text that leads to its section, what its command sets, and how many seeds it has."""
    given = "".join(f", `{key}={value}`" for key, value in results["overrides"].items())
    seeds = results["arms"]["diffexp"]["summary"]["paired"]
    return [f"[{text}]({page}#{results['name']}){given}", str(seeds)]


def compared_cells(results: Mapping[str, Any], prompts: str, what: str) -> list[str]:
    """Of one reward on one prompt set: the model before, the final ones of both arms, and their difference."""
    without, explored = (results["arms"][arm]["summary"] for arm in ("baseline", "diffexp"))
    base = results["base"].get(prompts, {}).get(what)
    finals = [cell(side["final"].get(prompts, {}).get(what), what) for side in (without, explored)]
    difference = cell(explored["difference"].get(prompts, {}).get(what), what, signed=True)
    return [cell(base if base is None else [base, None, None], what), *finals, difference]


def queries_cells(results: Mapping[str, Any]) -> list[str]:
    """To the baseline's final reward: as evaluated, and on the training samples."""
    ratios = [results["arms"]["diffexp"]["summary"][key] for key in ("ratio", "training_ratio")]
    return [ratio_cell(ratio["final"]["reward_queries"]) if ratio else "" for ratio in ratios]


def telling_reward(results: Mapping[str, Any]) -> str:
    """A share of successes, unless the base model has them all; else the reward that is trained on."""
    for what in filter(None, (results["reward"], results["held_out"])):
        if what in SHARES and results["base"].get(results["prompts"], {}).get(what, 0.0) < 1.0:
            return what
    return results["reward"]


# ----------------------------------------------------------------------------------------------------------- documents


def document(text: str, every: Results, *, where: str = "the document") -> str:
    """The document with its sections written anew; the prose stays. An experiment without a section gets one.

    Raises:
      InputError: the overview's markers are missing, or a section is of an experiment that has no results.
    """
    known = [OVERVIEW, *(results["name"] for results in every)]
    for name in re.findall(r"<!-- results: (.+?) -->", text):
        if name not in known:
            raise InputError(
                f"{where}: has a section {name!r}, of which there are no results; known: {', '.join(known)}"
            )
    text = between(text, markers(OVERVIEW), overview(every), where)
    for results in every:
        pair = markers(results["name"])
        if pair[0] not in text:
            text = f"{text.rstrip()}\n\n## {results['name']}\n\n{pair[0]}\n{pair[1]}\n"
        text = between(text, pair, section(results), where)
    return text


def readme(text: str, every: Results, *, where: str = "README.md") -> str:
    """The README with its table of results over seeds written anew."""
    return between(text, README, brief_overview(every, "docs/evidence/results.md"), where)
