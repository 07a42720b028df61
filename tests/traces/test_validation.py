"""Predictions beside measurements: errors that are known, because the measurement was made of the prediction."""

import json

import pytest

from slidetune.buffers import WORKSPACE_BYTES
from slidetune.schedule import CPU_ADAM
from slidetune.simulator.pricing import PriceList
from slidetune.trace import TraceRow
from slidetune.traces import plots
from slidetune.traces.report import write_report
from slidetune.traces.validation import Beside, Summary, busy_s, compare_run, spread

from .runs import as_if_run


def stretched(prediction, factor):
    return [row._replace(start_s=factor * row.start_s, end_s=factor * row.end_s) for row in prediction.trace]


def test_a_prediction_that_came_true_has_no_error(spilled):
    found = compare_run(spilled, as_if_run(spilled), spilled.trace)
    assert found.step.error == 0
    assert all(beside.error == 0 for beside in found.lanes.values())
    assert all(beside.error == pytest.approx(0, abs=1e-12) for beside in found.memory.values())
    assert all(kind.beside.error == kind.absolute_error == 0 for kind in found.kinds)
    assert sum(kind.tasks for kind in found.kinds) == len(spilled.trace)


@pytest.mark.parametrize("factor", [0.8, 1.25, 2.0])
def test_what_takes_longer_than_predicted_was_predicted_too_short(spilled, factor):
    found = compare_run(spilled, as_if_run(spilled, stretch=factor), stretched(spilled, factor))
    assert found.step.error == pytest.approx(1 / factor - 1)
    assert found.typical_step_s == pytest.approx(factor * spilled.step_s)
    for beside in (*found.lanes.values(), *(kind.beside for kind in found.kinds)):
        assert beside.error == pytest.approx(1 / factor - 1)


def test_adam_alone_tells_a_slow_machine_from_a_wrong_model(plain):
    prices = PriceList(plain.profile)
    alone_s = sum(
        prices.price(task.work).alone_s
        for task in plain.schedule.tasks
        if task.work.lane == CPU_ADAM and task.work.op == "adam" and task.unit != 33
    )
    found = compare_run(plain, as_if_run(plain, adam_alone_s=1.25 * alone_s), plain.trace)
    assert found.adam_alone.error == pytest.approx(-0.2)
    assert found.step.error == 0
    assert found.as_dict()["adam_alone"]["error"] == found.adam_alone.error
    # As in runs recorded before it was measured.
    assert compare_run(plain, as_if_run(plain), plain.trace).as_dict()["adam_alone"] is None


def test_lanes_are_the_sums_of_their_kinds(spilled):
    found = compare_run(spilled, as_if_run(spilled), stretched(spilled, 1.1))
    for lane, beside in found.lanes.items():
        kinds = [kind.beside for kind in found.kinds if kind.lane == lane]
        assert beside.predicted == pytest.approx(sum(kind.predicted for kind in kinds))
        assert beside.measured == pytest.approx(sum(kind.measured for kind in kinds))
        assert beside.predicted == pytest.approx(spilled.lanes[lane].busy_s)


def test_what_cannot_be_measured_is_not_zero(plain):
    run = as_if_run(plain, device="cpu", peak_bytes={"ram": 10**10})
    found = compare_run(plain, run, plain.trace)
    assert found.memory["gpu"].measured is None
    assert found.memory["gpu"].error is None
    as_dict = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert as_dict["memory"]["gpu"]["measured_bytes"] is None
    # The device's memory is in RAM then.
    held = sum(plain.memory[tier].peak_bytes for tier in ("gpu", "ram"))
    # Matrix kernels' workspaces are a GPU's, and a process without CUDA is small.
    assert found.memory["ram"].predicted == pytest.approx(held - WORKSPACE_BYTES + 0.4 * 2**30)


def test_without_rows_step_and_memory_still_compare(plain):
    found = compare_run(plain, as_if_run(plain, stretch=2), (), ["another schedule"])
    assert (found.lanes, found.kinds) == ({}, [])
    assert found.step.error == pytest.approx(-0.5)
    assert found.memory["gpu"].error == 0
    assert Summary([found]).lanes == []


def test_errors_of_opposite_sign_do_not_cancel_between_runs(plain):
    runs = [compare_run(plain, as_if_run(plain, stretch=k), stretched(plain, k)) for k in (1 / 1.2, 1 / 0.8, 1.0)]
    summary = Summary(runs)
    assert summary.step_time.median == pytest.approx(0.2)
    assert summary.step_time.worst == pytest.approx(0.2)
    assert summary.lane("gpu").worst == pytest.approx(0.2)
    as_dict = json.loads(json.dumps(summary.as_dict(), allow_nan=False))
    assert [run["step_time_error"] for run in as_dict["runs"]] == pytest.approx([0.2, -0.2, 0.0])
    assert as_dict["step_time_error"]["median"] == pytest.approx(0.2)
    assert as_dict["gpu_peak_error"] == {"median": 0, "p95": 0, "worst": 0, "runs": 3}
    assert as_dict["nvme_written_error"] is None  # Nothing was written.


def test_spread():
    assert spread([None]) is None
    assert spread([-0.3]) == spread([0.3])
    found = spread([0.01 * n for n in range(101)])
    assert (found.median, found.p95, found.worst, found.runs) == pytest.approx((0.5, 0.95, 1.0, 101))
    assert spread([0.1, None, -0.2]).p95 == pytest.approx(0.195)


def test_an_error_needs_something_measured():
    assert Beside(1.0, 0.0).error is None
    assert Beside(1.0, None).error is None
    assert Beside(0.0, 2.0).error == -1.0


def test_busy_is_the_time_of_tasks_not_of_waits():
    rows = [TraceRow(0, "fetch", 1, -1, -1, "h2d", start, start + 0.5, 0, 0.0, 0, 0.0, -1) for start in (0.0, 3.0)]
    assert busy_s(rows) == {"h2d": 1.0}


def test_the_picture_has_both_steps_on_one_axis(spilled):
    found = compare_run(spilled, as_if_run(spilled, stretch=1.5), stretched(spilled, 1.5))
    above, below, bars = plots.side_by_side(found).axes
    assert above.get_xlim() == below.get_xlim() == pytest.approx((0, 1.5 * spilled.step_s))
    assert [label.get_text() for label in above.get_yticklabels()] == [t.get_text() for t in below.get_yticklabels()]
    assert "CPU: adam" in {label.get_text() for label in bars.get_yticklabels()}
    assert "-33%" in {text.get_text() for text in bars.texts}


def test_the_picture_of_thousands_of_tasks_is_made_of_few_artists(deep):
    found = compare_run(deep, as_if_run(deep), deep.trace)
    assert sum(len(ax.collections) for ax in plots.side_by_side(found).axes) < 100


def test_the_report_shows_what_was_measured_first(spilled, tmp_path):
    found = compare_run(spilled, as_if_run(spilled, stretch=1.25), stretched(spilled, 1.25), ["<note>"])
    path = write_report(tmp_path, prediction=spilled, title="t", facts=[], validation=found)
    page = path.read_text(encoding="utf-8")
    assert (tmp_path / "validation.png").exists()
    assert 0 < page.index('id="predicted-and-measured"') < page.index('id="what-limits-it"')
    assert "-20.0%" in page
    assert "&lt;note&gt;" in page


def test_the_report_of_a_run_whose_schedule_has_changed_has_no_timeline_of_it(plain, tmp_path):
    found = compare_run(plain, as_if_run(plain), (), ["another schedule"])
    write_report(tmp_path, prediction=plain, title="t", facts=[], validation=found)
    assert not (tmp_path / "validation.png").exists()
