"""Exploration as a run's settings have it: the guidance over the timesteps (Eq. 7), the prompt weights (Eq. 8)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffexp_jax.exploration import exploring_iterations
from diffexp_jax.report.page import Drawing, Legend, Part, Row, Stack, drawing, escaped

_EXPLORED, _PLAIN = "#1f77b4", "#b0b0b0"


class Prompt(NamedTuple):
    """A prompt cut into its units, and what was drawn for it."""

    pieces: Sequence[tuple[str, int]]  # (text, number of its unit, 0 for none)
    drawn: int = 0  # the number of the unit that is weighted; 0: all are shown
    weight: float = 1.0

    def html(self) -> str:
        return f'<p class="prompt">{self.words()}</p>'

    def words(self) -> str:
        """A mark for each unit, or for the one that is weighted."""
        words = []
        for text, unit in self.pieces:
            if unit and unit == self.drawn:
                words.append(f'<mark class="drawn">{escaped(text)} × {self.weight:.2f}</mark>')
            elif unit and not self.drawn:
                words.append(f"<mark>{escaped(text)}</mark>")
            else:
                words.append(escaped(text))
        return "".join(words)


class Prompts(NamedTuple):
    """Several, each on a line."""

    prompts: Sequence[Prompt]

    def html(self) -> str:
        items = "".join(f'<li class="prompt">{prompt.words()}</li>' for prompt in self.prompts)
        return f'<ul class="prompts">{items}</ul>'


def exploration_parts(settings: Mapping[str, Any], about: Mapping[str, Any]) -> list[str | Part]:
    """What a page says of a run's exploration.

    Args:
      settings: {dotted key: value} of the run.
      about: what `about.json` holds, {} where there is none.
    """
    guidance = settings["sampling.guidance"]
    if not settings["exploration.enabled"]:
        return [f"Exploration is off: guidance is {guidance:g} at every step, and every word has weight 1."]
    total, first = settings["iterations"], settings["exploration.iterations"]
    if first is None:
        first = exploring_iterations(total, fraction=settings["exploration.fraction"])
    when = f"The first {first} of {total} iterations explore" if first < total else f"All {total} iterations explore"
    return [
        f"{when}. Evaluations and the pictures above do without.",
        Row(
            [
                Stack(_schedule_parts(settings, about.get("schedule"))),
                Stack(_weight_parts(settings, about.get("prompt"))),
            ]
        ),
    ]


def _schedule_parts(settings: Mapping[str, Any], schedule: Mapping[str, Any] | None) -> list[str | Part]:
    low, high, threshold = (settings[key] for key in ("exploration.w_low", "sampling.guidance", "exploration.t_thresh"))
    if threshold >= 1000:
        return [
            f"**Guidance schedule (Eq. 7).** None: no timestep is above {threshold}, guidance is {high:g} throughout."
        ]
    t = _MEASURES[settings.get("exploration.threshold_of", "timestep")]
    text = f"**Guidance schedule (Eq. 7).** While the {t} is above {threshold} guidance is {low:g}, then {high:g}."
    if schedule:
        steps = schedule["t"]
        text += f" {sum(t > threshold for t in steps)} of the {len(steps)} steps are above the threshold."
    legend = [("with exploration", _EXPLORED, "-"), ("without", _PLAIN, "--")]
    return [text, Legend(legend), schedule_drawing(low, high, threshold, schedule, t)]


_MEASURES = {
    "timestep": "timestep t",
    "noise_level": "noise level, of 1000,",
    "steps": "share of steps to come, of 1000,",
}


def schedule_drawing(
    low: float, high: float, threshold: int, schedule: Mapping[str, Any] | None, t: str = _MEASURES["timestep"]
) -> Drawing:
    """Guidance over t from noise (1000, left) to picture (0, right), a dot for each step that is known."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.5), layout="constrained")
    axis = figure.subplots()
    axis.plot([1000, 0], [high, high], color=_PLAIN, linestyle="--", linewidth=1.5)
    axis.plot([1000, threshold, threshold, 0], [low, low, high, high], color=_EXPLORED, linewidth=1.8)
    if schedule:
        axis.plot(schedule["t"], schedule["w_t"], ".", color=_EXPLORED, markersize=7)
    axis.set(xlim=(1020, -20), xlabel=f"{t.removesuffix(',')}, from noise to picture", ylabel="guidance w")
    axis.set_ylim(min(0.0, low, high) - 0.05 * max(low, high, 1.0), 1.12 * max(low, high, 1.0))
    axis.set_xticks(sorted({threshold} | {t for t in (0, 250, 500, 750, 1000) if abs(t - threshold) >= 100}))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.35)
    alt = f"Guidance over the {t.removesuffix(',')}: {low:g} from 1000 down to {threshold}, {high:g} from there to 0."
    return drawing(figure, alt)


def _weight_parts(settings: Mapping[str, Any], prompt: Mapping[str, Any] | None) -> list[str | Part]:
    low, high = settings["exploration.weight_range"]
    unit, share = settings["exploration.unit"], settings["exploration.share"]
    if low == high == 1:
        return ["**Prompt weights (Eq. 8).** None: the range of the weights is 1 to 1."]
    parts: list[str | Part] = [
        f"**Prompt weights (Eq. 8).** One {unit} of a prompt, drawn at random, gets a weight that is uniform between "
        f"{low:g} and {high:g}; everything else has weight 1."
        + (f" That is so in {share:.0%} of the images; the others have their prompt as it is." if share < 1 else "")
    ]
    if prompt is None:
        return parts
    pieces = [(text, unit) for text, unit in prompt["pieces"]]
    count = max((number for _, number in pieces), default=0)
    parts += [f"A prompt of the training set, and its {count} {_plural(unit, count)}:", Prompt(pieces)]
    if prompt["draws"]:
        drawn = [Prompt(pieces, number, weight) for number, weight in prompt["draws"]]
        parts += ["Such draws for it look like this:", Prompts(drawn)]
    return parts


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
