"""docs/results.md's sections and the README's table of results over seeds, written from docs/results/*.json."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from document_parts import between, markdown, markers

from diffexp_jax import InputError
from diffexp_jax.formats.files import read_json
from diffexp_jax.report import Table

Results = Sequence[Mapping[str, Any]]  # of every file, by name

NONE_YET = "No results over seeds have been measured yet."
README = ("<!-- results over seeds -->", "<!-- /results over seeds -->")
OVERVIEW = "all"  # the section before those of the experiments
SIGNS = ("diversity/distance", "diversity/vendi", "luminance", "saturation", "background_share")
_PERCENT = ("emoji_judge", "background_share")  # and their parts: shares
_DIGITS = {"diversity/distance": 3, "luminance": 3, "saturation": 3}
_WORDS = {"diversity/distance": "distance of a prompt's images", "diversity/vendi": "Vendi score"}
_WORDS |= {"background_share": "background"}


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, by name."""
    return [read_json(path) for path in sorted(folder.glob("*.json"))]


# ------------------------------------------------------------------------------------------------------------- numbers


def number(x: float, what: str, *, signed: bool = False) -> str:
    """Shares in percent, the others with as many digits as they deserve."""
    sign = "+" if signed else ""
    x, digits = (100 * x, 1) if what.split("/")[0] in _PERCENT else (x, _DIGITS.get(what, 2))
    return f"{round(x, digits) + 0.0:{sign}.{digits}f}"  # no -0.00


def cell(estimate: Sequence[float | None] | None, what: str, *, signed: bool = False) -> str:
    """ "19.10 [18.90, 19.31]"; without an interval where there is one seed, "-" where there is nothing."""
    if estimate is None:
        return "-"
    mean, low, high = (None if x is None else number(x, what, signed=signed) for x in estimate)
    unit = " %" if what.split("/")[0] in _PERCENT else ""
    return f"{mean}{unit}" if low is None else f"{mean} [{low}, {high}]{unit}"


def words(sign: str) -> str:
    """What one of SIGNS is called."""
    return _WORDS.get(sign, sign)


# -------------------------------------------------------------------------------------------------------------- tables


def measured(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(prompt set, reward) of what is reported: trained prompts first, the trained reward before the held-out one."""
    rewards = [name for name in (results["reward"], results["held_out"]) if name]
    return [(prompts, name) for prompts in (results["prompts"], *results["unseen"]) for name in rewards]


def final_table(results: Mapping[str, Any], columns: Sequence[tuple[str, str]], header: Sequence[str]) -> Table:
    """Of the final models, a row for each arm, and one for the model before fine-tuning."""
    base = results["base"]
    first = [cell([base[p][w], None, None] if w in base.get(p, {}) else None, w) for p, w in columns]
    rows = [["before", "-", *first]] if base else []
    for arm, content in results["arms"].items():
        summary = content["summary"]
        cells = [cell(summary["final"].get(p, {}).get(w), w) for p, w in columns]
        rows.append([arm, str(len(summary["seeds"])), *cells])
    return Table(["arm", "seeds", *header], rows)


def difference_table(results: Mapping[str, Any]) -> Table:
    """Every arm minus the baseline of the same seed; and the baseline's model sampled with the schedule."""
    columns, rows = measured(results), []
    for arm, content in results["arms"].items():
        for key, label in (("difference", arm), ("explored_difference", f"{arm}, sampled with the schedule")):
            found = content["summary"][key]
            if found and not (arm == results["baseline"] and key == "difference"):
                rows.append([label, *(cell(found.get(p, {}).get(w), w, signed=True) for p, w in columns)])
    return Table(["minus the baseline", *(f"{p}: {w}" for p, w in columns)], rows)


def ratio_cell(ratio: Mapping[str, Any]) -> str:
    """ "0.81 [0.74, 0.92] (5 of 5)"; a lower bound where not every seed reached the level."""
    if ratio["ratio"] is None:
        return "-"
    bound = "at least " if ratio["reached"] < ratio["seeds"] else ""
    return f"{bound}{cell(ratio['ratio'], '')} ({ratio['reached']} of {ratio['seeds']})"


def ratio_table(results: Mapping[str, Any]) -> Table:
    """Queries to the levels of the baseline, relative to it; UNet evaluations too where those ratios are others."""
    levels = {"final": "the baseline's final reward", "gain": "90 % of its gain"}
    costs = {"reward_queries": "queries", "unet_evaluations": "UNet evaluations"}
    curves = {"ratio": "evaluated", "training_ratio": "training samples"}
    ratios = {
        f"{arm}, {name}": content["summary"][key]
        for arm, content in results["arms"].items()
        for key, name in curves.items()
        if arm != results["baseline"] and content["summary"][key]
    }
    if all(
        ratio[level]["reward_queries"] == ratio[level]["unet_evaluations"]
        for ratio in ratios.values()
        for level in levels
    ):
        costs = {"reward_queries": "queries (and UNet evaluations)"}
    columns = [(level, cost) for level in levels for cost in costs]
    rows = [[label, *(ratio_cell(ratio[level][cost]) for level, cost in columns)] for label, ratio in ratios.items()]
    header = [f"{costs[cost]} to {levels[level]} (seeds that reach it)" for level, cost in columns]
    return Table(["relative to the baseline", *header], rows)


def gains_by_share(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """{arm: {prompt set: gains by how often the base model succeeds}} of the arms that explore in another way."""
    return {
        arm: content["summary"]["by_base_share"]
        for arm, content in results["arms"].items()
        if any(key.startswith("exploration.") for key in content["differs"])
    }


def share_table(results: Mapping[str, Any]) -> Table:
    """Every arm minus the baseline by how often the base model succeeds; baseline: of the arm with the most pairs."""
    found = gains_by_share(results)
    widest = max(found, key=lambda arm: results["arms"][arm]["summary"]["paired"], default=None)
    rows = []
    for prompts, of_widest in found[widest].items() if found else ():
        what = of_widest["what"]
        for i, one in enumerate(of_widest["bins"]):
            gains = [sets[prompts]["bins"][i]["gain"] if prompts in sets else None for sets in found.values()]
            cells = [cell(one["baseline"], what), *(cell(gain, what, signed=True) for gain in gains)]
            rows.append([prompts, bin_name(one), str(one["prompts"]), *cells])
    header = ["prompts", "base model succeeds in", "prompts there", "baseline", *(f"gain of {arm}" for arm in found)]
    return Table(header, rows)


def bin_name(one: Mapping[str, Any]) -> str:
    if one["above"] is None:
        return "no image"
    return f"{100 * one['above']:.0f} to {100 * one['upto']:.0f} %"


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
    """The same with a row each, of the reward that says most; `page` is the document that has their sections."""
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


def label(results: Mapping[str, Any], words: str, page: str = "") -> list[str]:
    """Words that lead to its section, what its command sets, and how many seeds it has."""
    given = "".join(f", `{key}={value}`" for key, value in results["overrides"].items())
    seeds = results["arms"]["diffexp"]["summary"]["paired"]
    return [f"[{words}]({page}#{results['name']}){given}", str(seeds)]


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
        if what in _PERCENT and results["base"].get(results["prompts"], {}).get(what, 0.0) < 1.0:
            return what
    return results["reward"]


# ----------------------------------------------------------------------------------------------------------- documents


def document(text: str, every: Results, *, where: str = "the document") -> str:
    """docs/results.md with its sections written anew; the prose stays. An experiment without a section gets one.

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
    return between(text, README, brief_overview(every, "docs/results.md"), where)
