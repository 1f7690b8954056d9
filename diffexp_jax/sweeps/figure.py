"""The figure of an experiment: curves of all arms with their intervals over seeds, and the gain by base share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from diffexp_jax.sweeps.tables import bin_name, gains_by_share, measured

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from diffexp_jax.report import plain  # noqa: E402
from diffexp_jax.sweeps.comparison import mean_over_seeds  # noqa: E402

WIDTH, HEIGHT = 5.2, 3.8  # inches of a panel
COLUMNS = 3


def save(results: Mapping[str, Any], stem: Path) -> None:
    """Writes STEM.png and STEM.svg; nothing is smoothed, in no arm."""
    panels = panels_of(results)
    shares = share_bars(results)
    n = len(panels) + bool(shares)
    columns = min(COLUMNS, n)
    rows = -(-n // columns)
    with plt.rc_context({"svg.hashsalt": results["name"], "font.size": 9}):
        figure, axes = plt.subplots(rows, columns, figsize=(WIDTH * columns, HEIGHT * rows), squeeze=False)
        for axis in axes.flat[n:]:
            axis.set_axis_off()
        for axis, (kind, curve, title) in zip(axes.flat, panels, strict=False):
            draw_curves(axis, results, kind, curve, title)
        if shares:
            draw_bars(axes.flat[len(panels)], shares, results["prompts"])
        axes.flat[0].legend(fontsize=8)
        figure.tight_layout()
        stem.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(f"{stem}.png", dpi=110, metadata={"Software": None})
        figure.savefig(f"{stem}.svg", metadata={"Date": None})  # the same file each time
        plt.close(figure)


def panels_of(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(kind of curves, which one, title) of every panel with curves."""
    panels = [("evaluation", f"eval/{prompts}/{what}", f"{what}, {prompts}") for prompts, what in measured(results)]
    panels = [panel for panel in panels if all(panel[1] in curves for curves in every_curve(results, "evaluation"))]
    return [*panels, ("training", "reward/mean", "reward/mean of the training samples")]


def every_curve(results: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    return [seed["curves"][kind] for arm in results["arms"].values() for seed in arm["seeds"].values()]


def draw_curves(axis: Any, results: Mapping[str, Any], kind: str, curve: str, title: str) -> None:
    """Mean and interval over seeds of each arm, over reward queries; UNet evaluations above."""
    for arm, content in results["arms"].items():
        runs = [seed["curves"][kind] for seed in content["seeds"].values()]
        length = min(len(run[curve]) for run in runs)
        x = runs[0]["reward_queries"][:length]
        points = [mean_over_seeds([run[curve][i] for run in runs]) for i in range(length)]
        style = {"linestyle": "--", "color": "black"} if arm == results["baseline"] else {}
        (line,) = axis.plot(x, [p.mean for p in points], label=plain(f"{arm} ({len(runs)})"), linewidth=1.3, **style)
        if len(runs) > 1:
            low, high = ([getattr(p, side) for p in points] for side in ("low", "high"))
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set(title=plain(title), xlabel="reward queries (images)")
    axis.grid(alpha=0.3)
    factor = unet_evaluations_per_query(results)
    if factor:
        above = axis.secondary_xaxis("top", functions=(lambda x: x * factor, lambda x: x / factor))
        above.tick_params(labelsize=7)
        above.set_xlabel("UNet evaluations", fontsize=7)


def unet_evaluations_per_query(results: Mapping[str, Any]) -> float | None:
    """None where the arms differ in it."""
    curves = every_curve(results, "training")
    factors = {run["unet_evaluations"][-1] / run["reward_queries"][-1] for run in curves}
    return factors.pop() if len(factors) == 1 else None


def share_bars(results: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """{arm: bins of the training prompts}."""
    prompts, found = results["prompts"], gains_by_share(results)
    return {arm: sets[prompts]["bins"] for arm, sets in found.items() if prompts in sets}


def draw_bars(axis: Any, shares: Mapping[str, list[Mapping[str, Any]]], prompts: str) -> None:
    """Each arm minus the baseline, by how often the base model succeeds."""
    names = [bin_name(one) for one in next(iter(shares.values()))]
    for i, (arm, bins) in enumerate(shares.items()):
        x = np.arange(len(bins)) + (i - (len(shares) - 1) / 2) * 0.8 / len(shares)
        mean, low, high = (np.array([one["gain"][k] for one in bins], float) for k in range(3))
        spread = None if np.isnan(low).any() else 100 * np.maximum([mean - low, high - mean], 0.0)
        axis.bar(x, 100 * mean, 0.8 / len(shares), yerr=spread, capsize=2, label=plain(arm))
    counts = [one["prompts"] for one in next(iter(shares.values()))]
    axis.set_xticks(range(len(names)), [f"{name}\n{n} prompts" for name, n in zip(names, counts, strict=True)])
    axis.axhline(0, color="black", linewidth=0.8)
    title = plain(f"gain over the baseline, {prompts}")
    axis.set(title=title, ylabel="percentage points", xlabel="base model succeeds in")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=8)
