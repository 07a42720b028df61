"""Every notebook runs from top to bottom."""

import json
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RECORDED = ROOT / "traces" / "recorded"
# Notebooks that look at recorded runs.
LOOK_AT_RUNS = ("02_validate",)
TRAINS = "03_finetune"
# Behind the last cell of the notebook that trains: what it has found.
FOUND = """
import json

said = [ask("exported", *talk) for talk in talks]
print(json.dumps([first, last, same_losses, same_weights, [talk[-1] in asked for talk in talks], said]))
"""


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.fixture
def folder(tmp_path):
    """A folder in which notebooks find what lies beside theirs, and may write."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "data").symlink_to(ROOT / "notebooks" / "data")
    (tmp_path / "traces").symlink_to(ROOT / "traces")
    return tmp_path / "notebooks"


def run(notebook, folder):
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert pictures, "a notebook shows pictures"


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem != TRAINS], ids=lambda path: path.stem)
def test_runs(path, folder):
    if path.stem in LOOK_AT_RUNS and not any(RECORDED.glob("*.json.gz")):
        pytest.skip("no runs are recorded in traces/recorded yet")
    run(nbformat.read(path, as_version=4), folder)


@pytest.mark.timeout(600)
def test_a_model_is_trained_and_answers(folder):
    """From rows to answers, with a stop on the way that changes nothing."""
    pytest.importorskip("transformers")
    notebook = nbformat.read(ROOT / "notebooks" / f"{TRAINS}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(FOUND))
    run(notebook, folder)
    first, last, same_losses, same_weights, in_the_data, said = json.loads(notebook.cells[-1].outputs[0].text)
    assert last < 0.1 * first
    assert same_losses
    assert same_weights
    assert in_the_data == [True, False, False, True]
    facts = ("nine in the morning", "three films", "1884", "ten to two")
    assert [fact for fact, answer in zip(facts, said, strict=True) if fact not in answer] == []
