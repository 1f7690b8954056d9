"""Writes the report of a run again, a page of two runs side by side, or a run's pictures as an animation.

python scripts/report.py --workdir runs/a
python scripts/report.py --workdir runs/a --beside runs/b --out a-and-b.html
python scripts/report.py --workdir runs/a --animation a.webp

Each is one file that needs nothing else.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffexp_jax import command, report
from diffexp_jax.errors import InputError
from diffexp_jax.run import optional


def main(args: argparse.Namespace) -> None:
    beside = f"beside-{args.beside.resolve().name}.html" if args.beside else report.REPORT
    out = args.animation or args.out or args.workdir / beside
    command.check_writable(out.parent, "--animation" if args.animation else "--out" if args.out else "--workdir")
    try:
        if args.animation:
            report.save_animation(args.workdir, out)
        elif args.beside:
            report.save_beside((args.workdir, args.beside), out)
        else:
            report.save(args.workdir, args.out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from None
    except InputError:
        raise
    except Exception as error:  # of whatever a damaged folder holds
        raise InputError(f"{args.workdir}: no page can be made of it ({optional.reason_of(error)})") from None
    print(f"written: {out}")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of a command line; None: the program's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="of the run")
    add("--beside", type=Path, help="the folder of another run, for a page of both")
    add("--animation", type=Path, help="a .webp or .gif file: the run's image grids one after the other, and no page")
    add("--out", type=Path, help="the .html file (default: report.html or beside-NAME.html in --workdir)")
    return parser.parse_args(words)


def run() -> None:
    command.guarded(main, arguments())
