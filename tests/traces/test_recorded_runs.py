"""The runs recorded on the H200 machine, predicted again from their profiles alone: what predictions are worth.

Which runs are in the folder is not chosen: the whole grid, outliers too.
"""

from pathlib import Path

import pytest

from slidetune.validating import validate_recorded

RECORDED = Path(__file__).parents[2] / "traces" / "recorded"

pytestmark = pytest.mark.skipif(
    not any(RECORDED.glob("*.json.gz")), reason="no runs are recorded in traces/recorded yet"
)


@pytest.fixture(scope="module")
def summary():
    return validate_recorded(RECORDED)


def test_there_are_enough_runs_and_all_can_be_compared_in_full(summary):
    assert len(summary.runs) >= 24
    assert {run.run.name for run in summary.runs if not run.rows} == set()


def test_step_time(summary):
    errors = {run.run.name: f"{run.step.error:+.1%}" for run in summary.runs}
    assert summary.step_time.median <= 0.03, errors
    assert summary.step_time.p95 <= 0.08, errors


def test_gpu_memory(summary):
    found = summary.memory("gpu")
    errors = {run.run.name: run.memory["gpu"].error for run in summary.runs}
    assert found.runs == len(summary.runs)
    assert max(found.median, found.p95) <= 0.02, errors


def test_ram(summary):
    found = summary.memory("ram")
    errors = {run.run.name: run.memory["ram"].error for run in summary.runs}
    assert found.runs == len(summary.runs)
    assert max(found.median, found.p95) <= 0.03, errors
