"""The page of an experiment over seeds: one HTML file with its tables, curves, pictures and settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from diffexp_jax.report import Row, Section, drawing, pictures_of_two, save_page
from diffexp_jax.sweeps import document, paired, runs
from diffexp_jax.sweeps import figure as results_figure
from diffexp_jax.sweeps.cells import telling_reward
from diffexp_jax.sweeps.tables import all_tables

SIZE = (4.6, 3.4)  # inches of a panel


def save(results: Mapping[str, Any], experiment: runs.Experiment, out: Path) -> None:
    """Writes the page.

    Raises:
      OSError: it cannot be written.
    """
    lead = [f"{results['shows'][:1].upper()}{results['shows'][1:]}. {document.compared_line(results)}"]
    if results["unfinished"]:
        lead.append(document.unfinished_line(results))
    sections = [
        Section("Results", [table._replace(caption=caption) for caption, table in all_tables(results).items()]),
        Section("Curves", [Row(panels(results))]),
        Section("Pictures", pictures(results, experiment)),
        Section("Settings", [*document.settings_lines(results), document.machine_line(results)]),
    ]
    save_page(out, f"{results['name']} over seeds", sections, lead=lead)


def panels(results: Mapping[str, Any]) -> list:
    """The panels of `results_figure`, a drawing each."""
    if results.get("pairs"):
        return [paired_panel(results, panel) for panel in results_figure.panels_of_methods(results)]
    found = []
    for kind, curve, title in results_figure.panels_of(results):
        figure = Figure(SIZE)
        axis = figure.subplots()
        results_figure.draw_curves(axis, results, kind, curve, title)
        axis.legend(fontsize=8)
        figure.tight_layout()
        found.append(drawing(figure, f"{title} of all arms over reward queries"))
    if shares := results_figure.share_bars(results):
        figure = Figure(SIZE)
        results_figure.draw_bars(figure.subplots(), shares, results)
        figure.tight_layout()
        found.append(drawing(figure, "gain over the baseline by how often the base model succeeds"))
    return found


def paired_panel(results: Mapping[str, Any], panel: results_figure.Panel) -> Any:
    """One of `results_figure.panels_of_methods`, drawn."""
    figure = Figure((SIZE[0], 1.0 + results_figure.ROW * len(paired.methods_of(results))))
    axis = figure.subplots()
    results_figure.draw_methods(axis, results, panel)
    axis.legend(fontsize=8)
    figure.tight_layout()
    what = f"{telling_reward(results)} of {panel.title}" if panel.shares else panel.title
    return drawing(figure, f"{what}: each method {' and '.join(paired.labels_of(results))}")


def pictures(results: Mapping[str, Any], experiment: runs.Experiment) -> list:
    """Pictures of each arm beside those of the arm that it is compared with, of the first seed that both have."""
    parts = []
    for arm, content in results["arms"].items():
        other = results.get("pairs", {}).get(arm, results["baseline"])
        theirs = results["arms"].get(other, {"seeds": ()})["seeds"]
        seed = next((seed for seed in content["seeds"] if seed in theirs), None)
        if arm != other and seed is not None:
            folders = [run_folder(experiment.arms[name], seed) for name in (other, arm)]
            parts += [f"Seed {seed}:", *pictures_of_two(folders, [other, arm])]
    return parts or ["No seed of two arms to put side by side."]


def run_folder(arm: Path, seed: str) -> Path:
    """An arm is a folder of seeds, or a single run's."""
    return folder if (folder := arm / f"seed{seed}").is_dir() else arm
