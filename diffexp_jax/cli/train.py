"""Reward fine-tuning from the command line: `python -m diffexp_jax.train`, or diffexp-train where it is installed."""

import contextlib

from absl import app, flags
from ml_collections import config_flags

from diffexp_jax import backend, command, parallel, paths
from diffexp_jax.cli.listing import LISTS, listing
from diffexp_jax.cost.dry_run import dry_run
from diffexp_jax.cost.target import FORMS, compiling_for
from diffexp_jax.errors import InputError
from diffexp_jax.limits import one_of
from diffexp_jax.settings import cpu_devices, parsed
from diffexp_jax.train import run

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything that the run makes.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile the run's programs without weights, print their size, exit.")
_TARGET = flags.DEFINE_string("target", None, f"Of --dry_run: devices that are not there, of {FORMS}.")
_LIST = flags.DEFINE_string("list", None, f"Print what there is, exit: all, or {', '.join(LISTS)}.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py:key=value,...", lock_config=True)


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise InputError(f"unexpected argument {argv[1]!r}; settings are given as --config.KEY=VALUE")
    if _LIST.value is not None:
        one_of("--list", _LIST.value, ("all", *LISTS))
        return print(listing(_LIST.value))
    if _CONFIG.value is None or (_WORKDIR.value is None and not _DRY_RUN.value):
        raise InputError("wants --config configs/NAME.py:... and --workdir DIR (or --dry_run, or --list)")
    if _TARGET.value is not None and not _DRY_RUN.value:
        raise InputError(f"--target {_TARGET.value}: is for --dry_run")
    config, alone = _CONFIG.value, {"number": 1} if _DRY_RUN.value else {}
    target = contextlib.nullcontext() if _TARGET.value is None else compiling_for(_TARGET.value)
    with target, parallel.joined(parallel.HostSettings(**dict(_CONFIG.value.hosts) | alone)):
        settings = parsed(config)
        backend.set_cpu_devices(cpu_devices(settings))
        dry_run(settings) if _DRY_RUN.value else run(settings, paths.local("--workdir", _WORKDIR.value))


def parse_flags(argv: list[str]) -> list[str]:
    """absl's, with a bare --list for all that there is."""
    following = [*argv[1:], "--"]
    bare = [a.lstrip("-") == "list" and b.startswith("-") for a, b in zip(argv, following, strict=True)]
    return command.parse_flags([f"{a}=all" if is_bare else a for a, is_bare in zip(argv, bare, strict=True)], _CONFIG)


def start() -> None:
    app.run(lambda argv: command.guarded(main, argv, stopped="stopped; nothing is lost"), flags_parser=parse_flags)
