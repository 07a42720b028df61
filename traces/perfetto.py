"""Traces as Chrome JSON, which ui.perfetto.dev opens.

A process is one trace ("predicted", "measured"), a thread one lane, an arrow a dependency between lanes. Both
traces of a plan can stand in one file, on one time axis.

Perfetto wants the events of a track to nest, and reads times as floating-point microseconds which it cuts to
nanoseconds; so times here are whole microseconds and an event never begins before its predecessor's end. That
moves an event by a microsecond at most, unless tasks are shorter than that.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slidetune.schedule import LANES
from slidetune.trace import TraceRow
from slidetune.traces.labels import TIER_LABELS, head_unit, lane_label, task_label, unit_label
from slidetune.units import GB, GIB

if TYPE_CHECKING:
    import pandas as pd

    from slidetune.schedule import Schedule
    from slidetune.simulator.memory import TierMemory

Event = dict[str, Any]

_STEPS_TRACK = 0
_MICROSECONDS = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceProcess:
    """One trace of a schedule, to be drawn as one process. Times in seconds."""

    name: str
    rows: Sequence[TraceRow]
    schedule: Schedule
    step_s: float
    memory: Mapping[str, TierMemory] = field(default_factory=dict)
    """Memory over a step, by tier, for the counters."""
    repeat: int | None = None
    """How often the rows are laid down, step_s apart. None: twice if they hold one step, so that one sees
    how a steady step overlaps the next; else once."""


def perfetto(
    rows: Sequence[TraceRow] | pd.DataFrame,
    schedule: Schedule,
    step_s: float,
    *,
    process: str = "predicted",
    memory: Mapping[str, TierMemory] | None = None,
    repeat: int | None = None,
) -> dict[str, Any]:
    """One trace as a Chrome JSON object. `rows` and `step_s` in seconds; `memory` adds counters in GiB."""
    return document(
        [
            TraceProcess(
                name=process,
                rows=as_rows(rows),
                schedule=schedule,
                step_s=step_s,
                memory=memory or {},
                repeat=repeat,
            )
        ]
    )


def document(processes: Iterable[TraceProcess]) -> dict[str, Any]:
    """Several traces as one Chrome JSON object, all on the same time axis."""
    processes = list(processes)
    # Perfetto hides what lies before 0, and lanes that run ahead of the GPU would be cut off.
    origin = min((row.start_s for process in processes for row in process.rows), default=0.0)
    origin = min(origin, 0.0)
    events: list[Event] = []
    arrows = 0
    for pid, process in enumerate(processes, start=1):
        drawing = _Drawing(process, pid, origin)
        flows = list(drawing.flows(first_id=arrows + 1))
        arrows += len(flows) // 2
        # Arrows come last: their ends bind to the slice already open at that moment.
        events += [*drawing.metadata(), *drawing.step_marks(), *drawing.tasks(), *drawing.counters(), *flows]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(path: str | Path, *processes: TraceProcess) -> Path:
    """Write traces to one file for ui.perfetto.dev; compressed if its name ends with .gz."""
    path = Path(path)
    text = json.dumps(document(processes), separators=(",", ":"), allow_nan=False)
    if path.suffix == ".gz":
        # No time stamp inside: the same trace gives the same file.
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def as_rows(rows: Sequence[TraceRow] | pd.DataFrame) -> list[TraceRow]:
    """Rows from a list or from a DataFrame with their columns."""
    if hasattr(rows, "itertuples"):
        return [TraceRow(*row) for row in rows[list(TraceRow._fields)].itertuples(index=False, name=None)]
    return list(rows)


class _Slice(NamedTuple):
    """A task on its lane's track, in whole microseconds."""

    row: TraceRow
    step: int
    tid: int
    ts: int
    end: int


class _Drawing:
    """One process on its way to events."""

    def __init__(self, process: TraceProcess, pid: int, origin_s: float) -> None:
        self.process = process
        self.schedule = process.schedule
        self.pid = pid
        self.origin_s = origin_s
        self.head = head_unit(process.schedule)
        steps = {row.step for row in process.rows}
        self.first_step = min(steps, default=0)
        self.repeat = process.repeat or (2 if len(steps) == 1 else 1)
        self.step_count = (max(steps) - self.first_step if steps else 0) + self.repeat
        self.tids = self._tracks({row.lane for row in process.rows})
        self.slices = self._slices()

    def _tracks(self, used: set[str]) -> dict[str, int]:
        """Track numbers of the lanes that have tasks, in the order data flows through a step."""
        known = [*LANES, *(lane for lane in self.schedule.lanes if lane not in LANES)]
        order = [lane for lane in known if lane in used] + sorted(used.difference(known))
        return {lane: tid for tid, lane in enumerate(order, start=_STEPS_TRACK + 1)}

    def _slices(self) -> list[_Slice]:
        placed = sorted(
            (
                (row.start_s + again * self.process.step_s, row, again)
                for again in range(self.repeat)
                for row in self.process.rows
            ),
            key=lambda entry: (entry[0], entry[2], entry[1].task),
        )
        free = dict.fromkeys(self.tids.values(), 0)
        slices = []
        for start_s, row, again in placed:
            tid = self.tids[row.lane]
            ts = max(self._microseconds(start_s), free[tid])
            end = max(self._microseconds(start_s + row.end_s - row.start_s), ts + 1)
            free[tid] = end
            slices.append(_Slice(row, row.step - self.first_step + again, tid, ts, end))
        return slices

    def _microseconds(self, seconds: float) -> int:
        return round((seconds - self.origin_s) * _MICROSECONDS)

    def _event(self, kind: str, tid: int, name: str, **more: Any) -> Event:
        return {"ph": kind, "pid": self.pid, "tid": tid, "name": name, **more}

    def metadata(self) -> Iterator[Event]:
        """Names of the process and its tracks, and their order."""
        yield self._event("M", 0, "process_name", args={"name": self.process.name})
        yield self._event("M", 0, "process_sort_index", args={"sort_index": self.pid})
        tracks = {_STEPS_TRACK: "steps"} | {tid: lane_label(lane) for lane, tid in self.tids.items()}
        for tid, name in tracks.items():
            yield self._event("M", tid, "thread_name", args={"name": name})
            yield self._event("M", tid, "thread_sort_index", args={"sort_index": tid})

    def step_marks(self) -> Iterator[Event]:
        """A track that says where each step begins and ends on the GPU."""
        tokens = self.schedule.tokens
        for step in range(self.step_count):
            ts = self._microseconds(step * self.process.step_s)
            end = self._microseconds((step + 1) * self.process.step_s)
            facts = {"tokens": tokens, "tokens/s": round(tokens / self.process.step_s, 1)}
            yield self._event("X", _STEPS_TRACK, f"step {step}", cat="step", ts=ts, dur=end - ts, args=facts)

    def tasks(self) -> Iterator[Event]:
        for row, step, tid, ts, end in self.slices:
            yield self._event(
                "X", tid, self._name(row), cat=row.op, ts=ts, dur=end - ts, args=self._arguments(row, step)
            )

    def _name(self, row: TraceRow) -> str:
        return task_label(row.op, row.unit, row.micro_batch, row.chunk, self.head)

    def _arguments(self, row: TraceRow, step: int) -> dict[str, Any]:
        """What a reader wants to know about a task; what doesn't apply is left out."""
        seconds = row.end_s - row.start_s
        facts: dict[str, Any] = {"op": row.op, "unit": unit_label(row.unit, self.head), "step": step}
        if row.micro_batch >= 0:
            facts["micro_batch"] = row.micro_batch
        if row.chunk >= 0:
            facts["chunk"] = row.chunk
        amounts = (("bytes", row.bytes, "GB/s", GB), ("flops", row.flops, "TFLOP/s", 1e12))
        params = self.schedule.tasks[row.task].work.params if row.task >= 0 else 0
        for name, amount, rate, unit in (*amounts, ("params", params, "Gparams/s", 1e9)):
            if amount:
                facts[name] = amount
                if seconds > 0:
                    facts[rate] = round(amount / seconds / unit, 3)
        if row.blocked_by >= 0 and row.start_s > row.ready_s:
            blocker = self.schedule.tasks[row.blocked_by]
            facts["waited for"] = task_label(
                blocker.work.op, blocker.unit, blocker.micro_batch, blocker.chunk, self.head
            )
            facts["waited ms"] = round((row.start_s - row.ready_s) * 1e3, 3)
        return facts

    def counters(self) -> Iterator[Event]:
        """Memory in use and allocated, GiB, wherever it changes."""
        for tier, memory in self.process.memory.items():
            if not memory.peak_bytes:
                continue
            used = _totals(memory.in_use, len(memory.times_s))
            held = _totals(memory.allocated, len(memory.times_s))
            last = None
            for step in range(self.step_count):
                for at, now in zip(memory.times_s, zip(used, held, strict=True), strict=True):
                    if now == last:
                        continue
                    last = now
                    yield self._event(
                        "C",
                        0,
                        f"{TIER_LABELS.get(tier, tier)} GiB",
                        ts=self._microseconds(at + step * self.process.step_s),
                        args={"in use": round(now[0] / GIB, 4), "allocated": round(now[1] / GIB, 4)},
                    )

    def flows(self, first_id: int) -> Iterator[Event]:
        """Arrows from lane to lane, from the end of what was waited for to the start of what waited.

        Of several dependencies on one lane only the last is drawn: lanes run in order, so it implies the
        others.
        """
        at = {(each.step, each.row.task): each for each in self.slices}
        number = first_id
        for each in self.slices:
            if each.row.task < 0:
                continue
            task = self.schedule.tasks[each.row.task]
            latest: dict[int, _Slice] = {}
            wanted = [(each.step, index) for index in task.after]
            wanted += [(each.step - 1, index) for index in task.after_previous]
            for key in wanted:
                source = at.get(key)
                if source is None or source.tid == each.tid:
                    continue
                known = latest.get(source.tid)
                if known is None or source.ts > known.ts:
                    latest[source.tid] = source
            for source in latest.values():
                # A slice is open up to its end, not at it: leave in its last microsecond.
                leave = {
                    "cat": "dependency",
                    "id": number,
                    "ts": max(source.ts, min(source.end - 1, each.ts)),
                }
                yield self._event("s", source.tid, "dependency", **leave)
                arrive = {"cat": "dependency", "id": number, "ts": each.ts, "bp": "e"}
                yield self._event("f", each.tid, "dependency", **arrive)
                number += 1


def _totals(owners: Mapping[str, Sequence[int]], moments: int) -> list[int]:
    return [sum(values[i] for values in owners.values()) for i in range(moments)]
