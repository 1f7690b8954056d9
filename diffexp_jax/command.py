"""What the command-line programs share: one line per mistake, and exit codes."""

import _thread
import argparse
import ast
import contextlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NoReturn

from absl import flags, logging

from diffexp_jax import config_files, output, paths
from diffexp_jax.errors import HostError, InputError, RewardError, Stopped, did_you_mean, first_line, printable

_LONGEST = 1000  # characters of an error
LISTS = ("eval.prompts", "eval.rewards", "lora.targets")  # settings that a flag may give as words, separated by commas


@output.lasting()
@output.above_bars()
def guarded(main: Callable[..., Any], *args: Any, stopped: str = "stopped") -> None:
    """Runs main(*args); bad input ends in one line on stderr and exit code 2, a failed run in exit code 1.

    Paths among a script's arguments are made local ones (`paths.local`) first. `stopped` is what Ctrl-C ends in, with
    exit code 130; a run that saves first says it itself (`stopping.py`).
    """
    never_fail_to_print()
    # transformers advises at import that torch is missing: nothing here needs it
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.set_verbosity(logging.WARNING)  # orbax logs every file that it touches
    try:
        with no_lost_interrupt():
            main(*(with_local_paths(x) if isinstance(x, argparse.Namespace) else x for x in args))
    except InputError as error:
        fail(2, error)
    except (FloatingPointError, HostError, RewardError, OSError) as error:  # a NaN; the disk is full, say
        fail(1, error)
    except (MemoryError, RuntimeError) as error:  # jax's own is a RuntimeError
        if not is_out_of_memory(error):
            raise
        fail(1, RuntimeError(out_of_memory(error)))
    except Stopped as stop:
        print(f"\n{stop}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def no_lost_interrupt() -> Iterator[None]:
    """Ctrl-C is not lost where Python would print the KeyboardInterrupt and go on: the signal is sent again there.

    That is in callbacks of the garbage collector (jax has one, often at work while a program is traced) and of weak
    references, and in `__del__`.
    """
    usual = sys.unraisablehook

    def hook(unraisable):
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            return usual(unraisable)
        # not by threading: its start() waits for the thread, and the signal may come while it does
        _thread.start_new_thread(_interrupt_again, (threading.get_ident(), hook.__code__))

    sys.unraisablehook = hook
    try:
        yield
    finally:
        if sys.unraisablehook is hook:  # what was put before it since then is to stay (`orbax_errors.quiet`)
            sys.unraisablehook = usual


def _interrupt_again(thread: int, code: CodeType) -> None:
    """Sends Ctrl-C's signal once the thread has left this code, where it would be lost once more."""
    inside = True
    while inside:
        time.sleep(0.02)
        inside = any(frame.f_code is code for frame, _ in traceback.walk_stack(sys._current_frames()[thread]))
    os.kill(os.getpid(), signal.SIGINT)


def never_fail_to_print() -> None:
    """What the terminal's encoding lacks (PYTHONIOENCODING=ascii, a name that is not UTF-8) is printed as \\u00e9.

    Each line is there at once, in a file too: who follows a run's log must not wait for a full buffer.
    """
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:  # a notebook's has none
            reconfigure(errors="backslashreplace", line_buffering=True)


def quiet_interrupt() -> None:
    """Makes Ctrl-C one line also before `guarded` runs: importing the libraries takes seconds."""
    never_fail_to_print()  # argparse prints help before `guarded`

    def hook(kind, error, trace):
        if not issubclass(kind, KeyboardInterrupt):
            return sys.__excepthook__(kind, error, trace)
        print("\nstopped; nothing had begun", file=sys.stderr)

    sys.excepthook = hook


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or bool(re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)))


def out_of_memory(error: BaseException) -> str:
    """What to do about it, in one line."""
    first = (str(error).strip().splitlines() or ["MemoryError"])[0][:120]
    return (
        f"out of memory ({first}): lower batch.samples_per_forward (in a script --batch) or model.vae_slice, or set "
        "model.remat=block; --dry_run says what a run needs"
    )


def check_writable(folder: Path, flag: str) -> None:
    """Checks, before the work and without writing anything, that files can go into a folder that may not exist yet.

    Raises:
      InputError: they cannot; `flag` is what the user gave the folder by.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{flag} {folder}: cannot be written ({there} is not a folder)")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {folder}: cannot be written (no permission to write in {there})")


def with_local_paths(args: argparse.Namespace) -> argparse.Namespace:
    """A script's arguments with every `Path` in them, also in lists, as `paths.local` gives it.

    Raises:
      InputError: one is not on this machine, or no path.
    """

    def made_local(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [made_local(name, item) for item in value]
        return paths.local(f"--{name}", value) if isinstance(value, Path) else value

    return argparse.Namespace(**{name: made_local(name, value) for name, value in vars(args).items()})


def fail(code: int, error: Exception) -> NoReturn:
    """One line on stderr, and the exit code."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(code)


def one_line(error: Exception) -> str:
    """What it says: the whole of an InputError, with what a file's name or contents bring along made printable; of
    another one the first line."""
    text = str(error).strip()
    text = text if isinstance(error, InputError) else text.partition("\n")[0]
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return printable(text) or type(error).__name__


# --------------------------------------------------------------------------------------------------------------- flags


def split_list(text: str) -> tuple[str, ...]:
    """ "a,b" -> ("a", "b"). A comma before a blank is a prompt's own: "a cat, sleeping,animals" are two."""
    return tuple(item for item in re.split(r",(?!\s)", text) if item)


def parse_flags(argv: list[str], config: flags.FlagHolder) -> list[str]:
    """absl's flag parsing, with a mistake in a config (a flag of ml_collections) reported in one line."""
    try:
        config_files.package()
        rest = flags.FLAGS(_with_lists(_with_config_files(argv)))
        getattr(config.value, "algorithm", None)  # a config file that is missing is an error only once it is used
        return rest
    except Exception as error:
        while "Error whilst parsing config file" in str(error):  # a traceback around get_config's message
            error = error.__context__
        if isinstance(error, KeyError | AttributeError):
            error = InputError(f"config: {_unknown_key(argv, error)}")
        if isinstance(error, flags.UnrecognizedFlagError):
            error = InputError(_unknown_flag(error))
        if isinstance(error, OSError):  # a line for each place where the file was looked for
            error = InputError(f"config: {_unread_file(str(error).splitlines()[-1].strip())}")
        fail(2, error)


def _unread_file(reason: str) -> str:
    missing = re.search("No such file or directory: '(.*)'", reason)
    if not missing:
        return reason
    names = config_files.names()
    near = did_you_mean(Path(missing[1]).stem, names)
    return f"{missing[1]}: no such file; accepted: a path, {', '.join(names)}{near}"


def _with_config_files(argv: list[str]) -> list[str]:
    """The arguments with --config's file where it is, see `config_files.located`."""
    out = list(argv)
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag.lstrip("-") == "config" and (equals or i + 1 < len(argv)):
            at, start = (i, f"{flag}=") if equals else (i + 1, "")
            out[at] = start + config_files.located(value if equals else argv[at])
    return out


def _with_lists(argv: list[str]) -> list[str]:
    """The arguments with lists of words written as tuples, which is what ml_collections reads."""
    out = list(argv)
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag.lstrip("-") not in {f"config.{key}" for key in LISTS}:
            continue
        at = i if equals else i + 1
        value = value if equals else (argv[at] if at < len(argv) else "")
        if not _is_literal(value):
            written = repr(split_list(value))
            out[at] = f"{flag}={written}" if equals else written
    return out


def _is_literal(text: str) -> bool:
    try:
        return isinstance(ast.literal_eval(text), tuple | list | str)
    except (ValueError, SyntaxError):
        return False


def _unknown_key(argv: list[str], error: Exception) -> str:
    """The error message about a setting that does not exist."""
    from diffexp_jax.settings.names import known_keys, no_such_key  # seconds to import: only where they are needed

    known = known_keys()
    for argument in argv:
        match = re.match(r"--?config\.([\w.]+)", argument)
        if match and match[1] not in known:
            return no_such_key(match[1])
    return str(error)


def _unknown_flag(error: flags.UnrecognizedFlagError) -> str:
    """The error message about a flag that does not exist: it may be a setting without `config.`."""
    from diffexp_jax.settings.names import nearest

    key = None if "Did you mean" in str(error) else nearest(error.flagname)
    return f"no such flag --{error.flagname}; did you mean --config.{key}?" if key else first_line(error)
