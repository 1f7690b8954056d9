"""A run's results in words: its first evaluation beside its last."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Result(NamedTuple):
    """A line of a run's results, in words."""

    prompts: str
    what: str
    before: str
    after: str
    iterations: str


def evaluation_of(name: str) -> tuple[str, str] | None:
    """(prompt set, what) of a metric's name eval/SET/WHAT; None of any other's."""
    kind, *rest = name.split("/", 2)
    return (rest[0], rest[1]) if kind == "eval" and len(rest) == 2 else None


def before_and_after(rows: Sequence[dict[str, Any]]) -> list[Result]:
    """The first and the last evaluation of a run, a result for each prompt set and reward."""
    evaluated = [row for row in rows if any(map(evaluation_of, row))]
    if len(evaluated) < 2:
        return []
    first, last = evaluated[0], evaluated[-1]
    results = []
    for name in sorted(first.keys() & last.keys()):
        if evaluated := evaluation_of(name):
            prompts, what = evaluated
            before, after = (
                f"{100 * row[name]:.0f} %" if what in _WORDS else f"{row[name]:.3f}" for row in (first, last)
            )
            results.append(Result(prompts, in_words(what), before, after, str(last["iteration"])))
    return results


def in_words(reward: str) -> str:
    """What a reward says, where its name does not."""
    return _WORDS.get(reward, reward)


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
