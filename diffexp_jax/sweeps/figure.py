"""The figure of an experiment: curves of all arms with their intervals over seeds, and the gain by base share."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from diffexp_jax.sweeps import paired
from diffexp_jax.sweeps.cells import OF_TRAINING, SHARES, WITHIN_GROUPS, bin_name, measured, telling_reward
from diffexp_jax.sweeps.tables import gains_by_share

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import PercentFormatter  # noqa: E402

from diffexp_jax.report import plain  # noqa: E402
from diffexp_jax.report.page import SERIES  # noqa: E402
from diffexp_jax.sweeps.comparison import mean_over_seeds  # noqa: E402

WIDTH, HEIGHT = 4.2, 3.2  # inches of a panel
ROW = 0.34  # inches of a method
MARKERS = "oDs^v"
COLUMNS = 2  # so that letters can be read where a page is as wide as a column of text
DOTS = 144  # an inch, of the PNG
MOST_BANDS = 3  # arms whose intervals can be told apart as bands; of more the tables have them
OPTIONS = {"font.size": 9}
SMALL = 7  # size of the letters that have little room
COLOURS = (*SERIES, "#e377c2", "#17becf", "#bcbd22")


def save(results: Mapping[str, Any], stem: Path) -> None:
    """Writes STEM.png and STEM.svg: a panel for each curve, one legend; nothing is smoothed, in no arm.

    Of arms in pairs it is that of `save_methods`: so many curves cannot be told apart.
    """
    if results.get("pairs"):
        return save_methods(results, stem)
    panels = panels_of(results)
    shares = share_bars(results)
    n = len(panels) + bool(shares)
    columns = min(COLUMNS, n)
    rows = -(-n // columns)
    bands = "bands: 95 % intervals" if has_bands(results) else "95 % intervals: see the tables"
    legend = f"means over seeds (their number in brackets); {bands}"
    size = (WIDTH * columns, HEIGHT * rows)
    with saved(results["name"], stem, legend, rows, columns, most=2 * columns, figsize=size) as axes:
        for axis in axes.flat[n:]:
            axis.set_axis_off()
        for axis, (kind, curve, title) in zip(axes.flat, panels, strict=False):
            draw_curves(axis, results, kind, curve, title)
        if shares:
            draw_bars(axes.flat[len(panels)], shares, results)


@contextlib.contextmanager
def saved(name: str, stem: Path, title: str, rows: int, columns: int, *, most: int, **options: Any) -> Iterator[Any]:
    """The panels [rows, columns] of a figure, drawn into within the block; then it is written, with the first's legend.

    Args:
      title: of the legend, of which at most `most` entries stand side by side.
    """
    with plt.rc_context({"svg.hashsalt": name} | OPTIONS):
        figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained", **options)
        yield axes
        handles, labels = axes.flat[0].get_legend_handles_labels()
        place = {"loc": "outside upper left", "ncols": min(len(labels), most), "frameon": False}
        figure.legend(handles, labels, title=title, **place)
        stem.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(f"{stem}.png", dpi=DOTS, metadata={"Software": None})
        figure.savefig(f"{stem}.svg", metadata={"Date": None})  # the same file each time
        plt.close(figure)


def save_panel(results: Mapping[str, Any], prompts: str, what: str, path: Path, *, title: str) -> None:
    """Writes one of the panels as a PNG: large letters, for a page where it is small."""
    with plt.rc_context(OPTIONS | {"font.size": 13}):
        figure, axis = plt.subplots(figsize=(8.0, 3.6), layout="constrained")
        draw_curves(axis, results, "evaluation", f"eval/{prompts}/{what}", title, evaluations=False)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)


def colours(results: Mapping[str, Any]) -> dict[str, str]:
    """{arm: its colour}, the same in curves and bars."""
    others = [arm for arm in results["arms"] if arm != results["baseline"]]
    return {results["baseline"]: "black"} | {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(others)}


def has_bands(results: Mapping[str, Any]) -> bool:
    return len(results["arms"]) <= MOST_BANDS


def panels_of(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(kind of curves, which one, title) of every panel with curves."""
    panels = [("evaluation", f"eval/{prompts}/{what}", f"{what}, {prompts}") for prompts, what in measured(results)]
    panels = [panel for panel in panels if all(panel[1] in curves for curves in every_curve(results, "evaluation"))]
    return [*panels, ("training", "reward/mean", "reward/mean of the training samples")]


def every_curve(results: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    return [seed["curves"][kind] for arm in results["arms"].values() for seed in arm["seeds"].values()]


def draw_curves(
    axis: Any, results: Mapping[str, Any], kind: str, curve: str, title: str, *, evaluations: bool = True
) -> None:
    """Mean over seeds of each arm, and of a few arms the interval, over reward queries; UNet evaluations above."""
    colour_of = colours(results)
    for arm, content in results["arms"].items():
        runs = [seed["curves"][kind] for seed in content["seeds"].values()]
        length = min(len(run[curve]) for run in runs)
        x = runs[0]["reward_queries"][:length]
        points = [mean_over_seeds([run[curve][i] for run in runs]) for i in range(length)]
        style = {"linestyle": "--" if arm == results["baseline"] else "-"}
        style |= {"color": colour_of[arm], "linewidth": 1.4, "label": plain(f"{arm} ({len(runs)})")}
        axis.plot(x, [p.mean for p in points], **style)
        if len(runs) > 1 and has_bands(results):
            low, high = ([getattr(p, side) for p in points] for side in ("low", "high"))
            axis.fill_between(x, low, high, color=colour_of[arm], alpha=0.15, linewidth=0)
    axis.set(title=plain(title), xlabel="reward queries (images)")
    axis.grid(alpha=0.3)
    factor = unet_evaluations_per_query(results)
    if factor and evaluations:
        above = axis.secondary_xaxis("top", functions=(lambda x: x * factor, lambda x: x / factor))
        above.tick_params(labelsize=SMALL)
        above.set_xlabel("UNet evaluations", fontsize=SMALL)


def unet_evaluations_per_query(results: Mapping[str, Any]) -> float | None:
    """None where the arms differ in it, as where guidance is low for more steps of one."""
    curves = every_curve(results, "training")
    factors = {run["unet_evaluations"][-1] / run["reward_queries"][-1] for run in curves}
    return factors.pop() if len(factors) == 1 else None


def share_bars(results: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """{arm: bins of the training prompts}."""
    prompts, found = results["prompts"], gains_by_share(results)
    return {arm: sets[prompts]["bins"] for arm, sets in found.items() if prompts in sets}


def draw_bars(axis: Any, shares: Mapping[str, list[Mapping[str, Any]]], results: Mapping[str, Any]) -> None:
    """Each arm minus the baseline, by how often the base model succeeds; groups of prompts that no arm has are left
    out."""
    there = [i for i, _ in enumerate(next(iter(shares.values()))) if any(has_gain(bins[i]) for bins in shares.values())]
    shares = {arm: [bins[i] for i in there] for arm, bins in shares.items()}
    names, colour_of = [bin_name(one) for one in next(iter(shares.values()))], colours(results)
    for i, (arm, bins) in enumerate(shares.items()):
        x = np.arange(len(bins)) + (i - (len(shares) - 1) / 2) * 0.8 / len(shares)
        mean, low, high = (np.array([one["gain"][k] for one in bins], float) for k in range(3))
        spread = None if np.isnan(low).any() else 100 * np.maximum([mean - low, high - mean], 0.0)
        axis.bar(x, 100 * mean, 0.8 / len(shares), yerr=spread, capsize=2, color=colour_of[arm])
    counts = [one["prompts"] for one in next(iter(shares.values()))]
    labels = [f"{name}\n{n} prompts" for name, n in zip(names, counts, strict=True)]
    axis.set_xticks(range(len(names)), labels, fontsize=SMALL)
    axis.axhline(0, color="black", linewidth=0.8)
    title = plain(f"gain over the baseline, {results['prompts']}")
    axis.set(title=title, ylabel="percentage points", xlabel="base model succeeds in")
    axis.grid(alpha=0.3, axis="y")


def has_gain(one: Mapping[str, Any]) -> bool:
    """Whether a group of prompts has a mean to draw."""
    return one["gain"] is not None and one["gain"][0] is not None and math.isfinite(one["gain"][0])


# ---------------------------------------------------------------------------------------------------- several methods


class Panel(NamedTuple):
    """Of each method a row with a point for each side."""

    title: str
    found: Mapping[str, Sequence[float | None] | None]  # estimates by arm
    base: float | None = None  # what the model had before
    shares: bool = False


def save_methods(results: Mapping[str, Any], stem: Path) -> None:
    """Of each prompt set a panel; below, where training has them, what its groups and gradients were like."""
    what, panels = telling_reward(results), panels_of_methods(results)
    title = f"{plain(what)} of final models"
    title += ", and below what training learns from" * (len(panels) > len(paired.prompt_sets(results)))
    columns = len(paired.prompt_sets(results))
    rows = -(-len(panels) // columns)
    size = (WIDTH * 2, rows * (1.0 + ROW * len(paired.methods_of(results))) + 0.3)
    legend, most = f"{title}: means over seeds, 95 % intervals", len(MARKERS) + 1
    with saved(results["name"], stem, legend, rows, columns, most=most, figsize=size, sharey=True) as axes:
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for axis, panel in zip(axes.flat, panels, strict=False):
            draw_methods(axis, results, panel)


def panels_of_methods(results: Mapping[str, Any]) -> list[Panel]:
    """Success by prompt set; of pairs with and without DiffExp, rewards in a group and how far gradients agree."""
    what, arms = telling_reward(results), results["arms"]
    panels = []
    for prompts in paired.prompt_sets(results):
        found = {arm: paired.final(results, arm, prompts, what) for arm in arms}
        panels.append(Panel(plain(prompts), found, results["base"].get(prompts, {}).get(what), what in SHARES))
    training, pairs = results["training"], paired.variants_of(results) == ["diffexp"]
    for name, words in OF_TRAINING.items() if pairs else ():
        found = {arm: training.get(arm, {}).get(name) for arm in arms}
        if any(found[arm] and found.get(method) for arm, method in results["pairs"].items() if arm in arms):
            of_group = " of a prompt's rewards" if name in WITHIN_GROUPS else " in training"
            panels.append(Panel(plain(f"{words}{of_group}"), found))
    return panels


def draw_methods(axis: Any, results: Mapping[str, Any], panel: Panel) -> None:
    """A row for each method, the first on top."""
    methods, labels = paired.methods_of(results), paired.labels_of(results)
    for i, label in enumerate(labels):
        arms = [paired.sides_of(results, method)[i] for method in methods]
        found = {y: panel.found[arm] for y, arm in enumerate(arms) if panel.found.get(arm)}
        places = [y + 0.36 * (i / (len(labels) - 1) - 0.5) for y in found]
        spread = list(zip(*map(distances, found.values()), strict=True)) or None
        style = {"fmt": MARKERS[i % len(MARKERS)], "color": ("black", *SERIES)[i], "markersize": 4, "elinewidth": 1}
        axis.errorbar([estimate[0] for estimate in found.values()], places, xerr=spread, label=plain(label), **style)
    if panel.base is not None:
        axis.axvline(panel.base, color="gray", linestyle="--", linewidth=0.9, label="before")
    axis.set_yticks(range(len(methods)), [plain(method) for method in methods])
    axis.set_ylim(len(methods) - 0.5, -0.5)
    axis.set_title(panel.title, fontsize=9)
    axis.grid(alpha=0.3, axis="x")
    if panel.shares:
        axis.set_xlim(-0.03, 1.03)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def distances(estimate: Sequence[float | None]) -> tuple[float, float]:
    """From the mean down and up to the ends of its interval; a single seed has none."""
    mean, low, high = estimate
    return (0.0, 0.0) if low is None else (mean - low, high - mean)
