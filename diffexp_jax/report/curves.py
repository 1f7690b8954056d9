"""The curves of metrics.jsonl: the reward, the evaluations, and signs of healthy training."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffexp_jax.formats.files import replaced
from diffexp_jax.report.page import SERIES, Drawing, Legend, drawing, plain
from diffexp_jax.report.results import evaluation_of, in_words
from diffexp_jax.run.metrics import read_metrics

_TRAINING = ("grad_norm", "ratio/clip_fraction", "approx_kl")
_DASHES = ("-", "--", ":", "-.")


class Line(NamedTuple):
    """A curve of a panel."""

    label: str  # the prompt set; "" for what is of the training samples
    points: list[tuple[int, float]]  # (iteration, value)


class Panel(NamedTuple):
    """The curves of one quantity."""

    title: str
    lines: list[Line]


def panels(rows: Sequence[dict[str, Any]]) -> list[Panel]:
    """What is drawn of a run's metrics: nothing that is missing, or that never moves."""
    return [panel for panel in all_panels(rows) if _moves(panel)]


def all_panels(rows: Sequence[dict[str, Any]]) -> list[Panel]:
    """What a run's metrics may be drawn as, also where a curve never moves."""
    names = sorted({name for row in rows for name in row})
    evaluated = {name: found for name in names if (found := evaluation_of(name))}
    chosen = {"reward/mean of the training samples": {"reward/mean": ""}}
    for what in dict.fromkeys(what for _, what in evaluated.values()):
        sets = {name: prompts for name, (prompts, its) in evaluated.items() if its == what}
        chosen[f"evaluation: {in_words(what)}"] = sets
    chosen |= {name: {name: ""} for name in _TRAINING}
    return [
        Panel(title, [Line(label, _points(rows, name)) for name, label in lines.items()])
        for title, lines in chosen.items()
        if lines.keys() <= set(names)
    ]


def _points(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["iteration"], row[name]) for row in rows if name in row]


def _moves(panel: Panel) -> bool:
    """Whether one of the curves has more than one value, or all have no more than one point yet."""
    values = [[value for _, value in line.points] for line in panel.lines]
    return any(len(set(x)) > 1 for x in values) or all(len(x) == 1 for x in values)


# ----------------------------------------------------------------------------------------------------------- curves.png


def save_curves(workdir: Path) -> None:
    """Draws curves.png from metrics.jsonl, a panel for each quantity."""
    from matplotlib.figure import Figure  # a third of a second to import

    drawn = panels(read_metrics(workdir))
    if not drawn:
        return
    columns = min(3, len(drawn))
    shape = -(-len(drawn) // columns), columns
    figure = Figure(figsize=(5.2 * shape[1], 3.6 * shape[0]))
    axes = figure.subplots(*shape, squeeze=False)
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, drawn, strict=False):
        for line in panel.lines:
            axis.plot(
                *zip(*line.points, strict=True), label=plain(line.label), linewidth=1.2, marker=_marker(line.points)
            )
        axis.set(title=plain(panel.title), xlabel="iteration")
        axis.locator_params(axis="x", integer=True)
        axis.grid(alpha=0.3)
        _not_too_near(axis)
        if len(panel.lines) > 1:
            axis.legend(fontsize=7)
    with warnings.catch_warnings(), replaced(workdir / "curves.png") as partial:
        warnings.filterwarnings("ignore", "Glyph")  # of a script that the font has not: drawn as boxes
        figure.tight_layout()
        figure.savefig(partial, format="png", dpi=110)


def _marker(points: Sequence[Any]) -> str | None:
    return "." if len(points) < 40 else None


def _not_too_near(axis: Any) -> None:
    """Shows at least 5 % of the largest value, so that a share that goes from 0.99 to 1 does not look like a rise."""
    low, high = axis.get_ylim()
    missing = 0.05 * max(abs(low), abs(high)) - (high - low)
    if missing > 0:
        axis.set_ylim(low - missing / 2, high + missing / 2)


# ----------------------------------------------------------------------------------------------------------- on a page


class Styled(NamedTuple):
    """A line with its looks: a colour and a dash pattern of matplotlib."""

    name: str  # for those who cannot see it
    points: list[tuple[int, float]]
    colour: str
    dash: str


def curves_of_one(rows: Sequence[dict[str, Any]]) -> tuple[Legend | None, list[Drawing]]:
    """A drawing for each panel of a run, and the legend of all: a colour for each prompt set."""
    drawn = panels(rows)
    labels = list(dict.fromkeys(line.label for panel in drawn for line in panel.lines if line.label))
    colours = {"": "black"} | {label: SERIES[n % len(SERIES)] for n, label in enumerate(labels)}
    drawings = [
        _draw(panel.title, [Styled(line.label, line.points, colours[line.label], "-") for line in panel.lines])
        for panel in drawn
    ]
    return Legend([(label, colours[label], "-") for label in labels]) if labels else None, drawings


def curves_of_two(runs: Sequence[Sequence[dict[str, Any]]], names: Sequence[str]) -> tuple[list[Legend], list[Drawing]]:
    """A drawing for each panel of several runs: a colour for each run, a dash pattern for each prompt set."""
    drawn = [{panel.title: panel.lines for panel in all_panels(rows)} for rows in runs]
    moving = {panel.title for rows in runs for panel in panels(rows)}
    titles = [title for title in dict.fromkeys(title for of_run in drawn for title in of_run) if title in moving]
    lines = [line for of_run in drawn for lines in of_run.values() for line in lines]
    labels = list(dict.fromkeys(line.label for line in lines if line.label))
    dashes = {"": "-"} | {label: _DASHES[n % len(_DASHES)] for n, label in enumerate(labels)}
    drawings = []
    for title in titles:
        styled = [
            Styled(f"{name} {line.label}".strip(), line.points, SERIES[n], dashes[line.label])
            for n, (name, of_run) in enumerate(zip(names, drawn, strict=True))
            for line in of_run.get(title, [])
        ]
        drawings.append(_draw(title, styled))
    legends = [Legend([(name, SERIES[n], "-") for n, name in enumerate(names)])]
    if len(labels) > 1:
        legends.append(Legend([(label, "black", dashes[label]) for label in labels]))
    return legends, drawings


def _draw(title: str, lines: Sequence[Styled]) -> Drawing:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    axis = figure.subplots()
    for line in lines:
        x, y = zip(*line.points, strict=True)
        axis.plot(x, y, color=line.colour, linestyle=line.dash, linewidth=1.5, marker=_marker(line.points))
    axis.set_xlabel("iteration")
    axis.locator_params(axis="x", integer=True, nbins=6)
    axis.grid(alpha=0.35)
    _not_too_near(axis)
    axis.spines[["top", "right"]].set_visible(False)
    ends = (
        f"{line.name + ': ' if line.name else ''}{line.points[0][1]:.4g} at iteration {line.points[0][0]}, "
        f"{line.points[-1][1]:.4g} at iteration {line.points[-1][0]}"
        for line in lines
    )
    return drawing(figure, f"{title}. {'; '.join(ends)}", caption=title)
