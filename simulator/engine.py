"""The discrete-event engine: lanes that run their tasks in order, over a fluid model of what they share.

A task starts when its lane has come to it and the tasks it waits for have ended. While tasks run their speeds are
the weighted max-min fair share (`sharing`), reckoned anew at every moment at which one starts or ends; between two
such moments nothing changes, so SimPy's clock goes from one to the next. One SimPy process moves all lanes: with a
process a lane and an event a dependency the same simulation takes twice as long, and the tuner runs hundreds.

Times are seconds. Where visits of like layers repeat, `skipping` leaves them out.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

import simpy

from slidetune.schedule import Schedule, Work
from slidetune.simulator.layout import Layout
from slidetune.simulator.pricing import PriceList
from slidetune.simulator.skipping import Skipper
from slidetune.simulator.steady import MAX_STEPS, Steadiness

# A task of no length would let a lane spin at one moment.
_SHORTEST_S = 1e-9
# Less than this, in seconds alone, is nothing left of a task.
_NOTHING_S = 1e-12


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


class Lane:
    """One lane's queue and state."""

    __slots__ = (
        "awaited",
        "blocked_by",
        "count",
        "ends_s",
        "index",
        "klass",
        "position",
        "prices",
        "ready_s",
        "remaining",
        "start_s",
        "tasks",
        "waiters",
        "waits",
    )

    def __init__(self, index: int, layout: Layout, prices: list[tuple[float, int]]) -> None:
        self.index = index
        self.tasks = layout.tasks[index]
        self.waits = layout.waits[index]
        self.count = len(self.tasks)
        # Per task: seconds at top speed, and its demand's number.
        self.prices = prices
        # Tasks ended so far, over all steps.
        self.position = 0
        # Of the running task: seconds left at top speed, and its demand's number; 0 while none runs.
        self.remaining = 0.0
        self.klass = 0
        # The lane and position that the next task waits for, and who waits for this lane.
        self.awaited: tuple[Lane, int] | None = None
        self.waiters: list[Lane] = []
        self.ready_s = self.start_s = 0.0
        self.blocked_by = -1
        # When it ended each step.
        self.ends_s: list[float] = []

    def blocker(self, lanes: list[Lane]) -> tuple[Lane, int] | None:
        """A lane and position that this lane's next task still waits for."""
        step, index = divmod(self.position, self.count)
        for number, position in self.waits[index]:
            other = lanes[number]
            target = step * other.count + position
            if other.position <= target:
                return other, target
        return None


class Engine:
    """Runs one schedule on one machine. Use `simulate`."""

    def __init__(self, layout: Layout, prices: PriceList, *, record: bool) -> None:
        self.prices, self.record = prices, record
        self.env = simpy.Environment()
        self.executed: list[Executed] = []
        self.step_s: float | None = None
        priced = {id(work): self._priced(work) for works in layout.works for work in works}
        self.lanes = [Lane(i, layout, [priced[id(w)] for w in works]) for i, works in enumerate(layout.works)]
        self.gpu = self.lanes[layout.gpu]
        self.steadiness = Steadiness(self.lanes, self.gpu)
        # The step to record: the one after the first that was found steady, since lanes may run ahead by one.
        self._last_step = MAX_STEPS
        self.skipper = None if record else Skipper(layout, self.lanes)
        self._start_halfway(layout)

    def _priced(self, work: Work) -> tuple[float, int]:
        price = self.prices.price(work)
        return max(price.alone_s, _SHORTEST_S), self.prices.demand_index(price.demand)

    def _start_halfway(self, layout: Layout) -> None:
        """Begin the first step in its middle visit, as if all before were done: the backward pass that
        follows leaves the lanes as a whole step would, for half the price."""
        visits = layout.schedule.visits
        if len(visits) < 3:
            return
        for lane, _ in layout.place[: visits[len(visits) // 2]]:
            self.lanes[lane].position += 1

    def run(self) -> Run:
        self.env.process(self._advance())
        self.env.run()
        for lane in self.lanes:
            # Lanes refer to each other: without this, only the garbage collector could free them.
            lane.waiters, lane.awaited = [], None
        return Run(step_s=self.step_s, boundaries=self.gpu.ends_s[: self._last_step + 1], executed=self.executed)

    def _advance(self) -> Generator[simpy.Event, None, None]:
        """Start what can start, let time pass until something ends, and so on."""
        timeout, lanes, gpu, prices, record = self.env.timeout, self.lanes, self.gpu, self.prices, self.record
        # Mix of running demands -> lanes and their speeds.
        mixes: dict[tuple[int, ...], list[tuple[Lane, float]]] = {}
        idle = list(lanes)
        while True:
            for lane in idle:
                if lane is not gpu:
                    self._start(lane)
            # The GPU comes last, so that a repeating state is looked for when all others have moved.
            if not gpu.klass and gpu.awaited is None:
                self._start(gpu)
            mix = tuple([lane.klass for lane in lanes])
            running = mixes.get(mix)
            if running is None:
                fair = zip(lanes, prices.speeds(mix), strict=True)
                running = mixes[mix] = [(lane, speed) for lane, speed in fair if speed]
            wait = min([lane.remaining / speed for lane, speed in running])
            yield timeout(wait)
            ended = []
            for lane, speed in running:
                lane.remaining -= wait * speed
                if lane.remaining <= _NOTHING_S:
                    ended.append(lane)
            idle = self._end(ended)
            if self.step_s is not None and (not record or self._all_recorded()):
                return

    def _start(self, lane: Lane) -> None:
        """Start the lane's next task, or wait for what it needs."""
        waited = lane.blocker(self.lanes)
        if waited is not None:
            lane.awaited = waited
            other, target = waited
            other.waiters.append(lane)
            if self.record:
                lane.blocked_by = other.tasks[target % other.count]
            return
        if lane is self.gpu and self.skipper is not None:
            self.skipper.skip_ahead(self.env.now)
        lane.remaining, lane.klass = lane.prices[lane.position % lane.count]
        lane.start_s = self.env.now

    def _end(self, ended: list[Lane]) -> list[Lane]:
        """End the running tasks of these lanes; returns the lanes that may now be able to start one."""
        free = ended
        now = self.env.now
        for lane in ended:
            lane.klass = 0
            if self.record:
                step, index = divmod(lane.position, lane.count)
                self.executed.append(
                    Executed(step, lane.tasks[index], lane.ready_s, lane.start_s, now, lane.blocked_by)
                )
            lane.position = position = lane.position + 1
            lane.ready_s, lane.blocked_by = now, -1
            if lane.waiters:
                woken = [waiter for waiter in lane.waiters if waiter.awaited[1] < position]
                if woken:
                    lane.waiters = [waiter for waiter in lane.waiters if waiter.awaited[1] >= position]
                    for waiter in woken:
                        waiter.awaited = None
                    free = free + woken
            if position % lane.count == 0:
                lane.ends_s.append(now + (self.skipper.skipped_s if self.skipper else 0.0))
        if self.gpu in ended and self.gpu.position % self.gpu.count == 0 and self.step_s is None:
            self.step_s = self.steadiness.step_s()
            self._last_step = len(self.gpu.ends_s)
        return free

    def _all_recorded(self) -> bool:
        """Whether every lane has ended the step to record, so that its trace is whole."""
        return all(lane.position >= (self._last_step + 1) * lane.count for lane in self.lanes)


def simulate(schedule: Schedule, prices: PriceList, *, record: bool = False, layout: Layout | None = None) -> Run:
    """Run a schedule to its steady state.

    With `record`, every task is simulated and kept; without, repeating visits are skipped, which leaves the
    step time the same to well within 0.5 %. Whoever simulates one schedule often passes its `layout`.
    """
    return Engine(layout or Layout(schedule), prices, record=record).run()
