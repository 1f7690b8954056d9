"""What ends a program with one clear line, and its exit code; and what an error says, in part of a line."""

import difflib
import textwrap
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from the user: one clear line, exit code 2."""


class HostError(RuntimeError):
    """Another host of the run failed, or has gone: one clear line, exit code 1."""


class RewardError(RuntimeError):
    """A reward of the user's failed: one clear line, exit code 1, and what was trained is saved."""


class BadRewardError(RewardError, InputError):
    """A function that cannot be a reward, as it is called first: one clear line, exit code 2, and the same is saved."""


class Stopped(Exception):
    """A run that was asked to stop has saved its state and left.

    The exit code is 128 + the signal's number, as shells and schedulers have it: 143 after SIGTERM, 130 after Ctrl-C,
    129 after SIGHUP. It is not 0, which would say that the run is complete: `train && evaluate` must not go on with
    half of one.
    """

    def __init__(self, iteration: int, number: int):
        super().__init__(f"stopped after iteration {iteration}, which is saved; the same command continues")
        self.exit_code = 128 + number


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """The end of an error about a word that is none of the known ones: the nearest two; "" where none are, or all."""
    names = [str(name) for name in known]
    near = difflib.get_close_matches(str(word), names, 2)
    return f"; did you mean {' or '.join(map(repr, near))}?" if 0 < len(near) < len(names) else ""


def first_line(error: BaseException, most: int = 200) -> str:
    """What another library's error says, for part of a line: its first one, made printable, of at most so many
    characters and not cut within a word; its type's name where it says nothing."""
    said = error.args[0] if isinstance(error, KeyError) and error.args else error  # str() of a KeyError is quoted
    line = str(said).strip().partition("\n")[0]
    if len(line) > most:
        line = textwrap.shorten(line, most, placeholder="...") if " " in line[:most] else line[:most]
    return printable(line) or type(error).__name__


def printable(text: str) -> str:
    """The text with what cannot be printed, a line's end for one, as Python escapes it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
