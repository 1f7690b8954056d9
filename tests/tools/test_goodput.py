"""The simulation of failures, against what is known of it in closed form."""

import math
import subprocess
import sys

import numpy as np
import pytest

from tests.support import ROOT


@pytest.fixture
def goodput(monkeypatch):
    import goodput

    return goodput


class Failures:
    """In place of a random generator: failures after so many seconds, then none."""

    def __init__(self, *seconds):
        self.seconds = list(seconds)

    def exponential(self, mean):
        return self.seconds.pop(0) if self.seconds else math.inf


def test_one_run_literally(goodput):
    """10 iterations of 10 s, a checkpoint of 1 s after each 2, safe 3 s later, 50 s to start again."""
    cluster = goodput.Cluster(hosts=1, mtbf=1e9, iteration=10.0, checkpoint=1.0, write=3.0, restart=50.0)
    assert goodput.run_time(cluster, 10, 2, Failures()) == 104.0  # four checkpoints, none at the end
    # at 23.9 s the first checkpoint (made at 21) is not safe yet: all is lost; at 24 it is, and 8 iterations are left
    assert goodput.run_time(cluster, 10, 2, Failures(23.9)) == 23.9 + 50.0 + 104.0
    assert goodput.run_time(cluster, 10, 2, Failures(24.0)) == 24.0 + 50.0 + 83.0
    # a failure while it starts again costs its own time
    assert goodput.run_time(cluster, 10, 2, Failures(24.0, 30.0)) == 24.0 + 30.0 + 50.0 + 83.0


@pytest.mark.parametrize("hosts, every", [(4, 5), (64, 20)])
def test_the_mean_is_dalys(goodput, hosts, every):
    """With writes that take no time: e^(rate x restart) / rate x (e^(rate x cycle) - 1) a cycle."""
    cluster = goodput.Cluster(hosts, mtbf=40_000.0, iteration=10.0, checkpoint=3.0, write=0.0, restart=100.0)
    rate, work = hosts / 40_000.0, every * cluster.iteration
    cycles = 49 * [work + cluster.checkpoint] + [work]  # none at the end
    exact = math.exp(rate * cluster.restart) / rate * sum(math.expm1(rate * cycle) for cycle in cycles)
    rng = np.random.default_rng(0)
    times = [goodput.run_time(cluster, 50 * every, every, rng) for _ in range(2000)]
    error = np.std(times) / math.sqrt(len(times))
    assert abs(np.mean(times) - exact) < 4 * error < 0.01 * exact


def test_the_best_interval_is_about_youngs(goodput):
    cluster = goodput.Cluster(hosts=16, mtbf=160_000.0, iteration=10.0, checkpoint=5.0, write=0.0, restart=60.0)
    assert goodput.best_interval(cluster) == pytest.approx(math.sqrt(2 * 5.0 * 10_000.0) / 10.0)  # 31.6
    shares = {n: goodput.goodput(cluster, 1000, n, draws=600, seed=1)[0] for n in (3, 30, 300)}
    assert max(shares, key=shares.get) == 30


def test_the_command(goodput):
    line = [
        sys.executable,
        str(ROOT / "tools" / "benchmark" / "goodput.py"),
        "--hosts=32",
        "--iterations=100",
        "--draws=20",
    ]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0 and "<- best" in done.stdout and "a failure every 31.2 hours" in done.stdout
    wrong = subprocess.run([*line, "--mtbf_hours=0"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "--mtbf_hours" in wrong.stderr
