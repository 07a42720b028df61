import math

import pytest

from slidetune.trace import TraceRow, to_frame
from slidetune.traces.compare import by_kind, compare


def row(op, unit, start, seconds, *, step=0, lane="gpu", task=0, chunk=-1):
    return TraceRow(step, op, unit, 0, chunk, lane, start, start + seconds, 0, 0.0, task, start, -1)


def test_a_trace_equals_itself(plain):
    frame = to_frame(plain.trace)
    same = compare(frame, frame)
    assert len(same) == len(plain.trace)
    assert (same["found"] == "both").all()
    assert (same["error_s"] == 0).all()
    assert (same["ratio"] == 1).all()
    kinds = by_kind(same)
    assert kinds["tasks"].sum() == len(plain.trace)
    assert (kinds["absolute_error"] == 0).all()


def test_tasks_meet_whatever_the_order_and_the_clock(plain):
    rows = [r._replace(start_s=r.start_s * 2 + 5, end_s=r.end_s * 2 + 5) for r in reversed(plain.trace)]
    table = compare(to_frame(plain.trace), to_frame(rows))
    assert table["ratio"].to_numpy() == pytest.approx(2)
    assert table["measured_start_s"].to_numpy() == pytest.approx(2 * table["predicted_start_s"].to_numpy())


def test_errors_of_opposite_sign_do_not_cancel():
    predicted = to_frame([row("forward", 1, 0, 1.2), row("forward", 2, 2, 0.8, task=1)])
    measured = to_frame([row("forward", 1, 0, 1.0), row("forward", 2, 2, 1.0, task=1)])
    kind = by_kind(compare(predicted, measured)).iloc[0]
    assert kind["error_s"] == pytest.approx(0.0)
    assert kind["absolute_error_s"] == pytest.approx(0.4)
    assert kind["absolute_error"] == pytest.approx(0.2)


def test_tasks_only_one_side_has_are_kept_and_counted():
    predicted = to_frame([row("forward", 1, 0, 1.0), row("fetch", 1, 0, 1.0, lane="h2d", task=1)])
    measured = to_frame([row("forward", 1, 0, 1.0), row("forward", 2, 1, 1.0, task=2)])
    table = compare(predicted, measured)
    assert sorted(table["found"]) == ["both", "measured", "predicted"]
    kinds = by_kind(table).set_index(["lane", "op"])
    assert kinds.loc[("gpu", "forward"), "only_measured"] == 1
    assert kinds.loc[("h2d", "fetch"), "only_predicted"] == 1
    assert kinds.loc[("h2d", "fetch"), "tasks"] == 0
    assert math.isnan(kinds.loc[("h2d", "fetch"), "error"])
    assert kinds.loc[("gpu", "forward"), "measured_s"] == 1.0


def test_tasks_of_one_name_are_told_apart_by_their_order():
    predicted = to_frame([row("fetch", 1, 0, 1.0, task=0), row("fetch", 1, 5, 3.0, task=9)])
    measured = to_frame([row("fetch", 1, 6, 3.0, task=9), row("fetch", 1, 0, 1.0, task=0)])
    table = compare(predicted, measured)
    assert table["nth"].tolist() == [0, 1]
    assert (table["error_s"] == 0).all()


def test_several_measured_steps_are_averaged():
    predicted = to_frame([row("forward", 1, 0, 1.0), row("forward", 2, 1, 1.0, task=1)])
    measured = [row("forward", 1, 10, 0.9), row("forward", 2, 12, 1.0, task=1)]
    measured += [row("forward", 1, 20, 1.3, step=1), row("forward", 2, 23, 1.0, step=1, task=1)]
    table = compare(predicted, to_frame(measured))
    assert table["measured_s"].tolist() == pytest.approx([1.1, 1.0])
    assert table["measured_start_s"].tolist() == pytest.approx([0.0, 2.5])


def test_nothing_to_compare_gives_an_empty_table_with_its_columns():
    table = by_kind(compare(to_frame([]), to_frame([])))
    assert len(table) == 0
    assert "absolute_error" in table.columns
