import gzip
import json
from collections import defaultdict
from itertools import pairwise

import pytest

from slidetune.schedule import Schedule, Task, Work
from slidetune.trace import TraceRow, to_frame
from slidetune.traces.perfetto import TraceProcess, document, perfetto, write_trace
from slidetune.units import GIB


def slices(events, pid=1):
    """Every track's X events, in order."""
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X" and event["pid"] == pid:
            tracks[event["tid"]].append(event)
    return {tid: sorted(track, key=lambda e: e["ts"]) for tid, track in tracks.items()}


def track_names(events, pid=1):
    return {
        e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name" and e["pid"] == pid
    }


@pytest.fixture(scope="module")
def events(spilled):
    made = perfetto(spilled.trace, spilled.schedule, spilled.step_s, memory=spilled.memory)
    return json.loads(json.dumps(made, allow_nan=False))["traceEvents"]


def test_events_of_a_track_never_overlap_and_are_whole_microseconds(events):
    for track in slices(events).values():
        for one, following in pairwise(track):
            assert one["ts"] + one["dur"] <= following["ts"]
        assert all(isinstance(e["ts"], int) and e["ts"] >= 0 and e["dur"] >= 1 for e in track)


def test_tracks_are_lanes_in_the_order_of_the_step(events):
    names = track_names(events)
    assert [names[tid] for tid in sorted(names)] == [
        *("steps", "GPU", "uploads", "downloads", "CPU", "NVMe reads", "NVMe writes")
    ]
    order = {e["tid"]: e["args"]["sort_index"] for e in events if e["name"] == "thread_sort_index"}
    assert sorted(order, key=order.get) == sorted(names)


def test_every_task_is_there_twice_one_step_apart(events, spilled):
    tasks = [e for tid, track in slices(events).items() if tid for e in track]
    assert len(tasks) == 2 * len(spilled.trace)
    first, second = (e for e in tasks if e["name"] == "backward layer 12 mb 3")
    assert second["ts"] - first["ts"] == pytest.approx(spilled.step_s * 1e6, abs=2)


def test_a_steady_step_is_marked(events, spilled):
    steps = slices(events)[0]
    assert [e["name"] for e in steps] == ["step 0", "step 1"]
    assert steps[0]["dur"] == pytest.approx(spilled.step_s * 1e6, abs=1)
    assert steps[0]["args"]["tokens/s"] == pytest.approx(spilled.tokens_per_s, abs=0.1)


def test_arguments_say_what_a_task_moved_how_fast_and_what_it_waited_for(events, spilled):
    row = next(r for r in spilled.trace if r.op == "fetch" and r.unit == 5)
    event = next(e for e in events if e["name"] == "fetch layer 5")
    assert event["args"]["bytes"] == row.bytes
    assert event["args"]["GB/s"] == pytest.approx(row.bytes / (row.end_s - row.start_s) / 1e9, abs=1e-3)
    backward = next(e for e in events if e["name"].startswith("backward layer 5"))
    assert backward["args"]["TFLOP/s"] > 10
    waited = [r for r in spilled.trace if r.blocked_by >= 0 and r.start_s > r.ready_s]
    drawn = [e for e in events if e["ph"] == "X" and "waited for" in e["args"]]
    assert len(drawn) == 2 * len(waited)
    assert all(e["args"]["waited ms"] >= 0 for e in drawn)


def test_arrows_are_paired_join_two_lanes_and_bind_to_open_slices(events):
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == sum(e["ph"] == "s" for e in events) > 100
    tracks = slices(events)
    for number, start in starts.items():
        end = ends[number]
        assert end["bp"] == "e"
        assert start["tid"] != end["tid"]
        assert start["ts"] <= end["ts"]
        for point in (start, end):
            assert any(e["ts"] <= point["ts"] < e["ts"] + e["dur"] for e in tracks[point["tid"]])


def test_arrows_end_at_a_task_that_names_the_dependency(events, spilled):
    """The upload of a layer's weights points at its first forward."""
    at = {(e["tid"], e["ts"]): e["name"] for track in slices(events).values() for e in track}
    into = {e["id"]: at[e["tid"], e["ts"]] for e in events if e["ph"] == "f"}
    fetch = next(e for e in events if e["name"] == "fetch layer 7")
    leaving = [e["id"] for e in events if e["ph"] == "s" and e["ts"] == fetch["ts"] + fetch["dur"] - 1]
    assert "forward layer 7 mb 0" in {into[number] for number in leaving}


def test_counters_follow_memory_in_gib(events, spilled):
    gpu = [e for e in events if e["ph"] == "C" and e["name"] == "GPU memory GiB"]
    assert max(e["args"]["allocated"] for e in gpu) == pytest.approx(spilled.memory["gpu"].peak_bytes / GIB, abs=1e-3)
    assert all(e["args"]["in use"] <= e["args"]["allocated"] for e in gpu)
    assert [e["ts"] for e in gpu] == sorted(e["ts"] for e in gpu)


def test_predicted_and_measured_stand_in_one_file(plain, tmp_path):
    slower = [r._replace(start_s=r.start_s * 1.1, end_s=r.end_s * 1.1) for r in plain.trace]
    two = [
        TraceProcess(name="predicted", rows=plain.trace, schedule=plain.schedule, step_s=plain.step_s),
        TraceProcess(name="measured", rows=slower, schedule=plain.schedule, step_s=plain.step_s * 1.1, repeat=1),
    ]
    path = write_trace(tmp_path / "both.json.gz", *two)
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"predicted", "measured"}
    assert len(slices(events, 1)[1]) == 2 * len(slices(events, 2)[1])
    ids = [e["id"] for e in events if e["ph"] == "s"]
    assert len(ids) == len(set(ids))
    assert path.read_bytes() == write_trace(tmp_path / "again.json.gz", *two).read_bytes()


def test_a_frame_does_as_well_as_rows(plain):
    frame = perfetto(to_frame(plain.trace), plain.schedule, plain.step_s)
    assert json.dumps(frame) == json.dumps(perfetto(plain.trace, plain.schedule, plain.step_s))


def test_tasks_shorter_than_a_microsecond_still_follow_one_another():
    work = Work(op="adam", lane="cpu_adam", params=1)
    schedule = Schedule(
        name="tiny",
        lanes=("cpu_adam",),
        tasks=tuple(Task(work, 1, -1, i, ()) for i in range(5)),
        pools=(),
        holds=(),
        tokens=1,
    )
    rows = [
        TraceRow(0, "adam", 1, -1, i, "cpu_adam", i * 2e-7 - 1e-6, i * 2e-7 + 2e-7 - 1e-6, 0, 0.0, i, 0.0, -1)
        for i in range(5)
    ]
    made = document([TraceProcess(name="measured", rows=rows, schedule=schedule, step_s=1e-3, repeat=1)])
    track = slices(made["traceEvents"])[1]
    assert [e["ts"] for e in track] == [0, 1, 2, 3, 4]
    assert [e["dur"] for e in track] == [1] * 5


def test_88_layers_stay_openable(deep, tmp_path):
    process = TraceProcess(name="predicted", rows=deep.trace, schedule=deep.schedule, step_s=deep.step_s)
    assert write_trace(tmp_path / "deep.json.gz", process).stat().st_size < 2e6
