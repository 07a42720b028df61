"""Tasks that ran, priced again: how long a profile says they should have taken beside what really ran beside them.

A simulation decides for itself which tasks meet; a real step has its own encounters. So a profile is judged by those
that happened: at each moment of the measured step the mix of running tasks is known, the simulator's sharing gives
each its speed, and a task whose speeds add up to more work than it had took longer than the profile says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from slidetune.hardware import HardwareProfile
from slidetune.schedule import Schedule, Work
from slidetune.simulator.pricing import PriceList
from slidetune.trace import TraceRow

# A task is beside a lane that is busy for more than this share of the task's time.
_BESIDE = 0.5

Mix = tuple[int, ...]
"""What runs at one moment: for each lane the number of its task's work, -1 for none."""


@dataclass(slots=True, eq=False)
class Ran:
    """One measured task."""

    work: Work
    unit: int
    number: int
    """Of its work."""
    seconds: float
    parts: Counter[Mix] = field(default_factory=Counter)
    """Seconds of it by what ran at the time, the task itself included."""
    beside: frozenset[str] = frozenset()
    """Lanes that were busy for most of it."""


class Group:
    """Tasks of one lane that are looked at together."""

    def __init__(self, tasks: Sequence[Ran]) -> None:
        self.tasks = tuple(tasks)
        self.seconds = sum(task.seconds for task in tasks)
        self.works = Counter(task.number for task in tasks)
        self.parts: Counter[Mix] = Counter()
        for task in tasks:
            self.parts.update(task.parts)


class Replay:
    """The tasks of a measured step. The step is a circle: what reaches past its end ran beside its beginning."""

    def __init__(self, schedule: Schedule, rows: Sequence[TraceRow], step_s: float) -> None:
        self.step_s = step_s
        self.lanes = tuple(lane for lane in schedule.lanes if any(row.lane == lane for row in rows))
        self.works: list[Work] = []
        numbers: dict[Work, int] = {}
        self.tasks: list[Ran] = []
        for row in rows:
            work, unit = schedule.tasks[row.task][:2]
            number = numbers.setdefault(work, len(numbers))
            if number == len(self.works):
                self.works.append(work)
            self.tasks.append(Ran(work, unit, number, row.end_s - row.start_s))
        self._find_parts(rows)

    def _find_parts(self, rows: Sequence[TraceRow]) -> None:
        active: dict[str, list[Ran]] = {lane: [] for lane in self.lanes}
        before = 0.0
        for moment, begins, task in self._events(rows, active):
            _count(active, moment - before)
            before = moment
            if begins:
                active[task.work.lane].append(task)
            else:
                active[task.work.lane].remove(task)
        _count(active, self.step_s - before)
        for task in self.tasks:
            busy: Counter[str] = Counter()
            for mix, seconds in task.parts.items():
                for lane, number in zip(self.lanes, mix, strict=True):
                    if number >= 0 and lane != task.work.lane:
                        busy[lane] += seconds
            task.beside = frozenset(lane for lane, seconds in busy.items() if seconds > _BESIDE * task.seconds)

    def _events(self, rows: Sequence[TraceRow], active: dict[str, list[Ran]]) -> Iterator[tuple[float, bool, Ran]]:
        """Begins and ends within [0, step], in order; what runs at 0 is put among the active."""
        events = []
        for index, (row, task) in enumerate(zip(rows, self.tasks, strict=True)):
            # A task as long as a step would be beside itself.
            seconds = min(task.seconds, self.step_s)
            start = row.start_s % self.step_s
            end = start + seconds
            if end > self.step_s:
                active[row.lane].append(task)
                end -= self.step_s
            if seconds > 0:
                events += [(start, True, index), (end, False, index)]
        for moment, begins, index in sorted(events):
            yield moment, begins, self.tasks[index]


class Judge:
    """What one profile says of a replay's tasks."""

    def __init__(self, replay: Replay, profile: HardwareProfile) -> None:
        self._lanes = replay.lanes
        self._prices = PriceList(profile)
        prices = [self._prices.price(work) for work in replay.works]
        self._demands = [self._prices.demand_index(price.demand) for price in prices]
        self._alone_s = [price.alone_s for price in prices]

    def alone_s(self, number: int) -> float:
        """Seconds of a task of this work with the machine to itself."""
        return self._alone_s[number]

    def excess(self, group: Group) -> float:
        """Measured seconds of the tasks over those that the profile gives them; above 1 they took longer."""
        lane = self._lanes.index(group.tasks[0].work.lane)
        needed = sum(count * self._alone_s[number] for number, count in group.works.items())
        return sum(seconds * self._speeds(mix)[lane] for mix, seconds in group.parts.items()) / needed

    def _speeds(self, mix: Mix) -> tuple[float, ...]:
        return self._prices.speeds(tuple(self._demands[number] if number >= 0 else 0 for number in mix))


def _count(active: dict[str, list[Ran]], seconds: float) -> None:
    """Add a stretch of time, in which the same tasks ran, to each of them."""
    if seconds <= 0:
        return
    mix = [tasks[-1].number if tasks else -1 for tasks in active.values()]
    for place, tasks in enumerate(active.values()):
        # More than one only where a step's tail overlaps its own head by a little.
        for task in tasks:
            task.parts[(*mix[:place], task.number, *mix[place + 1 :])] += seconds
