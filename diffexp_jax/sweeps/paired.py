"""The tables and the figure of an experiment of several methods, each with variants, as without and with DiffExp."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from diffexp_jax.report import Table, plain
from diffexp_jax.report.page import SERIES
from diffexp_jax.sweeps.cells import SHARES, WITHIN_GROUPS, bin_name, cell, telling_reward

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import PercentFormatter  # noqa: E402

WIDTH, ROW = 8.4, 0.34  # inches of the figure, and of one method
DOTS = 144  # an inch, of the PNG
MARKERS = "oDs^v"
_LABELS = {"diffexp": "with DiffExp"}


def methods_of(results: Mapping[str, Any]) -> list[str]:
    """The arms that others are compared with, of which there are runs."""
    return [arm for arm in results["arms"] if arm in results["pairs"].values()]


def variants_of(results: Mapping[str, Any]) -> list[str]:
    """What the names of the other arms add to those of the methods, in order."""
    return list(dict.fromkeys(arm.removeprefix(f"{method}_") for arm, method in results["pairs"].items()))


def sides_of(results: Mapping[str, Any], method: str) -> list[str]:
    """The method's arm and those of its variants, whether or not they have run."""
    return [method, *(f"{method}_{variant}" for variant in variants_of(results))]


def labels_of(results: Mapping[str, Any]) -> list[str]:
    """What the columns of `sides_of` are called."""
    variants = variants_of(results)
    first = "without" if variants == ["diffexp"] else "as configured"
    return [first, *(_LABELS.get(variant, variant) for variant in variants)]


def prompt_sets(results: Mapping[str, Any]) -> Sequence[str]:
    return results["prompts"], *results["unseen"]


def final(results: Mapping[str, Any], arm: str, prompts: str, what: str) -> Sequence[float | None] | None:
    """The estimate of an arm's final models; None where there is none."""
    content = results["arms"].get(arm)
    return content and content["summary"]["final"].get(prompts, {}).get(what)


# -------------------------------------------------------------------------------------------------------------- tables


def paired_tables(results: Mapping[str, Any]) -> dict[str, Table]:
    """{caption: table}: what tells most of each set of prompts, what it cost, and where exploration helps."""
    what = telling_reward(results)
    found = {f"{what}, {prompts}": success_table(results, prompts, what) for prompts in prompt_sets(results)}
    found |= {
        "Diversity of the images of a prompt": diversity_table(results),
        "Cost of a run": cost_table(results),
        "Rewards of a prompt's images in training, while it explores": groups_table(results),
    }
    pooled = "Gain of DiffExp, pooled over the methods, by how often the base model succeeds"
    return found | ({pooled: pooled_table(results)} if variants_of(results) == ["diffexp"] else {})


def success_table(results: Mapping[str, Any], prompts: str, what: str) -> Table:
    """A row for each method, and one for the model before fine-tuning; the difference where there is one variant."""
    base, labels = results["base"].get(prompts, {}).get(what), labels_of(results)
    compares = len(labels) == 2
    empty = [""] * (len(labels) - 1 + compares)
    rows = [] if base is None else [["before", "-", cell([base, None, None], what), *empty]]
    for method in methods_of(results):
        sides = sides_of(results, method)
        summaries = [results["arms"][arm]["summary"] for arm in sides if arm in results["arms"]]
        cells = [cell(final(results, arm, prompts, what), what) for arm in sides]
        if compares:
            of_pair = summaries[1]["difference"].get(prompts, {}).get(what) if len(summaries) == 2 else None
            cells.append(cell(of_pair, what, signed=True))
        rows.append([method, str(min(len(summary["seeds"]) for summary in summaries)), *cells])
    return Table(["method", "seeds", *labels, *["difference"] * compares], rows)


def diversity_table(results: Mapping[str, Any]) -> Table:
    """How far the images of a prompt are apart, and how many kinds they are of."""
    signs, prompts = {"diversity/distance": "distance", "diversity/vendi": "Vendi score"}, results["prompts"]
    base, labels = results["base"].get(prompts, {}), labels_of(results)
    first = [cell([base[sign], None, None], sign) if sign in base else "-" for sign in signs]
    rows = [["before", *(text for x in first for text in (x, *[""] * (len(labels) - 1)))]] if base else []
    for method in methods_of(results):
        sides = sides_of(results, method)
        rows.append([method, *(cell(final(results, arm, prompts, sign), sign) for sign in signs for arm in sides)])
    return Table(["method", *(f"{title}, {label}" for title in signs.values() for label in labels)], rows)


def cost_table(results: Mapping[str, Any]) -> Table:
    """Queries to half of what the best arm gains; and of the method alone the network's evaluations and the time."""
    rows, costs = [], results["costs"]
    for method in methods_of(results):
        work = costs[method]["evaluations"]
        queries = [queries_cell(costs.get(arm)) for arm in sides_of(results, method)]
        evaluations = [f"{work[name]:.0f}" for name in ("all", "gradient")]
        rows.append([method, *queries, *evaluations, side_cell(costs[method], "seconds")])
    queries = [f"queries to half of the best gain, {label}" for label in labels_of(results)]
    return Table(["method", *queries, "evaluations a query", "with a gradient", "seconds of training"], rows)


def groups_table(results: Mapping[str, Any]) -> Table:
    """What there is to compare within a group: how much its rewards differ, and the best of them."""
    rows, groups = [], results["groups"]
    for method in methods_of(results):
        sides = [groups.get(arm, {}) for arm in sides_of(results, method)]
        if any(sides):
            rows.append([method, *(cell(side.get(name), name) for name in WITHIN_GROUPS for side in sides)])
    titles, labels = ("standard deviation", "best"), labels_of(results)
    return Table(["method", *(f"{title}, {label}" for title in titles for label in labels)], rows)


def queries_cell(cost: Mapping[str, Any] | None) -> str:
    """ "410 [380, 450]"; where not all seeds came there, how many did."""
    if cost is None:
        return "-"
    reached, seeds = cost["reached"], cost["seeds"]
    if not reached:
        return "not reached"
    return side_cell(cost, "queries") + ("" if reached == seeds else f" ({reached} of {seeds})")


def side_cell(cost: Mapping[str, Any], name: str) -> str:
    """A whole number, with its interval where there is one."""
    if cost[name] is None:
        return "-"
    mean, low, high = (None if x is None else f"{x:.0f}" for x in cost[name])
    return mean if low is None else f"{mean} [{low}, {high}]"


def pooled_table(results: Mapping[str, Any]) -> Table:
    """Every pair of runs of every method, by how often the base model succeeds with a prompt."""
    rows = []
    for prompts, content in results["pooled"].items():
        for one in content["bins"]:
            cells = cell(one["baseline"], content["what"]), cell(one["gain"], content["what"], signed=True)
            rows.append([prompts, bin_name(one), str(one["prompts"]), *cells])
    return Table(["prompts", "base model succeeds in", "prompts there", "without", "gain of DiffExp"], rows)


# -------------------------------------------------------------------------------------------------------------- figure


def save_figure(results: Mapping[str, Any], stem: Path) -> None:
    """Writes STEM.png and STEM.svg: of each prompt set a panel, of each method a row with a point for each side."""
    what, sets = telling_reward(results), prompt_sets(results)
    with plt.rc_context({"svg.hashsalt": results["name"], "font.size": 9}):
        size = {"figsize": (WIDTH, 1.3 + ROW * len(methods_of(results))), "sharey": True, "layout": "constrained"}
        figure, axes = plt.subplots(1, len(sets), squeeze=False, **size)
        for axis, prompts in zip(axes.flat, sets, strict=True):
            draw_methods(axis, results, prompts, what)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        title = f"{plain(what)} of final models: means over seeds, 95 % intervals"
        figure.legend(handles, labels, title=title, loc="outside upper left", ncols=len(labels), frameon=False)
        stem.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(f"{stem}.png", dpi=DOTS, metadata={"Software": None})
        figure.savefig(f"{stem}.svg", metadata={"Date": None})  # the same file each time
        plt.close(figure)


def draw_methods(axis: Any, results: Mapping[str, Any], prompts: str, what: str) -> None:
    """A row for each method, the first on top."""
    methods, labels = methods_of(results), labels_of(results)
    for i, label in enumerate(labels):
        arms = [sides_of(results, method)[i] for method in methods]
        found = {y: final(results, arm, prompts, what) for y, arm in enumerate(arms)}
        found = {y: estimate for y, estimate in found.items() if estimate}
        places = [y + 0.36 * (i / (len(labels) - 1) - 0.5) for y in found]
        spread = list(zip(*map(distances, found.values()), strict=True)) or None
        style = {"fmt": MARKERS[i % len(MARKERS)], "color": ("black", *SERIES)[i], "markersize": 4, "elinewidth": 1}
        axis.errorbar([estimate[0] for estimate in found.values()], places, xerr=spread, label=plain(label), **style)
    base = results["base"].get(prompts, {}).get(what)
    if base is not None:
        axis.axvline(base, color="gray", linestyle="--", linewidth=0.9, label="before")
    axis.set_yticks(range(len(methods)), [plain(method) for method in methods])
    axis.set_ylim(len(methods) - 0.5, -0.5)
    axis.set_title(plain(prompts), fontsize=9)
    axis.grid(alpha=0.3, axis="x")
    if what in SHARES:
        axis.set_xlim(-0.03, 1.03)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def distances(estimate: Sequence[float | None]) -> tuple[float, float]:
    """From the mean down and up to the ends of its interval; a single seed has none."""
    mean, low, high = estimate
    return (0.0, 0.0) if low is None else (mean - low, high - mean)
