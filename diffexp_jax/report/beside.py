"""Two runs on a page, side by side: the same prompts and noise before, after the one, and after the other."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from diffexp_jax.errors import InputError
from diffexp_jax.report.curves import curves_of_two
from diffexp_jax.report.page import Part, Row, Section, Table, save_page
from diffexp_jax.report.pictures import Column, Frame, Gallery
from diffexp_jax.report.results import before_and_after
from diffexp_jax.report.run import RunFiles, read_run, title_of, written

_SAME = 8.0  # mean difference of pixels, of 255, up to which pictures are of the same noise: devices round otherwise


def save_beside(workdirs: Sequence[Path], out: Path) -> None:
    """Writes a page of two runs.

    Raises:
      InputError: one is no run, or both are the same.
      OSError: it cannot be written.
    """
    if workdirs[0].resolve() == workdirs[1].resolve():
        raise InputError(f"{workdirs[1]}: wants another run than {workdirs[0]}")
    runs, names = [read_run(path) for path in workdirs], names_of(workdirs)
    legends, drawings = curves_of_two([run.rows for run in runs], names)
    sections = [
        Section("Results", _result_parts(runs, names)),
        Section("Pictures", _picture_parts(runs, names)),
        Section("Curves", [*legends, Row(drawings)] if drawings else ["No curves yet."]),
        Section("Settings that differ", _setting_parts(runs, names)),
    ]
    save_page(out, f"{names[0]} beside {names[1]}", sections, lead=[_facts(runs, names)])


def pictures_of_two(workdirs: Sequence[Path], names: Sequence[str]) -> list[str | Part]:
    """The pictures of two runs side by side, as parts of a page; a run without any is said to have none.

    Raises:
      InputError: one is no run.
    """
    return _picture_parts([read_run(path) for path in workdirs], names)


def names_of(workdirs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in workdirs]
    n = next(n for n in range(1, 1 + max(map(len, parts))) if parts[0][-n:] != parts[1][-n:])
    return ["/".join(part[-n:]) for part in parts]


def _facts(runs: Sequence[RunFiles], names: Sequence[str]) -> Table:
    """The runs at a glance."""
    last = [(run.rows or [{}])[-1] for run in runs]
    rows = [
        ("Run", *(title_of(run.settings) for run in runs)),
        (
            "Iterations",
            *(
                f"{x.get('iteration', 0):,} of {run.settings['iterations']:,}"
                for x, run in zip(last, runs, strict=True)
            ),
        ),
        ("Reward queries", *(f"{x.get('reward_queries', 0):,}" for x in last)),
        ("Exploration", *("on" if run.settings["exploration.enabled"] else "off" for run in runs)),
        ("Seed", *(str(run.settings["seed"]) for run in runs)),
    ]
    return Table(("", *names), rows)


def _result_parts(runs: Sequence[RunFiles], names: Sequence[str]) -> list[str | Part]:
    """A table for each prompt set, a column for each run."""
    found = [{(r.prompts, r.what): r for r in before_and_after(run.rows)} for run in runs]
    both = list(dict.fromkeys(key for results in found for key in results))
    if not both:
        return ["Nothing to compare yet: that takes two evaluations of a run (`eval.every`)."]
    tables = []
    for prompts in dict.fromkeys(prompts for prompts, _ in both):
        rows = []
        for what in (what for name, what in both if name == prompts):
            results = [results.get((prompts, what)) for results in found]
            before = " / ".join(dict.fromkeys(r.before for r in results if r))
            rows.append((what, before, *(r.after if r else "-" for r in results)))
        tables.append(Table(("", "before", *names), rows, prompts))
    return [
        "Means over each prompt set, sampled without exploration: at the first evaluation, and at each run's last.",
        Row(tables),
    ]


def _picture_parts(runs: Sequence[RunFiles], names: Sequence[str]) -> list[str | Part]:
    frames = [run.frames.frames for run in runs]
    if not all(frames):
        return [
            f"{', '.join(n for n, f in zip(names, frames, strict=True) if not f)}: no pictures (`log.images_every`)."
        ]
    last = [of_run[-1].captions for of_run in frames]
    places = [n for n, (one, other) in enumerate(zip(*last, strict=False)) if one == other]
    if not places:
        return ["The runs' pictures are of different prompts."]
    captions = [last[0][n] for n in places]
    first, second = ([_only(frame, places) for frame in of_run] for of_run in frames)
    notes = [note for run in runs for note in run.frames.notes]
    if all(frame.iteration == 0 for frame in (first[0], second[0])) and _alike(first[0], second[0]):
        columns = [Column("before", first[:1]), Column(names[0], first), Column(names[1], second)]
        shown = "The same prompts and noise before fine-tuning and after each run; the slider moves both runs."
    else:
        columns = [
            Column(f"{name}, {end}", part)
            for name, of_run in zip(names, (first, second), strict=True)
            for end, part in (("first", of_run[:1]), ("fine-tuned", of_run))
        ]
        shown = (
            "**Not the same noise, or not the same model:** the first pictures of the runs differ, so each is shown "
            "beside its own. The slider moves both runs."
        )
    return [" ".join([shown, *notes]), Gallery(captions, columns)]


def _only(frame: Frame, places: Sequence[int]) -> Frame:
    return Frame(frame.iteration, tuple(frame.captions[i] for i in places), tuple(frame.images[i] for i in places))


def _alike(first: Frame, second: Frame) -> bool:
    """Whether two frames show the same pictures, up to rounding."""
    for one, other in zip(first.images, second.images, strict=True):
        a, b = (np.asarray(Image.open(io.BytesIO(content)), np.float32) for content in (one, other))
        if a.shape != b.shape or np.abs(a - b).mean() > _SAME:
            return False
    return True


def _setting_parts(runs: Sequence[RunFiles], names: Sequence[str]) -> list[str | Part]:
    first, second = (run.settings for run in runs)
    keys = [key for key in first if written(first[key]) != written(second[key])]
    if not keys:
        return ["None: both runs have the same settings."]
    rows = [(f"`{key}`", written(first[key]), written(second[key])) for key in keys]
    return [Table(("key", *names), rows, stacked=True)]
