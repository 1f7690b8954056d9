"""The user's own code: found by MODULE:FUNCTION, and named in one line where it fails, with its file and line."""

import functools
import importlib
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffexp_jax.errors import InputError
from diffexp_jax.rewards.reward import Reward

_PACKAGE = str(Path(__file__).parents[1])
# Whose code is no user's: installed packages, Python itself, and this package
_OTHERS = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")} | {_PACKAGE, "<"})


def find(location: str) -> Any:
    """What MODULE:FUNCTION names; modules of the current folder count.

    Raises:
      InputError: there is no such thing, or importing it fails.
    """
    module_name, _, name = location.partition(":")
    if not module_name or not name:
        raise InputError(f"reward {location!r}: wants MODULE:FUNCTION, as in python:my_rewards:redness")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        with _held_errors() as errors:
            module = importlib.import_module(module_name)
        found = getattr(module, name, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a stranger's module may raise anything, and end the program
        said = ""
        if isinstance(error, SystemExit):  # of argparse, say: the arguments are this program's
            last = f"; it said: {errors.last_line():.200}" if errors.last_line() else ""
            said = f"{last}; what ends a program, or reads its arguments, wants if __name__ == '__main__'"
        raise InputError(f"reward {location!r}: importing {module_name}: {raised(error)}{said}") from error
    if not callable(found) and not isinstance(found, Reward):
        raise InputError(f"reward {location!r}: {module.__name__} has no function {name!r}")
    return found


class _HeldErrors:
    """Standard error that keeps what is written until `release`, and passes on what comes later."""

    def __init__(self, stream: Any):
        self._stream, self._held = stream, []
        self.holds = True

    def write(self, text: str) -> int:
        return len(self._held.append(text) or text) if self.holds else self._stream.write(text)

    def release(self, *, said: bool) -> None:
        self.holds = False
        if said:
            self._stream.write("".join(self._held))

    def last_line(self) -> str:
        return ("".join(self._held).strip().splitlines() or [""])[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _held_errors() -> Iterator[_HeldErrors]:
    """Standard error waits until the end; where that is the program's, it is held back for our own line."""
    errors = _HeldErrors(sys.stderr)
    try:
        with redirect_stderr(errors):
            yield errors
    except SystemExit:
        errors.release(said=False)
        raise
    finally:
        if errors.holds:
            errors.release(said=True)


def check_function(function: Callable, name: str, forms: Mapping[str, Sequence[str]], hint: str) -> str:
    """Which of these forms a function has: how it can be called, by its signature alone.

    Args:
      forms: what is shown of a form -> the names of its arguments; "metadata" is given by its name.
      hint: what follows the line about one that has none of them.

    Raises:
      InputError: none, or it is no plain function: a class, async, or one that yields.
    """
    call = function if inspect.isroutine(function) or inspect.isclass(function) else type(function).__call__
    kinds = {
        "a class": inspect.isclass,
        "async": inspect.iscoroutinefunction,
        "a generator": inspect.isgeneratorfunction,
    }
    kinds["an async generator"] = inspect.isasyncgenfunction
    for kind, is_kind in kinds.items():
        if is_kind(call):
            raise InputError(f"reward {name}: is {kind}; wants a plain function that returns scores{defined(function)}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of C code: what it takes is not known
        return list(forms)[-1]
    for form, arguments in forms.items():
        if _fits(signature, arguments):
            return form
    raise InputError(
        f"reward {name}: takes {signature}; it is called as {' or '.join(forms)}{hint}{defined(function)}".replace(
            "\n", " "
        )
    )


def _fits(signature: inspect.Signature, arguments: Sequence[str]) -> bool:
    named = {name: None for name in arguments if name == "metadata"}
    if not named.keys() <= signature.parameters.keys():
        return False
    try:
        signature.bind(*arguments[: len(arguments) - len(named)], **named)
    except TypeError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------- lines


def raised(error: BaseException) -> str:
    """ "KeyError: 'x' (my_rewards.py:12)": the error's first line, and where the user's code was."""
    first = (str(error).strip().splitlines() or [""])[0]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_OTHERS)]
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    if isinstance(error, jax.errors.JAXTypeError):
        first = first.partition("\n")[0].rstrip(".") + ": JAX traces the function, which wants jax.numpy in place of "
        first += "numpy, float() and if; what cannot be so is python:MODULE:FUNCTION"
    return f"{type(error).__name__}: {first}{where}" if first else f"{type(error).__name__}{where}"


def defined(function: Any) -> str:
    """ " (my_rewards.py:3)": where a function is written; "" where that is not known."""
    function = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    for candidate in (function, vars(type(function)).get("__call__"), getattr(function, "__init__", None)):
        if code := getattr(candidate, "__code__", None):
            return f" ({Path(code.co_filename).name}:{code.co_firstlineno})"
    return ""


def form(value: Any) -> str:
    """What a function returned, in words: "float32 of shape [5, 1]", "a dict of 'a', 'b'", "a tuple of 3", "None"."""
    if value is None:
        return "None"
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(repr(str(key)) for key in list(value)[:5]) or 'nothing'}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} of shape {list(value.shape)}"
    kind = type(value).__name__
    article = "an" if kind[0] in "aeiou" else "a"
    return f"{article} {kind} of {len(value)}" if isinstance(value, list | tuple) else f"{article} {kind}"


def apart(returned: Any) -> tuple[Any, Mapping[Any, Any]]:
    """(scores, info) of what a function returned: a pair of scores and a dict, or scores alone."""
    if inspect.iscoroutine(returned):
        returned.close()  # or Python would say that nobody waited for it
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        return returned
    return returned, {}


def info_names(info: Mapping[Any, Any]) -> dict[str, Any]:
    """The values of a reward's info by the names of its parts: "info/KEY"."""
    return {f"info/{key}": value for key, value in info.items()}


def numbers(value: Any) -> np.ndarray:
    """The numbers of a list, an array of numpy or JAX, or a tensor of torch, on whatever device and with a gradient.

    Raises:
      ValueError, TypeError: it has none.
    """
    if isinstance(value, list | tuple):
        value = [numbers(item) if hasattr(item, "detach") else item for item in value]
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value  # numpy has no bfloat16
        value = value.numpy()
    if isinstance(value, np.ma.MaskedArray):
        value = value.astype(np.float64).filled(np.nan)
    found = np.asarray(value)
    return found.astype(np.float32) if found.dtype.name == "bfloat16" else found
