"""The tables of an experiment's results that documents and pages show."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffexp_jax.report import Table
from diffexp_jax.sweeps.cells import SIGNS, bin_name, cell, measured, words
from diffexp_jax.sweeps.paired import paired_tables


def all_tables(results: Mapping[str, Any]) -> dict[str, Table]:
    """{caption: table} of all that is compared; tables without rows are left out."""
    found = paired_tables(results) if results.get("pairs") else arm_tables(results)
    return {caption: table for caption, table in found.items() if table.rows}


def arm_tables(results: Mapping[str, Any]) -> dict[str, Table]:
    """Of an experiment whose arms have one baseline."""
    columns, signs = measured(results), [(results["prompts"], sign) for sign in SIGNS]
    return {
        "Final models, sampled without exploration": final_table(results, columns, [f"{p}: {w}" for p, w in columns]),
        "Differences of the same seeds": difference_table(results),
        "Cost to reach the baseline": ratio_table(results),
        "Diversity, and signs of over-optimisation": final_table(results, signs, list(map(words, SIGNS))),
        "By how often the base model succeeds": share_table(results),
    }


def final_table(results: Mapping[str, Any], columns: Sequence[tuple[str, str]], header: Sequence[str]) -> Table:
    """A row for each arm's final models, and one for the model before fine-tuning."""
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
