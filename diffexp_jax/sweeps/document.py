"""The pages of results over seeds and the README's table, written from the results' json files."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffexp_jax.errors import InputError
from diffexp_jax.formats.files import read_json
from diffexp_jax.report import Table
from diffexp_jax.report.document_parts import between, markdown, markers
from diffexp_jax.sweeps.cells import cell, measured, telling_reward
from diffexp_jax.sweeps.paired import success_table
from diffexp_jax.sweeps.tables import all_tables, ratio_cell

Results = Sequence[Mapping[str, Any]]  # of every file, by name

NONE_YET = "No results over seeds have been measured yet."
README = ("<!-- results over seeds -->", "<!-- /results over seeds -->")
README_ROWS = {  # name of the results: what the README calls them
    "fig1-emoji_hard": "one prompt that is almost never right, DDPO",
    "fig4_ddpo_pickscore-emoji_hard": "135 prompts, DDPO, two updates",
    "fig4_alignprop_pickscore-emoji_hard": "135 prompts, AlignProp as published",
    "fig4_alignprop_pickscore-emoji_hard-0488ac": "135 prompts, AlignProp, gradient stopped",
}
# The README's figure: of these results, prompts and measure; its title
README_FIGURE = ("fig4_ddpo_pickscore-emoji_hard", "animal_activities", "emoji_judge")
README_TITLE = "DDPO, 135 prompts: images with the right animal and object"
INDEX, OVERVIEW, METHODS = "index.md", "all", "methods"  # the page of all experiments, and what is written into it


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, by name."""
    return [read_json(path, finite=False) for path in sorted(folder.glob("*.json"))]


def settings_lines(results: Mapping[str, Any]) -> list[str]:
    """What all arms have, and a line for what each changes of the arm that it is compared with."""
    shown = ", ".join(f"{key} {value}" for key, value in results["settings"].items())
    arms_of: dict[str, list[str]] = {}
    for arm, content in results["arms"].items():
        changed = ", ".join(f"`{key}={value}`" for key, value in content["differs"].items())
        arms_of.setdefault(changed, []).append(arm)
    lines = [f"{', '.join(arms)}: {changed}." for changed, arms in arms_of.items() if changed]
    return [f"All arms: {shown}.", *lines]


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


def compared_line(results: Mapping[str, Any]) -> str:
    """What an arm is compared with."""
    if results.get("pairs"):
        return "A method's variants are compared with the method itself, with the same seeds."
    return f"The baseline is *{results['baseline']}*."


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
    name, n, made_by = results["name"], results["samples_per_prompt"], command_line(results)
    images = f"{n[0]} images" if len(n) == 1 else "images"
    lead = f"{results['shows'][:1].upper()}{results['shows'][1:]}. {compared_line(results)}"
    parts = [
        [f"{lead} Final models are judged by {images} of each prompt."],
        [f"Command: {made_by}"] if made_by else [],
        [unfinished_line(results)] if results["unfinished"] else [],
        [f"![Curves of {name}]({name}.png)"],
    ]
    for caption, table in all_tables(results).items():
        parts += [[f"**{caption}**"], markdown(table)]
    parts += [["**Settings**"], [f"- {line}" for line in (*settings_lines(results), machine_line(results))]]
    return "\n\n".join("\n".join(part) for part in parts if part)


_COMPARED = ["before", "without", "with DiffExp", "difference"]
_QUERIES = ["as evaluated", "of training samples"]
_QUERIES_LEAD = "Queries until the reward is the baseline's final one, relative to the baseline:"


def overview(every: Results) -> str:
    """The comparisons of DiffExp with plain fine-tuning: all that is measured of each, then the queries it took."""
    rows, queries = [], []
    for results in comparisons(every):
        for i, (prompts, what) in enumerate(measured(results)):
            first = label(results) if i == 0 else ["", ""]
            rows.append([*first, f"{what}, {prompts}", *compared_cells(results, prompts, what)])
        queries.append([*label(results), *queries_cells(results)])
    tables = (["experiment", "seeds", "what", *_COMPARED], rows), (["experiment", "seeds", *_QUERIES], queries)
    written = ["\n".join(markdown(Table(*table))) for table in tables]
    return f"{written[0]}\n\n{_QUERIES_LEAD}\n\n{written[1]}" if rows else NONE_YET


def methods_overview(every: Results) -> str:
    """A row for each method: what it reaches on the trained prompts, of every model that `methods` was run on."""
    of_models = [results for results in every if results["experiment"] == METHODS and not results["overrides"]]
    of_models.sort(key=lambda results: -len(results["arms"]))  # the most complete first
    tables = [success_table(results, results["prompts"], telling_reward(results)) for results in of_models]
    found = [{name: cells for name, _, *cells in table.rows} for table in tables]  # without the number of seeds
    order = ["before", *dict.fromkeys(name for results in of_models for name in results["pairs"].values())]
    header, rows = ["method"], {name: [] for name in order if any(name in of_model for of_model in found)}
    for results, table, of_model in zip(of_models, tables, found, strict=True):
        header += [f"{results['model']}: {title}" for title in table.header[2:]]
        for name, cells in rows.items():
            cells += of_model.get(name, ["-"] * (len(table.header) - 2))
    return "\n".join(markdown(Table(header, [[name, *cells] for name, cells in rows.items()]))) if rows else NONE_YET


def brief_overview(every: Results, folder: str) -> str:
    """A row for each of README_ROWS, of the reward that says most; `folder` has their pages."""
    rows = []
    for name, words_of_it in README_ROWS.items():
        for results in (results for results in every if results["name"] == name):
            cells = compared_cells(results, results["prompts"], telling_reward(results))
            rows.append([f"[{words_of_it}]({folder}/{name}.md)", *cells])
    return (
        "\n".join(markdown(Table(["task", "before", "without DiffExp", "with DiffExp", "difference"], rows)))
        or NONE_YET
    )


def comparisons(every: Results) -> Results:
    """The comparisons of DiffExp with plain fine-tuning over two seeds or more: one says too little."""
    return [
        results
        for results in every
        if results["name"].startswith("fig")
        and results["arms"].keys() >= {"baseline", "diffexp"}
        and results["arms"]["diffexp"]["summary"]["paired"] > 1
    ]


def label(results: Mapping[str, Any]) -> list[str]:
    """An experiment's name as a link to its page, with what its command sets; and how many seeds it has."""
    given = "".join(f", `{key}={value}`" for key, value in results["overrides"].items())
    seeds = results["arms"]["diffexp"]["summary"]["paired"]
    return [f"[{results['name']}]({results['name']}.md){given}", str(seeds)]


def compared_cells(results: Mapping[str, Any], prompts: str, what: str) -> list[str]:
    """Cells for one reward on one prompt set: the model before, the final ones of both arms, and their difference."""
    without, explored = (results["arms"][arm]["summary"] for arm in ("baseline", "diffexp"))
    base = results["base"].get(prompts, {}).get(what)
    finals = [cell(side["final"].get(prompts, {}).get(what), what) for side in (without, explored)]
    difference = cell(explored["difference"].get(prompts, {}).get(what), what, signed=True)
    return [cell(base if base is None else [base, None, None], what), *finals, difference]


def queries_cells(results: Mapping[str, Any]) -> list[str]:
    """To the baseline's final reward: as evaluated, and on the training samples."""
    ratios = [results["arms"]["diffexp"]["summary"][key] for key in ("ratio", "training_ratio")]
    return [ratio_cell(ratio["final"]["reward_queries"]) if ratio else "" for ratio in ratios]


# ----------------------------------------------------------------------------------------------------------- documents


def pages(folder: Path, every: Results) -> dict[Path, str]:
    """The index and a page for each experiment, {file: text}: tables are written again, the prose stays.

    Raises:
      InputError: the index or a page lacks its markers, or a page is of an experiment that has no results.
    """
    known = [OVERVIEW, METHODS, *(results["name"] for results in every)]
    for path in sorted(folder.glob("*.md")):
        for name in re.findall(r"<!-- results: (.+?) -->", path.read_text(encoding="utf-8")):
            if name not in known:
                raise InputError(f"{path}: is of {name!r}, of which there are no results; known: {', '.join(known)}")
    index = folder / INDEX
    text = between(index.read_text(encoding="utf-8"), markers(OVERVIEW), overview(every), str(index))
    if markers(METHODS)[0] in text:
        text = between(text, markers(METHODS), methods_overview(every), str(index))
    found = {index: text}
    for results in every:
        path, pair = folder / f"{results['name']}.md", markers(results["name"])
        new = f"# {results['name']}\n\n{pair[0]}\n{pair[1]}\n"
        text = path.read_text(encoding="utf-8") if path.exists() else new
        found[path] = between(text, pair, section(results), str(path))
    return found


def readme(text: str, every: Results, *, where: str = "README.md") -> str:
    """The README with its table of results over seeds written again."""
    return between(text, README, brief_overview(every, "docs/evidence/results"), where)
