"""How much of its time a run on many hosts spends on iterations that last, and how often it should save.

    python scripts/goodput.py --hosts 64 --host_days 180 --iteration 20 --save 2 --restart 300

A failure of one host stops all: what was done since the last checkpoint is lost, and the run starts again. The interval
between checkpoints trades what saving costs for what a failure loses. A simulation of failures, beside the formulas:
Young's interval sqrt(2 s M) (1974) for a save of s seconds and M between failures, and Daly's expected time (2006).
"""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()

import argparse
import math
from collections.abc import Iterator

import jax
import numpy as np

from diffexp_jax import InputError


def young_interval(save: float, between_failures: float) -> float:
    """Seconds of work between checkpoints that lose least, where both times are short beside a failure's."""
    return math.sqrt(2.0 * save * between_failures)


def expected_goodput(interval: float, save: float, restart: float, between_failures: float) -> float:
    """The share of useful time, 0 to 1, for failures at random (Daly's exact form); all in seconds."""
    m = between_failures
    return interval / (m * math.exp(restart / m) * math.expm1((interval + save) / m))


def simulated_goodput(
    key: jax.Array, interval: float, save: float, restart: float, between_failures: float, *, intervals: int = 2000
) -> float:
    """The same, from a run of so many intervals whose failures are drawn one by one.

    A failure while saving loses the interval, one while starting again only that start.
    """
    clock, failures = 0.0, _failures(key, between_failures)
    failure = next(failures)
    for _ in range(intervals):
        need = interval + save
        while clock + need > failure:
            clock, need = failure, restart + interval + save
            failure = clock + next(failures)
        clock += need
    return intervals * interval / clock


def _failures(key: jax.Array, mean: float, block: int = 4096) -> Iterator[float]:
    """Seconds until the next failure, again and again."""
    while True:
        key, now = jax.random.split(key)
        yield from (mean * np.asarray(jax.random.exponential(now, (block,)), np.float64)).tolist()


def table(args: argparse.Namespace) -> list[str]:
    """A line for each interval between checkpoints, in iterations."""
    between = args.host_days * 86400 / args.hosts
    best = young_interval(args.save, between)
    near = max(round(best / args.iteration), 1)
    choices = sorted({1, max(near // 10, 1), max(near // 3, 1), near, 3 * near, 10 * near})
    lines = [
        f"{args.hosts} hosts, one fails every {args.host_days:g} days: a failure every {between / 3600:.2g} hours",
        f"Young: save every {best:.0f} s, {near} iterations (checkpoint.every)",
        f"{'checkpoint.every':>16} {'goodput':>8} {'expected':>9}",
    ]
    for every in choices:
        times = (every * args.iteration, args.save, args.restart, between)
        simulated = simulated_goodput(jax.random.key(args.seed), *times)
        lines.append(f"{every:16d} {simulated:8.1%} {expected_goodput(*times):9.1%}")
    return lines


def main(args: argparse.Namespace) -> None:
    for name in ("hosts", "host_days", "iteration", "save", "restart"):
        if not 0 < getattr(args, name) < 1e9:
            raise InputError(f"--{name} {getattr(args, name):g}: wants more than 0")
    print("\n".join(table(args)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, required=True)
    parser.add_argument("--host_days", type=float, default=180.0, help="days between failures of one host")
    parser.add_argument("--iteration", type=float, required=True, help="seconds")
    parser.add_argument("--save", type=float, default=2.0, help="seconds that a checkpoint keeps the run waiting")
    parser.add_argument("--restart", type=float, default=300.0, help="seconds from a failure to the next iteration")
    parser.add_argument("--seed", type=int, default=0)
    command.guarded(main, parser.parse_args())
