"""What people look at: image grids, curves, and an HTML page of both."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from diffexp_jax.metrics import read_metrics

_CELL = 128  # pixels: smaller pictures are enlarged by a whole factor
_TEXT = 44  # pixels of the caption strip: three lines
GRID = "grid.png"  # the name of a folder's grid
COMPARISONS = ("base", "schedule", "weights", "both")  # pictures that are there to compare: NNNN-base.png, ...


class Result(NamedTuple):
    """A line of a run's results, in words."""

    prompts: str
    what: str
    before: str
    after: str
    iterations: str


def save_grid(
    path: Path, images: UInt8[np.ndarray, "N H W 3"], captions: Sequence[str], *, columns: int | None = None
) -> None:
    """Writes images as a captioned PNG grid, row by row."""
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    scale = max(1, -(-_CELL // images.shape[1]))
    height, width = images.shape[1] * scale, images.shape[2] * scale
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 4) + 4, rows * (height + _TEXT) + 4), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for n, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = 4 + n % columns * (width + 4), 4 + n // columns * (height + _TEXT)
        pixels = Image.fromarray(np.asarray(image)).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(pixels, (x, y))
        text = _wrapped(draw, caption, font, width)
        draw.multiline_text((x, y + height + 1), text, fill="black", font=font, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    """At most three lines that fit, the last cut with an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines if len(lines) <= 3 else [*lines[:2], lines[2] + " ..."])


def save_curves(workdir: Path) -> None:
    """Draws curves.png from metrics.jsonl: the reward, the evaluations, and signs of healthy training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(workdir)
    names = sorted({name for row in rows for name in row})
    evaluated = dict.fromkeys(name.split("/", 2)[2] for name in names if name.startswith("eval/"))
    panels = {"reward/mean of the training samples": {"reward/mean": "reward/mean"}}
    for what in evaluated:
        sets = [name for name in names if name.startswith("eval/") and name.split("/", 2)[2] == what]
        panels[f"evaluation: {what}"] = {name: name.split("/")[1] for name in sets}
    panels |= {name: {name: name} for name in ("grad_norm", "ratio/clip_fraction", "approx_kl")}
    panels = {title: lines for title, lines in panels.items() if lines.keys() <= set(names) and _moves(rows, lines)}
    if not panels:
        return
    columns = min(3, len(panels))
    shape = -(-len(panels) // columns), columns
    figure, axes = plt.subplots(*shape, figsize=(5.2 * shape[1], 3.6 * shape[0]), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, label in lines.items():
            points = [(row["iteration"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else None, label=label, linewidth=1.2)
        axis.set(title=title, xlabel="iteration")
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(workdir / "curves.png", dpi=110)
    plt.close(figure)


def _moves(rows: Sequence[dict[str, Any]], names: Iterable[str]) -> bool:
    """Whether one of the metrics has more than one value, or no more than one row yet."""
    values = [[row[name] for row in rows if name in row] for name in names]
    return any(len(set(x)) > 1 for x in values) or all(len(x) == 1 for x in values)


def save_html(workdir: Path, title: str, results: Sequence[Result]) -> None:
    """Writes report.html: the results as a table, the curves, and the image grids from first to last."""
    grids = sorted((workdir / "images").glob("*.png"))
    parts = [f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title>"]
    parts.append("<style>body{font:15px sans-serif;margin:2em;max-width:1100px}img{max-width:100%}")
    parts.append("td,th{padding:.2em 1em .2em 0;text-align:left;border-bottom:1px solid #ddd}</style>")
    parts.append(f"<h1>{html.escape(title)}</h1>")
    if results:
        parts.append("<table><tr>" + "".join(f"<th>{name}" for name in _HEADER) + "</tr>")
        parts += ["<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in result) + "</tr>" for result in results]
        parts.append("</table>")
    parts.append("<img src='curves.png' alt='curves'>")
    for grid in grids:
        parts.append(f"<h2>iteration {int(grid.stem)}</h2><img src='images/{grid.name}' alt='samples'>")
    (workdir / "report.html").write_text("\n".join(parts) + "\n", encoding="utf-8")


def before_and_after(rows: Sequence[dict[str, Any]]) -> list[Result]:
    """The first and the last evaluation of a run, a result for each prompt set and reward."""
    evaluated = [row for row in rows if any(name.startswith("eval/") for name in row)]
    if len(evaluated) < 2:
        return []
    first, last = evaluated[0], evaluated[-1]
    results = []
    for name in sorted(first.keys() & last.keys()):
        if name.startswith("eval/"):
            _, prompts, what = name.split("/", 2)
            words = _WORDS.get(what)
            before, after = (f"{100 * row[name]:.0f} %" if words else f"{row[name]:.3f}" for row in (first, last))
            results.append(Result(prompts, words or what, before, after, str(last["iteration"])))
    return results


def as_text(results: Sequence[Result]) -> str:
    """The results as a table of plain text."""
    if not results:
        return ""
    table = [_HEADER, *results]
    widths = [max(len(row[i]) for row in table) for i in range(len(_HEADER))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
    return "".join(f"{line.rstrip()}\n" for line in lines)


_HEADER = ("prompts", "what", "before", "after", "iterations")
_WORDS = {  # of shares of the images
    "emoji_judge": "all there that the prompt names",
    "emoji_judge/animal": "the right animal there",
    "emoji_judge/object": "the right object there (or none, as asked)",
}
