"""The discrete-event engine: SimPy processes, one a lane, over a fluid model of what the lanes share.

A lane runs its tasks in order, one at a time, step after step; a task starts when the tasks it waits for have
ended. So the whole state is each lane's position and what is left of its running task, and that is what makes
a repeating state recognisable: when it recurs from one like visit to the next, the visits in between will take
as long again, and are skipped at once.

While tasks run their speeds are the weighted max-min fair share (`sharing`), reckoned anew whenever one starts
or ends. Times are seconds.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

import simpy
from slidetune.simulator.pricing import PriceList
from slidetune.simulator.repeats import Repeats

from slidetune.schedule import GPU, Schedule

# Steps simulated at most. The second is nearly always the steady state.
MAX_STEPS = 8
# Step times this close, as a fraction, are the same.
_SAME_STEP = 1e-4
# What is left of a task may differ by this share of its duration between states taken as equal.
_SAME_REMAINING = 1e-5
# Events of one instant in SimPy's order: lanes first, then one reckoning of the speeds.
_AFTER_LANES = 2


@dataclass(frozen=True, slots=True)
class Executed:
    """When one task of one step ran."""

    step: int
    task: int
    ready_s: float
    """When its lane came to it and began to wait for what it depends on."""
    start_s: float
    end_s: float
    blocked_by: int
    """The task it waited for last, -1 if it never waited."""


@dataclass(slots=True)
class Run:
    """A simulation's outcome."""

    step_s: float
    """Duration of a step in steady state."""
    boundaries: list[float] = field(default_factory=list)
    """When the GPU ended each step."""
    executed: list[Executed] = field(default_factory=list)
    """Every task run, when recorded."""


class _Lane:
    """One lane's queue and state."""

    __slots__ = (
        "awaited", "blocked_by", "count", "deps", "finished", "index", "klass", "position", "prices", "ready_s",
        "remaining", "start_s", "tasks", "waiters",
    )  # fmt: skip

    def __init__(self, index: int, tasks: list[int]) -> None:
        self.index = index
        self.tasks = tasks
        self.count = len(tasks)
        self.position = 0
        # Per task of a step: lanes and positions to wait for; those of the step before are negative.
        self.deps: list[list[tuple[_Lane, int]]] = []
        self.prices: list[tuple[float, int]] = []
        self.remaining = 0.0
        self.klass = 0
        self.finished: simpy.Event | None = None
        # (position that must have been passed, event), of lanes waiting for this one.
        self.waiters: list[list] = []
        self.awaited: list | None = None
        self.ready_s = self.start_s = 0.0
        self.blocked_by = -1


class Engine:
    """Runs one schedule on one machine. Use `simulate`."""

    def __init__(self, schedule: Schedule, prices: PriceList, *, record: bool) -> None:
        self.schedule, self.prices, self.record = schedule, prices, record
        self.env = simpy.Environment()
        self.executed: list[Executed] = []
        self.boundaries: list[float] = []
        # Seconds skipped, to be added to SimPy's clock.
        self.skipped_s = 0.0
        self.done = self.env.event()
        self._build_lanes()
        self._settled_s = 0.0
        self._speeds: tuple[float, ...] = (0.0,) * len(self.lanes)
        self._version = 0
        self._reckoning = False
        self._states: dict[int, tuple] = {}
        self._last_boundary: tuple | None = None
        self._repeats = None if record else Repeats(schedule, self._lane_index)
        self._start_halfway()
        self._gpu_visits = self._first_gpu_tasks() if self._repeats else {}

    def _build_lanes(self) -> None:
        schedule = self.schedule
        by_lane = schedule.lane_tasks()
        used = [lane for lane in schedule.lanes if by_lane[lane]]
        self._lane_index = {lane: i for i, lane in enumerate(used)}
        self.lanes = [_Lane(i, by_lane[lane]) for i, lane in enumerate(used)]
        self.gpu = self.lanes[self._lane_index[GPU]]
        place: list[tuple[_Lane, int]] = [(self.gpu, 0)] * len(schedule.tasks)
        for lane in self.lanes:
            for position, task in enumerate(lane.tasks):
                place[task] = (lane, position)
        self._place = place
        priced: dict[int, tuple[float, int]] = {}
        for index, task in enumerate(schedule.tasks):
            key = id(task.work)
            if key not in priced:
                price = self.prices.price(task.work)
                # A task of no length would let a lane spin at one instant.
                priced[key] = (max(price.alone_s, 1e-9), self.prices.demand_index(price.demand))
            lane = place[index][0]
            lane.prices.append(priced[key])
            # A lane's own earlier tasks are always done first.
            deps = [place[dep] for dep in task.after if place[dep][0] is not lane]
            for dep in task.after_previous:
                other, position = place[dep]
                if other is not lane:
                    deps.append((other, position - other.count))
            lane.deps.append(deps)

    def _start_halfway(self) -> None:
        """Begin the first step in its middle visit, as if all before were done: the backward pass that
        follows leaves the lanes as a whole step would, for half the price."""
        if len(self.schedule.visits) < 3:
            return
        for task in self.schedule.tasks[: self.schedule.visits[len(self.schedule.visits) // 2]]:
            self.lanes[self._lane_index[task.work.lane]].position += 1

    def _first_gpu_tasks(self) -> dict[int, int]:
        """GPU-lane position -> visit, for each visit's first GPU task."""
        first: dict[int, int] = {}
        base = self._repeats.base
        column = self.gpu.index
        for visit in range(len(base) - 1):
            if base[visit + 1][column] > base[visit][column]:
                first[base[visit][column]] = visit
        return first

    # ---- lanes --------------------------------------------------------------------------------------------

    def run(self) -> Run:
        for lane in self.lanes:
            self.env.process(self._lane_process(lane))
        self.env.run(until=self.done)
        step_s = self.boundaries[-1] - self.boundaries[-2]
        return Run(step_s=step_s, boundaries=self.boundaries, executed=self.executed)

    def _lane_process(self, lane: _Lane) -> Generator[simpy.Event, None, None]:
        env, count = self.env, lane.count
        is_gpu = lane is self.gpu
        while True:
            # Positions are read anew after each wait: a skip moves every lane.
            lane.ready_s, lane.blocked_by = env.now, -1
            while (waited := self._blocker(lane)) is not None:
                other, target = waited
                lane.awaited = [target, env.event(), other]
                if self.record:
                    lane.blocked_by = other.tasks[target % other.count]
                other.waiters.append(lane.awaited)
                yield lane.awaited[1]
                lane.awaited = None
            if is_gpu and self._repeats:
                self._look_for_repeat()
            lane.remaining, lane.klass = lane.prices[lane.position % count]
            lane.start_s = env.now
            lane.finished = env.event()
            self._reckon_soon()
            yield lane.finished
            if self.record:
                step, index = divmod(lane.position, count)
                self.executed.append(
                    Executed(step, lane.tasks[index], lane.ready_s, lane.start_s, env.now, lane.blocked_by)
                )
            lane.position += 1
            self._wake(lane)
            if lane.position % count == 0:
                if is_gpu:
                    self._step_ended()
                if self.done.triggered or (self.record and self._all_recorded()):
                    return

    def _blocker(self, lane: _Lane) -> tuple[_Lane, int] | None:
        """A lane and position this lane's next task still waits for."""
        step, index = divmod(lane.position, lane.count)
        for other, position in lane.deps[index]:
            target = step * other.count + position
            if other.position <= target:
                return other, target
        return None

    def _wake(self, lane: _Lane) -> None:
        if lane.waiters:
            position, still = lane.position, []
            for waiter in lane.waiters:
                if waiter[0] < position:
                    waiter[1].succeed()
                else:
                    still.append(waiter)
            lane.waiters = still

    # ---- the fluid ----------------------------------------------------------------------------------------

    def _reckon_soon(self) -> None:
        """Reckon the speeds once, after all lanes have had their turn at this instant."""
        if not self._reckoning:
            self._reckoning = True
            event = simpy.Event(self.env)
            event._ok, event._value = True, None
            event.callbacks.append(self._reckon)
            self.env.schedule(event, priority=_AFTER_LANES)

    def _settle(self) -> None:
        """Take off what the running tasks have done since the speeds were reckoned."""
        elapsed = self.env.now - self._settled_s
        self._settled_s = self.env.now
        if elapsed > 0.0:
            for lane, speed in zip(self.lanes, self._speeds, strict=True):
                if lane.klass:
                    lane.remaining -= elapsed * speed

    def _reckon(self, _: simpy.Event) -> None:
        self._reckoning = False
        self._settle()
        self._speeds = speeds = self.prices.speeds(tuple([lane.klass for lane in self.lanes]))
        wait = min(
            [lane.remaining / speed for lane, speed in zip(self.lanes, speeds, strict=True) if lane.klass],
            default=None,
        )
        self._version += 1
        if wait is not None:
            # A wake-up that another reckoning has overtaken is ignored by its version.
            self.env.timeout(max(0.0, wait), self._version).callbacks.append(self._end_tasks)

    def _end_tasks(self, wakeup: simpy.Event) -> None:
        if wakeup.value != self._version:
            return
        self._settle()
        for lane, speed in zip(self.lanes, self._speeds, strict=True):
            if lane.klass and lane.remaining <= 1e-12 + speed * 1e-12:
                lane.klass = 0
                lane.finished.succeed()
        self._reckon_soon()

    # ---- steady state -------------------------------------------------------------------------------------

    def _step_ended(self) -> None:
        """The GPU ended a step: is it as long as the one before, or in the same state?"""
        self.boundaries.append(self.env.now + self.skipped_s)
        self._states.clear()
        steps = len(self.boundaries)
        self._settle()
        state = tuple((lane.position - steps * lane.count, lane.klass, lane.remaining) for lane in self.lanes)
        if steps >= 2 and not self.done.triggered:
            b = self.boundaries
            same = steps >= 3 and abs((b[-1] - b[-2]) - (b[-2] - b[-3])) <= _SAME_STEP * (b[-1] - b[-2])
            if same or self._same_state(state, self._last_boundary) or steps >= MAX_STEPS:
                self._steady_step = steps - 1
                if not self.record:
                    self.done.succeed()
        self._last_boundary = state

    def _all_recorded(self) -> bool:
        """Whether every lane has ended the steady step, so that its trace is whole."""
        steady = getattr(self, "_steady_step", None)
        if steady is None or any(lane.position < (steady + 1) * lane.count for lane in self.lanes):
            return False
        if not self.done.triggered:
            self.boundaries = self.boundaries[: steady + 1]
            self.done.succeed()
        return True

    def _same_state(self, state: tuple, other: tuple | None) -> bool:
        if other is None:
            return False
        for lane, (position, klass, remaining), (position2, klass2, remaining2) in zip(
            self.lanes, state, other, strict=True
        ):
            if position != position2 or klass != klass2:
                return False
            if klass and abs(remaining - remaining2) > _SAME_REMAINING * lane.prices[position % lane.count][0]:
                return False
        return True

    def _look_for_repeat(self) -> None:
        """At the start of a visit: if an earlier like visit started in this state, skip what will repeat."""
        step, position = divmod(self.gpu.position, self.gpu.count)
        visit = self._gpu_visits.get(position)
        if visit is None or not self._repeats.run_end:
            return
        self._settle()
        base = self._repeats.base[visit]
        offsets = [lane.position - step * lane.count for lane in self.lanes]
        state = tuple(
            (offset, offset - base[lane.index], lane.klass, lane.remaining if lane.klass else 0.0)
            for lane, offset in zip(self.lanes, offsets, strict=True)
        )
        self._states[visit] = (self.env.now, state)
        for period in self._repeats.run_end:
            earlier = self._states.get(visit - period)
            if earlier and self._recurs(state, earlier[1], visit, period):
                times = self._times(step, offsets, visit, period, earlier[1])
                if times > 0:
                    self._skip(times, visit, period, self.env.now - earlier[0], earlier[1])
                    return

    def _recurs(self, state: tuple, earlier: tuple, visit: int, period: int) -> bool:
        base, base_before = self._repeats.base[visit], self._repeats.base[visit - period]
        for lane, now, before in zip(self.lanes, state, earlier, strict=True):
            moves = base[lane.index] != base_before[lane.index]
            if now[1] != before[1] if moves else now[0] != before[0]:
                return False
            if now[2] != before[2]:
                return False
            # A task running all the while on a lane that stands still only has less left of it.
            if now[2] and moves and abs(now[3] - before[3]) > _SAME_REMAINING * lane.prices[now[0] % lane.count][0]:
                return False
        return True

    def _times(self, step: int, offsets: list[int], visit: int, period: int, earlier: tuple) -> int:
        """How many periods may be skipped: the visits they touch all repeat, and wait for nothing else."""
        repeats = self._repeats
        base, base_before = repeats.base[visit], repeats.base[visit - period]
        moves = [b - a for a, b in zip(base_before, base, strict=True)]
        at = [
            repeats.visit_of(lane.index, offset)
            for lane, offset in zip(self.lanes, offsets, strict=True)
            if moves[lane.index] and 0 <= offset < lane.count
        ]
        moving = sum(1 for m in moves if m)
        if len(at) != moving:
            return 0  # A moving lane is in another step.
        low, high = min(at), max(at)
        times = (repeats.run_end[period][low] - high) // period
        if times <= 0:
            return 0
        for lane, before in zip(self.lanes, earlier, strict=True):
            if not moves[lane.index] and lane.klass:
                # It must not come to its task's end.
                done = before[3] - lane.remaining
                times = min(times, int(lane.remaining / done) - 1 if done > 0 else 0)
            elif not moves[lane.index]:
                # It must stay blocked.
                blocker = self._blocker(lane)
                if blocker is None:
                    return 0
                other, target = blocker
                if other.position + times * moves[other.index] > target:
                    return 0
        if times <= 0:
            return 0
        for touched in range(low, high + times * period + 1):
            if any(self._pending(dep, step) for dep in repeats.distant[touched]) or any(
                self._pending(dep, step - 1) for dep in repeats.previous[touched]
            ):
                # Skip only up to the first visit that has something else to wait for.
                return max(0, (touched - 1 - high) // period)
        return times

    def _pending(self, task: int, step: int) -> bool:
        lane, position = self._place[task]
        return lane.position <= step * lane.count + position

    def _skip(self, times: int, visit: int, period: int, seconds: float, earlier: tuple) -> None:
        base, base_before = self._repeats.base[visit], self._repeats.base[visit - period]
        moves = [times * (after - before) for before, after in zip(base_before, base, strict=True)]
        for lane, before in zip(self.lanes, earlier, strict=True):
            if lane.klass and not moves[lane.index]:
                lane.remaining -= times * (before[3] - lane.remaining)
        for lane in self.lanes:
            lane.position += moves[lane.index]
            # What a moved lane waits for has moved with it; a lane that stood still waits for the same task.
            if lane.awaited and moves[lane.index]:
                lane.awaited[0] += moves[lane.awaited[2].index]
        self.skipped_s += times * seconds
        self._states.clear()
        self._reckon_soon()


def simulate(schedule: Schedule, prices: PriceList, *, record: bool = False) -> Run:
    """Run a schedule to its steady state.

    With `record`, every task is simulated and kept; without, repeating visits are skipped, which leaves the
    step time the same to well within 0.5 %.
    """
    return Engine(schedule, prices, record=record).run()
