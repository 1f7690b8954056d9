"""The simulation of failures, beside Young's and Daly's formulas."""

import importlib.util
import math

import jax
import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("goodput", ROOT / "scripts" / "goodput.py")
goodput = importlib.util.module_from_spec(spec)
spec.loader.exec_module(goodput)

HOUR = 3600.0


def test_expected_goodput_by_hand():
    """Without failures only saving costs; with them t / (M e^(R/M) (e^((t+s)/M) - 1)), here of 1, 1, 2, 2."""
    assert goodput.expected_goodput(90.0, 10.0, 100.0, 1e12) == pytest.approx(0.9, rel=1e-6)
    assert goodput.expected_goodput(1.0, 1.0, 2.0, 2.0) == pytest.approx(1 / (2 * math.e * (math.e - 1)), rel=1e-9)


@pytest.mark.parametrize("interval", [60.0, 600.0, 6000.0])
def test_the_simulation_is_what_daly_expects(interval):
    times = (interval, 5.0, 300.0, 2 * HOUR)
    simulated = goodput.simulated_goodput(jax.random.key(1), *times, intervals=20000)
    assert simulated == pytest.approx(goodput.expected_goodput(*times), rel=0.03)


def test_youngs_interval_is_nearly_the_best():
    save, restart, between = 5.0, 300.0, 2 * HOUR
    best = goodput.young_interval(save, between)
    assert best == pytest.approx(math.sqrt(2 * 5 * 7200))
    at = {
        factor: goodput.expected_goodput(factor * best, save, restart, between) for factor in (0.3, 0.9, 1.0, 1.1, 3.0)
    }
    assert at[1.0] > at[0.3] and at[1.0] > at[3.0]
    assert at[1.0] > 0.9999 * max(at.values())


def test_the_table(capsys):
    args = {"hosts": 64, "host_days": 180.0, "iteration": 20.0, "save": 2.0, "restart": 300.0, "seed": 0}
    goodput.main(goodput.argparse.Namespace(**args))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("a failure every 68 hours") and "49 iterations (checkpoint.every)" in lines[1]
    shares = {int(line.split()[0]): float(line.split()[1].rstrip("%")) for line in lines[3:]}
    assert shares[49] > shares[1] and all(0 < share < 100 for share in shares.values())
    assert "\n".join(lines) in (ROOT / "docs" / "scale.md").read_text()
    with pytest.raises(goodput.InputError, match="--save 0: wants more than 0"):
        goodput.main(goodput.argparse.Namespace(**args | {"save": 0.0}))
