"""The report of a run, made of nothing but what is in its folder, whether it still runs or not."""

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from diffexp_jax.exploration import exploring_iterations
from diffexp_jax.formats.files import read_json
from diffexp_jax.formats.lora_names import UNET
from diffexp_jax.report.curves import curves_of_one, save_curves
from diffexp_jax.report.exploring import exploration_parts
from diffexp_jax.report.grids import save_grid
from diffexp_jax.report.page import Facts, Folded, Part, Row, Section, Table, html_of, save_page
from diffexp_jax.report.pictures import Column, Frames, Gallery, label_of, read_frames
from diffexp_jax.report.results import Result, as_text, before_and_after
from diffexp_jax.run import optional
from diffexp_jax.run.metrics import grid_path, read_metrics
from diffexp_jax.settings import Settings, flat, read_config

REPORT = "report.html"
ABOUT = "about.json"
_SECONDS = 10.0  # that a page is left as it is while a run continues


class RunFiles(NamedTuple):
    """What a run's folder says."""

    workdir: Path
    settings: dict[str, Any]  # {dotted key: value}
    rows: list[dict[str, Any]]  # of metrics.jsonl
    about: dict[str, Any]  # of about.json; {} where an older version wrote none
    frames: Frames


def read_run(workdir: Path) -> RunFiles:
    """Reads a run's folder.

    Raises:
      InputError: it has no config.json, or a file there is damaged.
    """
    settings, _ = read_config(workdir / "config.json")
    about = read_json(workdir / ABOUT) if (workdir / ABOUT).exists() else {}
    frames = read_frames(workdir / "images")
    return RunFiles(workdir, flat(settings), read_metrics(workdir), about, frames)


def lora_prefix(workdir: Path) -> str:
    """The prefix of a run's LoRA files, `Pipeline.lora_prefix`: a UNet's where an older version said nothing of it.

    Raises:
      InputError: its about.json is damaged.
    """
    return (read_json(workdir / ABOUT) if (workdir / ABOUT).exists() else {}).get("lora_prefix", UNET)


def save_images(workdir: Path, iteration: int, images: UInt8[np.ndarray, "N H W 3"], captions: Sequence[str]) -> None:
    """The grid of an iteration as the run goes, in WORKDIR/images. A failure is a warning."""
    optional.attempt("images", save_grid, grid_path(workdir, iteration), images, captions)


def refresh(workdir: Path, *, at_once: bool = False) -> None:
    """`save` as the run goes: not where the last page is only seconds old, so that it never takes much of the time.

    A failure is a warning.

    Args:
      at_once: also where it is: there will be no other time.
    """

    def save_if_old():
        page = workdir / REPORT
        if at_once or not page.exists() or not 0 <= time.time() - page.stat().st_mtime <= _SECONDS:
            save(workdir)

    optional.attempt(REPORT, save_if_old)


def save(workdir: Path, out: Path | None = None) -> None:
    """Writes curves.png, and the page: to `out`, by default the run's report.html.

    What cannot be drawn is left out, and said.

    Raises:
      InputError: see `read_run`.
      OSError: it cannot be written.
    """
    run = read_run(workdir)
    if out is None:
        optional.attempt("curves.png", save_curves, workdir)
    save_page(out or workdir / REPORT, title_of(run.settings), sections_of(run), lead=[facts_of(run)])


def finish(workdir: Path) -> str:
    """`save` at the end of a run, and what to say there: how its evaluations began and ended, and where to look.

    A failure is a warning.
    """
    optional.attempt(REPORT, save, workdir)
    results = optional.attempt("results", lambda: as_text(before_and_after(read_metrics(workdir)))) or ""
    return f"{results}look at {workdir / REPORT} and {workdir / 'images'}"


def title_of(settings: Mapping[str, Any]) -> str:
    return f"{settings['algorithm']} on {settings['reward']}"


def sections_of(run: RunFiles) -> list[Section]:
    """One whose parts cannot be made says why."""
    makes = {
        "Results": lambda: result_parts(before_and_after(run.rows)),
        "Pictures": lambda: picture_parts(run.frames),
        "Curves": lambda: curve_parts(run.rows),
        "Exploration": lambda: exploration_parts(run.settings, run.about),
        "Settings": lambda: setting_parts(run.settings),
        "Made with": lambda: machine_parts(run.about),
    }
    return [Section(title, _made(make)) for title, make in makes.items()]


class Made(NamedTuple):
    """A part that is html already."""

    content: str

    def html(self) -> str:
        return self.content


def _made(make: Callable[[], Sequence[str | Part]]) -> list[str | Part]:
    try:
        return [Made(html_of(part)) for part in make()]
    except Exception as error:  # of whatever a damaged folder holds
        return [f"Could not be made: {optional.reason_of(error)}."]


# ---------------------------------------------------------------------------------------------------------------- parts


def facts_of(run: RunFiles) -> Facts:
    """The run at a glance."""
    settings, last = run.settings, (run.rows or [{}])[-1]
    timed = [row for row in run.rows if {"time/sample", "time/train"} <= row.keys()]
    seconds = sorted(row["time/sample"] + row["time/train"] for row in timed)
    items = [
        ("Iterations", f"{last.get('iteration', 0):,} of {settings['iterations']:,}"),
        ("Reward queries", f"{last.get('reward_queries', 0):,}"),
        ("Network evaluations", f"{last.get('unet_evaluations', 0):,}"),
        ("Seconds an iteration", f"{seconds[len(seconds) // 2]:.2f} (median)" if seconds else "none yet"),
        ("Model", settings["model.path"]),
        ("Prompts", settings["prompts"]),
        ("Exploration", "on" if settings["exploration.enabled"] else "off"),
        ("Seed", str(settings["seed"])),
        ("Folder", run.workdir.name or str(run.workdir.absolute())),
        ("Written", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")),
    ]
    return Facts(items)


def result_parts(results: Sequence[Result]) -> list[str | Part]:
    """A table for each prompt set."""
    if not results:
        return ["Nothing to compare yet: that takes two evaluations (`eval.every`)."]
    sets = dict.fromkeys(result.prompts for result in results)
    tables = [
        Table(("", "before", "after"), [(r.what, r.before, r.after) for r in results if r.prompts == name], name)
        for name in sets
    ]
    return [
        f"Means over each prompt set, sampled without exploration; after: {results[0].iterations} iterations.",
        Row(tables),
    ]


def picture_parts(pictures: Frames) -> list[str | Part]:
    """Before, and after as many iterations as the slider says, of the same noise."""
    frames = pictures.frames
    if not frames:
        return ["No pictures yet (`log.images_every`).", *pictures.notes]
    first, captions = frames[0], frames[0].captions
    columns = [Column(label_of(first.iteration), [first])]
    if len(frames) > 1:
        columns.append(Column("fine-tuned", frames))
    shown = (
        "Left before fine-tuning, right after as many iterations as the slider says: the same prompts and noise, "
        "sampled without exploration."
    )
    notes = [shown if len(frames) > 1 else "Sampled without exploration.", *pictures.notes]
    return [" ".join(notes), Gallery(captions, columns)]


def curve_parts(rows: Sequence[dict[str, Any]]) -> list[str | Part]:
    legend, drawings = curves_of_one(rows)
    return [*([legend] if legend else []), Row(drawings)] if drawings else ["No curves yet."]


def setting_parts(settings: Mapping[str, Any]) -> list[str | Part]:
    """What differs from the defaults, and all, folded."""
    defaults = flat(Settings())
    planned = exploring_iterations(settings["iterations"], fraction=settings["exploration.fraction"])
    if settings["exploration.iterations"] == planned:  # written down as a run begins, see `workdir.plan`
        defaults["exploration.iterations"] = planned
    changed = [key for key in settings if written(settings[key]) != written(defaults.get(key))]
    rows = [(f"`{key}`", written(settings[key]), written(defaults.get(key))) for key in changed]
    every = [(f"`{key}`", written(value)) for key, value in settings.items()]
    return [
        "What differs from the defaults of `configs/base.py`, where each key is explained.",
        Table(("key", "here", "default"), rows, stacked=True),
        Folded(f"All {len(every)} settings", [Table(("key", "value"), every, stacked=True)]),
    ]


def machine_parts(about: Mapping[str, Any]) -> list[str | Part]:
    """Versions, and the devices of the last start."""
    if not about:
        return [f"Not known: the folder has no {ABOUT}, which this version writes when a run begins or resumes."]
    return [Facts([*about["devices"].items(), *about["versions"].items()])]


def written(value: Any) -> str:
    """A setting as a config file has it."""
    return repr(tuple(value) if isinstance(value, list) else value)
