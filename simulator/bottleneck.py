"""Where the time goes: what each lane did, what it waited for, and the chain of tasks that made the step."""

from __future__ import annotations

from dataclasses import dataclass, field

from slidetune.schedule import Schedule
from slidetune.simulator.engine import Executed, Run


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneShare:
    """How one lane spent a steady step; busy + waiting + idle is the step. Seconds."""

    busy_s: float
    alone_s: float
    """What the same tasks take with the machine to themselves: the rest of busy_s is contention."""
    waiting_s: dict[str, float] = field(default_factory=dict)
    """Time during which a task it needed was running, by that task's lane."""
    idle_s: float = 0.0
    """Time during which what it needed had not started either."""


def steady(run: Run) -> list[Executed]:
    """The tasks of the last whole step."""
    step = len(run.boundaries) - 1
    return [task for task in run.executed if task.step == step]


def lane_shares(schedule: Schedule, run: Run, alone_s: dict[int, float]) -> dict[str, LaneShare]:
    """Every lane's share of the steady step. `alone_s` gives a task's duration alone, by task index."""
    executed = steady(run)
    by_task = {task.task: task for task in executed}
    lanes: dict[str, list[Executed]] = {}
    for task in executed:
        lanes.setdefault(schedule.tasks[task.task].work.lane, []).append(task)
    shares = {}
    for lane, tasks in lanes.items():
        busy = sum(task.end_s - task.start_s for task in tasks)
        waiting: dict[str, float] = {}
        for task in tasks:
            if task.blocked_by < 0 or task.start_s <= task.ready_s:
                continue
            blocker = by_task[task.blocked_by]
            began = blocker.start_s
            if blocker.end_s > task.start_s + 1e-9:
                began -= run.step_s  # It was the blocker of the step before.
            running = task.start_s - max(task.ready_s, began)
            name = schedule.tasks[task.blocked_by].work.lane
            waiting[name] = waiting.get(name, 0.0) + max(0.0, running)
        alone = sum(alone_s[task.task] for task in tasks)
        idle = max(0.0, run.step_s - busy - sum(waiting.values()))
        shares[lane] = LaneShare(
            busy_s=busy,
            alone_s=alone,
            waiting_s=dict(sorted(waiting.items(), key=lambda item: -item[1])),
            idle_s=idle,
        )
    return {lane: shares[lane] for lane in schedule.lanes if lane in shares}


def critical_path(schedule: Schedule, run: Run) -> list[tuple[int, float]]:
    """The chain of tasks that the step's end waited for, last first: (task index, seconds on the path).

    From the GPU's last task back, each task began when the one it waited for ended, or, if it waited for
    none, when the one before it on its lane did. The path covers one step.
    """
    order = {lane: tasks for lane, tasks in schedule.lane_tasks().items() if tasks}
    place = {task: (lane, i) for lane, tasks in order.items() for i, task in enumerate(tasks)}
    by_key = {(task.step, task.task): task for task in run.executed}
    step = len(run.boundaries) - 1
    key = (step, order["gpu"][-1])
    end = run.boundaries[-1]
    begin = end - run.step_s
    path: list[tuple[int, float]] = []
    while key in by_key and end > begin + 1e-12:
        now = by_key[key]
        path.append((now.task, min(now.end_s, end) - max(now.start_s, begin)))
        end = now.start_s
        if now.blocked_by >= 0 and now.start_s > now.ready_s:
            # A dependency on a later task of the order is one on the step before.
            earlier = now.blocked_by > now.task
            key = (now.step - earlier, now.blocked_by)
        else:
            lane, i = place[now.task]
            key = (now.step, order[lane][i - 1]) if i else (now.step - 1, order[lane][-1])
    return [(task, seconds) for task, seconds in path if seconds > 0]
