"""The measured trace: the times that lanes noted, as the rows a prediction has too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from slidetune.schedule import GPU, Schedule
from slidetune.trace import TraceRow

# Waits shorter than this are the interpreter's own cost.
_WAIT_S = 1e-4


class Recorded(NamedTuple):
    """A step's number, and start and end of each of its tasks."""

    step: int
    times: list[tuple]


def trace_rows(schedule: Schedule, steps: Sequence[Recorded]) -> list[TraceRow]:
    """The rows of finished steps in a row, one a task.

    Times are seconds from the end of the step before on the GPU; in the first step, from its first task's start.
    """
    lanes = {lane: tasks for lane, tasks in schedule.lane_tasks().items() if tasks}
    rows: list[TraceRow] = []
    previous = None
    for number, times in steps:
        zero = min(start for start, _ in times)
        if previous is not None:
            zero = max(previous[task][1] for task in lanes[GPU])
        for lane, tasks in lanes.items():
            ready = previous[tasks[-1]][1] if previous is not None else zero
            for index in tasks:
                task, (start, end) = schedule.tasks[index], times[index]
                rows.append(
                    TraceRow(
                        step=number,
                        op=task.work.op,
                        unit=task.unit,
                        micro_batch=task.micro_batch,
                        chunk=task.chunk,
                        lane=lane,
                        start_s=start - zero,
                        end_s=end - zero,
                        bytes=task.work.bytes,
                        flops=task.work.flops,
                        task=index,
                        ready_s=min(ready, start) - zero,
                        blocked_by=_blocker(schedule, index, ready, start, times, previous),
                    )
                )
                ready = end
        previous = times
    return rows


def _blocker(schedule: Schedule, index: int, ready: float, start: float, times: list, previous: list | None) -> int:
    """The task waited for last, -1 if there was nothing to wait for."""
    if start - ready < _WAIT_S:
        return -1
    task = schedule.tasks[index]
    ends = [(times[dep][1], dep) for dep in task.after]
    if previous is not None:
        ends += [(previous[dep][1], dep) for dep in task.after_previous]
    last = max(ends, default=(ready, -1))
    return last[1] if last[0] > ready else -1
