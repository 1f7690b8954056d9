"""The numbers of an experiment's results as the cells and tables that documents and pages show."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffexp_jax.report import Table

SIGNS = ("diversity/distance", "diversity/vendi", "luminance", "saturation", "background_share")
SHARES = ("emoji_judge", "background_share")  # and their parts: shares
_DIGITS = {"diversity/distance": 3, "luminance": 3, "saturation": 3}
_WORDS = {"diversity/distance": "distance of a prompt's images", "diversity/vendi": "Vendi score"}
_WORDS |= {"background_share": "background"}


# ------------------------------------------------------------------------------------------------------------- numbers


def number(x: float, what: str, *, signed: bool = False) -> str:
    """Shares in percent, the others with as many digits as they deserve."""
    sign = "+" if signed else ""
    x, digits = (100 * x, 1) if what.split("/")[0] in SHARES else (x, _DIGITS.get(what, 2))
    return f"{round(x, digits) + 0.0:{sign}.{digits}f}"  # no -0.00


def cell(estimate: Sequence[float | None] | None, what: str, *, signed: bool = False) -> str:
    """ "19.10 [18.90, 19.31]"; without an interval where there is one seed, "-" where there is nothing."""
    if estimate is None:
        return "-"
    mean, low, high = (None if x is None else number(x, what, signed=signed) for x in estimate)
    unit = " %" if what.split("/")[0] in SHARES else ""
    return f"{mean}{unit}" if low is None else f"{mean} [{low}, {high}]{unit}"


def words(sign: str) -> str:
    """What one of SIGNS is called."""
    return _WORDS.get(sign, sign)


# -------------------------------------------------------------------------------------------------------------- tables


def measured(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(prompt set, reward) of what is reported: trained prompts first, the trained reward before the held-out one."""
    rewards = [name for name in (results["reward"], results["held_out"]) if name]
    return [(prompts, name) for prompts in (results["prompts"], *results["unseen"]) for name in rewards]


def all_tables(results: Mapping[str, Any]) -> dict[str, Table]:
    """{caption: table} of all that is compared; tables without rows are left out."""
    columns, signs = measured(results), [(results["prompts"], sign) for sign in SIGNS]
    found = {
        "Final models, sampled without exploration": final_table(results, columns, [f"{p}: {w}" for p, w in columns]),
        "Differences of the same seeds": difference_table(results),
        "Cost to reach the baseline": ratio_table(results),
        "Diversity, and signs of over-optimisation": final_table(results, signs, list(map(words, SIGNS))),
        "By how often the base model succeeds": share_table(results),
    }
    return {caption: table for caption, table in found.items() if table.rows}


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


def bin_name(one: Mapping[str, Any]) -> str:
    if one["above"] is None:
        return "no image"
    return f"{100 * one['above']:.0f} to {100 * one['upto']:.0f} %"
