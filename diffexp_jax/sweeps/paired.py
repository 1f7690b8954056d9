"""The tables and the figure of an experiment whose arms come in pairs, as methods without and with DiffExp."""

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

Summary = Mapping[str, Any]  # of an arm over its seeds

WIDTH, ROW = 8.4, 0.34  # inches of the figure, and of one pair
DOTS = 144  # an inch, of the PNG


def pairs_of(results: Mapping[str, Any]) -> dict[str, tuple[Summary, Summary | None]]:
    """{arm: summaries without and with, None where that has not run}, in the order of the arms."""
    arms, partner = results["arms"], {without: arm for arm, without in results["pairs"].items()}
    return {
        arm: (content["summary"], arms[partner[arm]]["summary"] if partner[arm] in arms else None)
        for arm, content in arms.items()
        if arm in partner
    }


# -------------------------------------------------------------------------------------------------------------- tables


def paired_tables(results: Mapping[str, Any]) -> dict[str, Table]:
    """{caption: table}: what tells most of each set of prompts, what it cost, and where exploration helps."""
    what = telling_reward(results)
    found = {f"{what}, {prompts}": success_table(results, prompts, what) for prompts in prompt_sets(results)}
    return found | {
        "Diversity of the images of a prompt": diversity_table(results),
        "Cost of a run": cost_table(results),
        "Rewards of a prompt's images in training, while it explores": groups_table(results),
        "Gain of DiffExp, pooled over the methods, by how often the base model succeeds": pooled_table(results),
    }


def prompt_sets(results: Mapping[str, Any]) -> Sequence[str]:
    return results["prompts"], *results["unseen"]


def final(summary: Summary | None, prompts: str, what: str) -> Sequence[float | None] | None:
    """The estimate of a final model; None where there is none."""
    return summary and summary["final"].get(prompts, {}).get(what)


def success_table(results: Mapping[str, Any], prompts: str, what: str) -> Table:
    """A row for each pair, and one for the model before fine-tuning."""
    base = results["base"].get(prompts, {}).get(what)
    rows = [] if base is None else [["before", "-", cell([base, None, None], what), "", ""]]
    for arm, (without, explored) in pairs_of(results).items():
        seeds = str(min(len(side["seeds"]) for side in (without, explored) if side))
        difference = explored and explored["difference"].get(prompts, {}).get(what)
        sides = [cell(final(side, prompts, what), what) for side in (without, explored)]
        rows.append([arm, seeds, *sides, cell(difference, what, signed=True)])
    return Table(["method", "seeds", "without", "with DiffExp", "difference"], rows)


def diversity_table(results: Mapping[str, Any]) -> Table:
    """How far the images of a prompt are apart, and how many kinds they are of."""
    signs, prompts = ("diversity/distance", "diversity/vendi"), results["prompts"]
    base = results["base"].get(prompts, {})
    first = [cell([base[sign], None, None], sign) if sign in base else "-" for sign in signs]
    rows = [["before", first[0], "", first[1], ""]] if base else []
    for arm, sides in pairs_of(results).items():
        rows.append([arm, *(cell(final(side, prompts, sign), sign) for sign in signs for side in sides)])
    titles = ("distance", "Vendi score")
    return Table(["method", *(f"{title}, {side}" for title in titles for side in ("without", "with"))], rows)


def cost_table(results: Mapping[str, Any]) -> Table:
    """Queries to half of what the best arm gains; and of the method alone the network's evaluations and the time."""
    rows, costs = [], results["costs"]
    partner = {without: arm for arm, without in results["pairs"].items()}
    for arm in pairs_of(results):
        sides, work = [costs.get(name) for name in (arm, partner[arm])], costs[arm]["evaluations"]
        evaluations = [f"{work[name]:.0f}" for name in ("all", "gradient")]
        rows.append([arm, *map(queries_cell, sides), *evaluations, side_cell(costs[arm], "seconds")])
    queries = [f"queries to half of the best gain, {side}" for side in ("without", "with")]
    return Table(["method", *queries, "evaluations a query", "with a gradient", "seconds of training"], rows)


def groups_table(results: Mapping[str, Any]) -> Table:
    """What there is to compare within a group: how much its rewards differ, and the best of them."""
    rows, groups = [], results["groups"]
    partner = {without: arm for arm, without in results["pairs"].items()}
    for arm in pairs_of(results):
        sides = [groups.get(name, {}) for name in (arm, partner[arm])]
        if any(sides):
            rows.append([arm, *(cell(side.get(name), name) for name in WITHIN_GROUPS for side in sides)])
    titles = ("standard deviation", "best")
    return Table(["method", *(f"{title}, {side}" for title in titles for side in ("without", "with"))], rows)


def queries_cell(cost: Mapping[str, Any] | None) -> str:
    """ "410 [380, 450]"; where not all seeds came there, how many did."""
    if cost is None:
        return "-"
    reached, seeds = cost["reached"], cost["seeds"]
    if not reached:
        return "not reached"
    return side_cell(cost, "queries") + ("" if reached == seeds else f" ({reached} of {seeds})")


def side_cell(cost: Mapping[str, Any] | None, name: str) -> str:
    """A whole number, with its interval where there is one."""
    if cost is None or cost[name] is None:
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
    """Writes STEM.png and STEM.svg: of each prompt set a panel, of each pair a row with two points."""
    pairs, what, sets = pairs_of(results), telling_reward(results), prompt_sets(results)
    with plt.rc_context({"svg.hashsalt": results["name"], "font.size": 9}):
        size = {"figsize": (WIDTH, 1.3 + ROW * len(pairs)), "sharey": True, "layout": "constrained"}
        figure, axes = plt.subplots(1, len(sets), squeeze=False, **size)
        for axis, prompts in zip(axes.flat, sets, strict=True):
            draw_pairs(axis, results, prompts, what)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        title = f"{plain(what)} of final models: means over seeds, 95 % intervals"
        figure.legend(handles, labels, title=title, loc="outside upper left", ncols=len(labels), frameon=False)
        stem.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(f"{stem}.png", dpi=DOTS, metadata={"Software": None})
        figure.savefig(f"{stem}.svg", metadata={"Date": None})  # the same file each time
        plt.close(figure)


def draw_pairs(axis: Any, results: Mapping[str, Any], prompts: str, what: str) -> None:
    """A row for each pair, the first on top."""
    pairs = pairs_of(results)
    names = list(pairs)
    styles = (("without", "black", "o"), ("with DiffExp", SERIES[0], "D"))
    for i, (label, colour, marker) in enumerate(styles):
        found = {y: final(pairs[name][i], prompts, what) for y, name in enumerate(names)}
        found = {y: estimate for y, estimate in found.items() if estimate}
        places = [y + 0.18 * (2 * i - 1) for y in found]
        spread = list(zip(*map(distances, found.values()), strict=True)) or None
        style = {"fmt": marker, "color": colour, "markersize": 4, "elinewidth": 1, "label": label}
        axis.errorbar([estimate[0] for estimate in found.values()], places, xerr=spread, **style)
    base = results["base"].get(prompts, {}).get(what)
    if base is not None:
        axis.axvline(base, color="gray", linestyle="--", linewidth=0.9, label="before")
    axis.set_yticks(range(len(names)), [plain(name) for name in names])
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_title(plain(prompts), fontsize=9)
    axis.grid(alpha=0.3, axis="x")
    if what in SHARES:
        axis.set_xlim(-0.03, 1.03)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def distances(estimate: Sequence[float | None]) -> tuple[float, float]:
    """From the mean down and up to the ends of its interval; a single seed has none."""
    mean, low, high = estimate
    return (0.0, 0.0) if low is None else (mean - low, high - mean)
