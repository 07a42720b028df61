"""A schedule as the lanes see it: each its own tasks, and what each task waits for on other lanes.

It depends on the schedule alone, so one layout serves any number of machines.
"""

from __future__ import annotations

from functools import cached_property

from slidetune.schedule import GPU, Schedule, Work
from slidetune.simulator.repeats import Repeats

Dependency = tuple[int, int]
"""A lane's index and the position of a task on it; of the step before where negative."""


class Layout:
    """Lanes without tasks are left out; the others are numbered in the schedule's order."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        by_lane = schedule.lane_tasks()
        used = [lane for lane in schedule.lanes if by_lane[lane]]
        self.index = {lane: i for i, lane in enumerate(used)}
        """Lane name -> index."""
        self.gpu = self.index[GPU]
        self.tasks: list[list[int]] = [by_lane[lane] for lane in used]
        """Per lane, its tasks in order."""
        self.place: list[Dependency] = [(0, 0)] * len(schedule.tasks)
        """Per task, its lane and its position there."""
        for lane, tasks in enumerate(self.tasks):
            for position, task in enumerate(tasks):
                self.place[task] = (lane, position)
        self.works: list[list[Work]] = [[schedule.tasks[task].work for task in tasks] for tasks in self.tasks]
        self.waits: list[list[list[Dependency]]] = [[] for _ in used]
        """Per lane and position, what that task waits for."""
        place = self.place
        for (lane, _), (_, _, _, _, after, after_previous) in zip(place, schedule.tasks, strict=True):
            # A lane's own earlier tasks are always done first.
            waits = [there for dep in after if (there := place[dep])[0] != lane]
            for dep in after_previous:
                other, position = place[dep]
                if other != lane:
                    waits.append((other, position - len(self.tasks[other])))
            self.waits[lane].append(waits)

    @cached_property
    def repeats(self) -> Repeats:
        return Repeats(self.schedule, self.index)
