"""The runs recorded on the H200 machine, predicted again from their profiles alone: what predictions are worth.

Which runs are in the folder is not chosen: the whole grid, outliers too. Limits that the recorded grid does not keep
are marked as failing, strictly: once it keeps them the mark has to go. benchmarks/results/validation_h200.md has each
run's figures, and why the far ones are off.
"""

from itertools import groupby
from pathlib import Path

import pytest

from slidetune.validating import validate_recorded

RECORDED = Path(__file__).parents[2] / "traces" / "recorded"
# The tuner's own plans, where other plans were recorded for the same work.
TUNED = {"llama-3.1-8b-b8-s1024-liger-24gib", "qwen3-4b-b8-s1024-liger-24gib", "1b-b8-s1024"}

pytestmark = pytest.mark.skipif(
    not any(RECORDED.glob("*.json.gz")), reason="no runs are recorded in traces/recorded yet"
)


@pytest.fixture(scope="module")
def summary():
    return validate_recorded(RECORDED)


def test_there_are_enough_runs_and_all_can_be_compared_in_full(summary):
    assert len(summary.runs) >= 24
    assert {run.run.name for run in summary.runs if not run.rows} == set()


def test_step_time_median(summary):
    assert summary.step_time.median <= 0.03, step_errors(summary)


@pytest.mark.xfail(
    strict=True,
    reason="the 95th percentile is 15.0 %: shared hosts' memory and drives, up to 25 % faster than profiled",
)
def test_step_time_p95(summary):
    assert summary.step_time.p95 <= 0.08, step_errors(summary)


def test_steps_that_the_gpu_limits(summary):
    """Of those the profile is nearly right: no Adam comes in between."""
    errors = {
        run.run.name: run.step.error
        for run in summary.runs
        if run.run.measured.median_step_s > 1.5 * max(run.lanes["cpu_adam"].measured, 1e-9)
        and run.run.plan.micro_batch * run.run.plan.seq_len >= 32768
    }
    assert len(errors) >= 6
    assert max(map(abs, errors.values())) <= 0.03, errors


def test_gpu_memory(summary):
    found = summary.memory("gpu")
    errors = {run.run.name: run.memory["gpu"].error for run in summary.runs}
    assert found.runs == len(summary.runs)
    assert max(found.median, found.p95) <= 0.02, errors


def test_page_locked_memory_is_exact(summary):
    errors = {run.run.name: run.memory["page_locked"].error for run in summary.runs}
    assert {name for name, error in errors.items() if error} == set(), errors


def test_ram(summary):
    found = summary.memory("ram")
    errors = {run.run.name: run.memory["ram"].error for run in summary.runs}
    assert found.runs == len(summary.runs)
    assert max(found.median, found.p95) <= 0.03, errors


def test_the_tuner_picks_a_plan_within_3_percent_of_the_best_measured(summary):
    ranked = 0
    for _, same in groupby(sorted(summary.runs, key=workload), key=workload):
        steps = {run.run.name: run.step.measured for run in same}
        if len(steps) == 1:
            continue
        (pick,) = TUNED & steps.keys()
        assert steps[pick] <= 1.03 * min(steps.values()), steps
        ranked += 1
    assert ranked == len(TUNED)


def step_errors(summary):
    return {run.run.name: f"{run.step.error:+.1%}" for run in summary.runs}


def workload(run):
    """What a step has to do, where, and on how much of the GPU; 0 where it is not limited."""
    plan = run.run.plan
    return (
        run.run.profile,
        plan.model,
        plan.batch,
        plan.seq_len,
        run.run.kernels,
        plan.clip_norm or 0,
        plan.gpu_memory_gib or 0,
    )
