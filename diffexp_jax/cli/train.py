"""Reward fine-tuning from the command line: `python -m diffexp_jax.train`, or diffexp-train where it is installed."""

import contextlib
import sys
import textwrap

from absl import app, flags, logging
from ml_collections import config_flags

from diffexp_jax import backend, command, config_files, parallel, paths
from diffexp_jax.cli.listing import LISTS, listing
from diffexp_jax.cost.dry_run import dry_run
from diffexp_jax.cost.target import FORMS, compiling_for
from diffexp_jax.errors import InputError
from diffexp_jax.limits import one_of
from diffexp_jax.pipelines import SHIPPED
from diffexp_jax.settings import cpu_devices, parsed
from diffexp_jax.train import run

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything that the run makes.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile the run's programs without weights, print their size, exit.")
_TARGET = flags.DEFINE_string("target", None, f"Of --dry_run: devices that are not there, of {FORMS}.")
_LIST = flags.DEFINE_string("list", None, f"Print what there is, exit: all, or {', '.join(LISTS)}.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py:key=value,...", lock_config=True)

HELP = """Fine-tunes a text-to-image model on a reward. The same command resumes a run that was stopped.

  python -m diffexp_jax.train --config configs/NAME.py:model=M,reward=R,prompts=P,explore=true --workdir DIR
  python -m diffexp_jax.train --config configs/alignprop.py:model=emoji --workdir runs/a --config.optim.lr=5e-3

{}

docs/use/start.md is the first page to read, docs/use/settings.md has the settings."""


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
        warn_of_sizes(flags.FLAGS["config"])
        backend.set_cpu_devices(cpu_devices(settings))
        dry_run(settings) if _DRY_RUN.value else run(settings, paths.local("--workdir", _WORKDIR.value))


def help_text() -> str:
    """What --help prints."""
    usual = ", ".join(f"{key}={value}" for key, value in config_files.module("arguments").ARGUMENTS.items())
    files = f"A file of configs/, which chooses the method: {', '.join(config_files.names())}. Behind its colon"
    said = {"--config FILE:...": f"{files}, each optional: {usual}."}
    said |= {"--config.KEY=VALUE": "A single setting; --list=settings has them all."}
    said |= {f"--{name}": flags.FLAGS[name].help for name in ("workdir", "dry_run", "target", "list")}
    lines = [textwrap.fill(f"  {flag:22}{text}", 120, subsequent_indent=" " * 24) for flag, text in said.items()]
    return HELP.format("\n".join(lines))


def warn_of_sizes(flag: flags.Flag) -> None:
    """Warns where --config.model.path names another model than the shipped one that the config is for."""
    path = config_flags.get_override_values(flag).get("model.path")
    if path is None or path in SHIPPED:
        return
    usual = flag.parser.parse(config_flags.get_config_filename(flag)).model.path
    if usual in SHIPPED:
        others = [
            name
            for name, changes in config_files.module("models").MODELS.items()
            if changes["model.path"] not in SHIPPED
        ]
        logging.warning(
            "model.path=%s: steps, batch, learning rate, clip and evaluation are those for %s; a model of another size "
            "wants them of model=NAME: %s",
            *(path, usual, ", ".join(others)),
        )


def parse_flags(argv: list[str]) -> list[str]:
    """absl's, with a bare --list for all that there is, and --help in our words."""
    if {"--help", "-help", "-h"} & set(argv):
        print(help_text())
        sys.exit(0)
    following = [*argv[1:], "--"]
    bare = [a.lstrip("-") == "list" and b.startswith("-") for a, b in zip(argv, following, strict=True)]
    return command.parse_flags([f"{a}=all" if is_bare else a for a, is_bare in zip(argv, bare, strict=True)], _CONFIG)


def start() -> None:
    app.run(lambda argv: command.guarded(main, argv, stopped="stopped; nothing is lost"), flags_parser=parse_flags)
