"""A prediction beside what was measured: the step, each lane, each kind of task, each tier's peak.

An error is predicted / measured - 1: -0.05 says that the prediction is 5 % too short, or too small. Errors of
several runs are summed up by their absolute values, so that they can't cancel.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from slidetune import files
from slidetune.buffers import WORKSPACES
from slidetune.process_memory import process_bytes
from slidetune.trace import TraceRow, to_frame
from slidetune.traces.recorded import RecordedRun

MEMORY = ("gpu", "page_locked", "ram", "nvme_written")
"""What of memory is compared: peaks in bytes, and the bytes written to the drive a step."""


@dataclass(frozen=True, slots=True)
class Beside:
    """One quantity, predicted and measured, in one unit."""

    predicted: float
    measured: float | None
    """None where it can't be measured, as GPU memory without a GPU."""

    @property
    def error(self) -> float | None:
        """predicted / measured - 1; None where nothing was measured, or nothing there."""
        return self.predicted / self.measured - 1.0 if self.measured else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """All tasks of one operation on one lane, seconds a step."""

    lane: str
    op: str
    tasks: int
    beside: Beside
    absolute_error: float | None
    """Sum of the tasks' absolute errors over the measured sum: what a signed sum averages away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """One run and its prediction."""

    prediction: Any
    run: RecordedRun
    rows: Sequence[TraceRow]
    """The typical measured step; empty where its tasks are not the prediction's any more."""
    step: Beside
    """Seconds; measured is the median of the steady steps."""
    lanes: dict[str, Beside]
    """Busy seconds a step."""
    kinds: Sequence[Kind]
    """The longest first."""
    memory: dict[str, Beside]
    """By the names in MEMORY, bytes."""
    adam_alone: Beside | None = None
    """Seconds of a step's CPU Adam on layers in RAM with nothing beside: an error says that the machine's memory is not
    as fast, then and there, as when it was profiled."""
    notes: tuple[str, ...] = ()

    @property
    def typical_step_s(self) -> float:
        """Length of the step that `rows` trace: when its GPU ends."""
        return max((row.end_s for row in self.rows if row.lane == "gpu"), default=self.step.measured)

    def as_dict(self) -> dict[str, object]:
        """Everything a program may want, in plain values. Times in seconds a step, sizes in bytes."""
        plan, tokens = self.run.plan, self.run.plan.tokens
        return {
            "name": self.run.name,
            "model": plan.model,
            "batch": plan.batch,
            "seq_len": plan.seq_len,
            "device": self.run.device,
            "kernels": self.run.kernels,
            "date": self.run.date,
            "step_time": _plain(self.step, "s"),
            "tokens_per_s": {"predicted": tokens / self.step.predicted, "measured": tokens / self.step.measured},
            "step_s": list(self.run.measured.step_s),
            "losses": list(self.run.measured.losses),
            "lanes": {lane: _plain(beside, "s") for lane, beside in self.lanes.items()},
            "adam_alone": None if self.adam_alone is None else _plain(self.adam_alone, "s"),
            "kinds": [
                {"lane": kind.lane, "op": kind.op, "tasks": kind.tasks}
                | _plain(kind.beside, "s")
                | {"absolute_error": kind.absolute_error}
                for kind in self.kinds
            ],
            "memory": {name: _plain(beside, "bytes") for name, beside in self.memory.items()},
            "machine": self.run.machine,
            "versions": self.run.versions,
            "plan": files.dump(plan),
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Spread:
    """Absolute errors of several runs."""

    median: float
    p95: float
    """95th percentile, between the two nearest errors in proportion."""
    worst: float
    runs: int


@dataclass(frozen=True, slots=True)
class Summary:
    """How far the predictions of several runs are off."""

    runs: Sequence[Validation]

    @property
    def step_time(self) -> Spread | None:
        return spread(run.step.error for run in self.runs)

    def lane(self, lane: str) -> Spread | None:
        return spread(run.lanes[lane].error for run in self.runs if lane in run.lanes)

    def memory(self, name: str) -> Spread | None:
        return spread(run.memory[name].error for run in self.runs)

    @property
    def lanes(self) -> list[str]:
        """Lanes that any of the runs used."""
        return list(dict.fromkeys(lane for run in self.runs for lane in run.lanes))

    def as_dict(self) -> dict[str, object]:
        named = {"gpu": "gpu_peak_error", "page_locked": "page_locked_error", "ram": "ram_error"}
        named["nvme_written"] = "nvme_written_error"
        runs = [run.as_dict() | {"step_time_error": run.step.error} for run in self.runs]
        # Kinds and plans are in the recorded files; here they would bury the rest.
        return {
            "runs": [{key: value for key, value in run.items() if key not in ("kinds", "plan")} for run in runs],
            "step_time_error": _spread_dict(self.step_time),
            **{key: _spread_dict(self.memory(name)) for name, key in named.items()},
            "lane_errors": {lane: _spread_dict(self.lane(lane)) for lane in self.lanes},
        }


def compare_run(prediction: Any, run: RecordedRun, rows: Sequence[TraceRow], notes: Iterable[str] = ()) -> Validation:
    """Put a prediction beside a run. `rows` is the run's typical step, or nothing to leave lanes out."""
    measured = run.measured
    kinds = _kinds(prediction.trace, rows) if rows else []
    return Validation(
        prediction=prediction,
        run=run,
        rows=rows,
        step=Beside(prediction.step_s, measured.median_step_s),
        lanes=_lanes(prediction, rows) if rows else {},
        kinds=kinds,
        memory=_memory(prediction, run),
        adam_alone=None if measured.adam_alone_s is None else Beside(prediction.adam_alone_s, measured.adam_alone_s),
        notes=tuple(notes),
    )


def spread(errors: Iterable[float | None]) -> Spread | None:
    """Median, 95th percentile and worst of the errors' absolute values; None where there are none."""
    found = sorted(abs(error) for error in errors if error is not None)
    if not found:
        return None
    at = 0.95 * (len(found) - 1)
    below, above = found[math.floor(at)], found[math.ceil(at)]
    return Spread(statistics.median(found), below + (above - below) * (at % 1), found[-1], len(found))


def busy_s(rows: Iterable[TraceRow]) -> dict[str, float]:
    """Seconds of tasks by lane."""
    busy: dict[str, float] = {}
    for row in rows:
        busy[row.lane] = busy.get(row.lane, 0.0) + row.end_s - row.start_s
    return busy


def _lanes(prediction: Any, rows: Sequence[TraceRow]) -> dict[str, Beside]:
    foreseen, found = busy_s(prediction.trace), busy_s(rows)
    return {lane: Beside(foreseen[lane], found[lane]) for lane in prediction.schedule.lanes if lane in foreseen}


def _kinds(predicted: Sequence[TraceRow], measured: Sequence[TraceRow]) -> list[Kind]:
    from slidetune.traces.compare import by_kind, compare

    table = by_kind(compare(to_frame(list(predicted)), to_frame(list(measured))))
    return [
        Kind(
            lane=row.lane,
            op=row.op,
            tasks=row.tasks,
            beside=Beside(row.predicted_s, row.measured_s),
            absolute_error=None if math.isnan(row.absolute_error) else row.absolute_error,
        )
        for row in table.itertuples(index=False)
    ]


def _memory(prediction: Any, run: RecordedRun) -> dict[str, Beside]:
    schedule, tiers = prediction.schedule, prediction.memory
    on_gpu = tiers["gpu"].peak_bytes
    # On the CPU the device's memory is RAM too.
    workspaces = sum(pool.bytes for pool in schedule.pools_of("gpu") if pool.name == WORKSPACES)
    in_ram = tiers["ram"].peak_bytes + (on_gpu - workspaces if run.device == "cpu" else 0)
    predicted = {
        "gpu": on_gpu,
        "page_locked": sum(pool.bytes for pool in schedule.pools_of("ram") if pool.page_locked),
        "ram": in_ram + process_bytes(run.device),
        "nvme_written": prediction.nvme_written_bytes,
    }
    measured = {**run.measured.peak_bytes, "nvme_written": run.measured.nvme_written_bytes}
    return {name: Beside(predicted[name], measured.get(name)) for name in MEMORY}


def _plain(beside: Beside, unit: str) -> dict[str, float | None]:
    return {f"predicted_{unit}": beside.predicted, f"measured_{unit}": beside.measured, "error": beside.error}


def _spread_dict(found: Spread | None) -> dict[str, float] | None:
    if found is None:
        return None
    return {"median": found.median, "p95": found.p95, "worst": found.worst, "runs": found.runs}
