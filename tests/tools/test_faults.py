"""Runs that are killed and damaged end as undisturbed ones; the table of the great campaign is what its file says."""

import json
import re
import runpy
import subprocess
import sys

import pytest

from diffexp_jax.errors import InputError
from tests.support import ROOT

DOCUMENT, FILE = ROOT / "docs" / "evidence" / "reliability.md", ROOT / "docs" / "evidence" / "data" / "reliability.json"


@pytest.fixture
def campaign(monkeypatch):
    return runpy.run_path(str(ROOT / "tools" / "faults" / "fault_campaign.py"), run_name="campaign")


def test_the_table_is_what_the_file_says(campaign):
    found = campaign["read"](FILE)
    table = re.search(r"<!-- table -->\n(.*?)<!-- /table -->", DOCUMENT.read_text(), re.S)[1]
    assert table == campaign["table"](found)
    assert all(trial["ok"] for kind in found.values() for trial in kind) and len(found["kills"]) >= 100
    assert {trial["processes"] for trial in found["kills"]} == {1, 2}


@pytest.mark.parametrize(
    "name, code, said, right",
    [
        ("SIGTERM", 143, [], True),
        ("SIGTERM", -15, [], True),  # while it loads
        ("SIGTERM", 1, [], False),  # also if it says nothing
        ("SIGINT", 143, [], False),
        ("SIGHUP", 129, [], True),
        ("SIGHUP", -1, [], True),  # while it loads
        ("SIGHUP", 143, [], False),
        ("SIGKILL", -9, ["Traceback (most recent call last):"], False),
    ],
)
def test_what_a_killed_run_must_end_in(campaign, name, code, said, right):
    assert campaign["is_right"](campaign["fault_runs"].End(code, said), name) == right


@pytest.mark.parametrize(
    "name, victims, codes, said, right",
    [
        ("SIGTERM", [1], [143, 143], "", True),  # both stop after the same iteration
        ("SIGTERM", [1], [1, -15], "error: host 1 has gone", True),  # it was loading
        ("SIGTERM", [1], [1, 143], "", False),  # ends without a word
        ("SIGKILL", [0], [-9, 1], "error: host 0: nothing was heard of it", True),
        ("SIGKILL", [0], [-9, 0], "", False),  # the other one believes that all is done
        ("SIGKILL", [0], [-9, -9], "error: x", False),
    ],
)
def test_what_two_hosts_must_end_in(campaign, name, victims, codes, said, right):
    ends = [campaign["fault_runs"].End(code, [said] if code == 1 else []) for code in codes]
    assert campaign["are_right"](ends, victims, name, complete=False) == right


def test_an_earlier_kills_checkpoint_is_not_counted_again(campaign, tmp_path):
    unfinished, folder = campaign["fault_runs"].unfinished, tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    assert unfinished(tmp_path) == set()
    folder.mkdir(parents=True)
    older = unfinished(tmp_path)
    assert len(older) == 1 and unfinished(tmp_path) - older == set()
    (folder.parent / "4.orbax-checkpoint-tmp").mkdir()
    assert {name for name, _ in unfinished(tmp_path) - older} == {"4.orbax-checkpoint-tmp"}


def test_which_cases_are_tried(campaign):
    cases = campaign["fault_cases"].CASES
    assert campaign["chosen"](None) == list(cases)
    assert [case.name for case in campaign["chosen"]("port,full")] == ["port", "full"]
    with pytest.raises(InputError, match="--only='ports': accepted: truncated, "):
        campaign["chosen"]("ports")


def test_a_trial_that_fails_is_seen(campaign, tmp_path):
    trial = {"algorithm": "ddpo", "processes": 1, "signal": "SIGTERM", "hit": "iteration"}
    found = {"kills": [trial | {"ok": True}, trial | {"ok": False}], "damages": []}
    (tmp_path / "d.md").write_text("above\n<!-- table -->\nold\n<!-- /table -->\nbelow\n")
    campaign["write_table"](tmp_path / "d.md", found)
    text = (tmp_path / "d.md").read_text()
    assert "| one process: SIGTERM in an iteration or an evaluation | ddpo | 2 | 1 |\n" in text and "old" not in text
    assert text.startswith("above\n<!-- table -->\n") and text.endswith("\n<!-- /table -->\nbelow\n")


@pytest.mark.slow  # some fifteen runs
def test_a_small_campaign(tmp_path):
    line = [
        sys.executable,
        str(ROOT / "tools" / "faults" / "fault_campaign.py"),
        "--kills=3",
        "--damages=1",
        "--seed=1",
    ]
    done = subprocess.run([*line, f"--out={tmp_path / 'r.json'}"], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{(tmp_path / 'r.json').read_text()}"
    found = json.loads((tmp_path / "r.json").read_text())
    assert len(found["kills"]) >= 3 and len(found["damages"]) == 15
