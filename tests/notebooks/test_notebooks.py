"""Every notebook runs from top to bottom."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RECORDED = ROOT / "traces" / "recorded"
# Notebooks that look at recorded runs.
LOOK_AT_RUNS = ("02_validate",)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.fixture
def folder(tmp_path):
    """A folder in which notebooks find what lies beside theirs, and may write."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "traces").symlink_to(ROOT / "traces")
    return tmp_path / "notebooks"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, folder):
    if path.stem in LOOK_AT_RUNS and not any(RECORDED.glob("*.json.gz")):
        pytest.skip("no runs are recorded in traces/recorded yet")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(folder)}})
    client.execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert pictures, "a notebook shows pictures"
