"""examples/first_steps.ipynb: what it says is what it does."""

import json
import os

import pytest

from tests.conftest import ROOT

TIMES = ("before", "after")
PATH = ROOT / "examples" / "first_steps.ipynb"


def test_its_outputs_are_kept_and_small():
    notebook = json.loads(PATH.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run it again, from its top"
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert PATH.stat().st_size < 2**20


@pytest.mark.slow  # three minutes: fine-tunes
def test_it_runs(tmp_path, monkeypatch):
    """As it stands there, in an empty folder; its own words are checked against what it prints."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(PATH, 4)
    options = {"timeout": 1800, "kernel_name": "python3", "resources": {"metadata": {"path": str(tmp_path)}}}
    nbclient.NotebookClient(notebook, **options).execute()
    said = "\n".join(output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output)
    assert "p / p_old before the update: 1.000000 to 1.000000" in said
    good, bad = (
        float(line) for line in said.split("images of a good reward: ")[1].split("\n")[0].split(", of a bad one: ")
    )
    assert bad < 1 < good
    right = [int(said.split(f"{name}: animal and object are right in ")[1].split("%")[0]) for name in TIMES]
    assert right[1] > right[0]
    assert (tmp_path / "runs" / "first_steps" / "report.html").exists()
