"""The notebook of the quick start runs, and its outputs are those of its cells."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the extra test is not installed")
nbclient = pytest.importorskip("nbclient", reason="the extra test is not installed")
pytest.importorskip("ipykernel", reason="the extra test is not installed")

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "quickstart.ipynb"


def cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows: its pictures and texts, each once, without warnings and progress."""
    shown = [sorted(each.get("data", {})) or [each.get("name", "")] for each in cell.outputs]
    return {" ".join(names) for names in shown} - {"stderr"}


@pytest.mark.long
def test_it_runs_and_shows_what_it_is_saved_with(tmp_path):
    saved = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(saved)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    for cell in cells(fresh):
        cell.outputs = []
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(fresh, timeout=900, resources=resources).execute()
    for number, (one, other) in enumerate(zip(cells(saved), cells(fresh), strict=True), 1):
        assert one.execution_count == other.execution_count == number
        assert kinds(one) == kinds(other), other.source


def test_it_is_small_and_tells_nothing_of_the_machine_it_ran_on():
    text = NOTEBOOK.read_text()
    assert len(text) < 300_000
    assert not re.search(r"/(root|home|tmp|work|opt)/", text)
