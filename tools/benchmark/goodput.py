"""How much of a long run's time is lost to failures, and which checkpoint interval loses least.

    python tools/benchmark/goodput.py --hosts 8 --mtbf_hours 1000 --iteration_seconds 20 --checkpoint_seconds 0.1

Any host that fails stops all of them; they start again at the newest checkpoint. A run is simulated event by event:
failures at random (exponential, so that they do not age), checkpoints that hold up the run for a moment and are safe
only when they are written. Goodput is the share of the time that a run without failures and checkpoints would take.
Beside it stands the interval of Young (1974) and Daly (2006), sqrt(2 x what a checkpoint costs x mean time between
failures), as a check.
"""

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffexp_jax import command
from diffexp_jax.limits import check_number, positive, whole

INTERVALS = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # iterations between checkpoints that are tried


class Cluster(NamedTuple):
    """Seconds, but for the number of hosts."""

    hosts: int
    mtbf: float  # mean time between the failures of one host
    iteration: float
    checkpoint: float  # that a checkpoint holds up the run
    write: float  # from then on until it is safe
    restart: float  # from a failure until the first iteration begins: noticing it, scheduling, compiling, reading

    @property
    def mean_between_failures(self) -> float:
        """The mean time between failures of any host."""
        return self.mtbf / self.hosts


def run_time(cluster: Cluster, iterations: int, every: int, rng: np.random.Generator) -> float:
    """Seconds that a run of so many iterations takes, with a checkpoint after each `every`; one draw."""
    cycle = every * cluster.iteration + cluster.checkpoint
    done, clock, start = 0, 0.0, 0.0  # `start`: what the beginning of this attempt takes; the first is free
    while True:
        left = iterations - done
        needed = left * cluster.iteration + (left - 1) // every * cluster.checkpoint
        fails = rng.exponential(cluster.mean_between_failures)
        if fails >= start + needed:
            return clock + start + needed
        clock += fails
        safe = math.floor((fails - start - cluster.write) / cycle) if fails > start else 0
        done += max(safe, 0) * every
        start = cluster.restart


def goodput(cluster: Cluster, iterations: int, every: int, *, draws: int, seed: int) -> tuple[float, float]:
    """Mean share of useful time over the draws, and its standard error."""
    rng = np.random.default_rng(seed)
    useful = iterations * cluster.iteration
    shares = np.array([useful / run_time(cluster, iterations, every, rng) for _ in range(draws)])
    return float(shares.mean()), float(shares.std() / math.sqrt(draws))


def best_interval(cluster: Cluster) -> float:
    """Iterations between checkpoints by Young's and Daly's first-order formula."""
    return math.sqrt(2.0 * cluster.checkpoint * cluster.mean_between_failures) / cluster.iteration


def table(cluster: Cluster, iterations: int, intervals: Sequence[int], *, draws: int, seed: int) -> str:
    """A table of the intervals that fit into the run, the best one marked."""
    rows = {every: goodput(cluster, iterations, every, draws=draws, seed=seed) for every in intervals}
    best = max(rows, key=lambda every: rows[every][0])
    lines = [
        f"{'iterations between checkpoints':>30}  goodput",
        *(
            f"{every:>30}  {100 * share:.2f} % +- {100 * error:.2f}{'  <- best' if every == best else ''}"
            for every, (share, error) in rows.items()
        ),
        f"a failure every {cluster.mean_between_failures / 3600:.1f} hours; Young and Daly: a checkpoint every "
        f"{best_interval(cluster):.2g} iterations",
    ]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    for name in ("hosts", "iterations", "draws"):
        check_number(f"--{name} ", getattr(args, name), whole(1))
    for name in ("mtbf_hours", "iteration_seconds", "checkpoint_seconds", "write_seconds", "restart_seconds"):
        check_number(f"--{name} ", getattr(args, name), positive())
    cluster = Cluster(
        args.hosts,
        3600.0 * args.mtbf_hours,
        args.iteration_seconds,
        args.checkpoint_seconds,
        args.write_seconds,
        args.restart_seconds,
    )
    intervals = [every for every in INTERVALS if every < args.iterations] or [args.iterations]
    print(table(cluster, args.iterations, intervals, draws=args.draws, seed=args.seed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hosts", type=int, default=8)
    add("--mtbf_hours", type=float, default=1000.0, help="mean time between failures (or preemptions) of one host")
    add("--iterations", type=int, default=1000, help="of the run")
    add("--iteration_seconds", type=float, default=20.0)
    add("--checkpoint_seconds", type=float, default=0.1, help="that a checkpoint holds up the run")
    add("--write_seconds", type=float, default=5.0, help="until it is safe, while the run goes on")
    add("--restart_seconds", type=float, default=300.0, help="from a failure to the next iteration")
    add("--draws", type=int, default=400, help="simulated runs of each interval")
    add("--seed", type=int, default=0)
    command.guarded(main, parser.parse_args())
