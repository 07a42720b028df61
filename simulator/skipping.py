"""Leaves out what repeats: once a visit starts as an earlier like visit did, those in between take as long again.

The whole state of a simulation is each lane's position and what is left of its running task. When it recurs from
one visit to a like one, everything up to the next difference in the schedule is the same again, only later: the
lanes move on by whole periods, and the time is added up.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from slidetune.simulator.layout import Layout
from slidetune.simulator.steady import SAME_REMAINING

if TYPE_CHECKING:
    from slidetune.simulator.engine import Lane


class _Seen(NamedTuple):
    """The state in which a visit started."""

    now_s: float
    lanes: list[tuple[int, int, float]]
    """Per lane: tasks of this step ended, the running demand (0: none) and the seconds left of it."""


class Skipper:
    """Looks for repetitions of one simulation, and moves its lanes."""

    def __init__(self, layout: Layout, lanes: list[Lane]) -> None:
        self.lanes, self.place = lanes, layout.place
        self.gpu = lanes[layout.gpu]
        self.repeats = layout.repeats
        self.skipped_s = 0.0
        """Seconds left out so far, to be added to the clock."""
        self._seen: dict[int, _Seen] = {}
        self._step = -1
        self._visits = self._first_gpu_tasks()

    def _first_gpu_tasks(self) -> dict[int, int]:
        """GPU-lane position -> visit, for each visit's first GPU task."""
        column = [base[self.gpu.index] for base in self.repeats.base]
        return {here: visit for visit, (here, then) in enumerate(itertools.pairwise(column)) if then > here}

    def skip_ahead(self, now_s: float) -> None:
        """Called when the GPU is about to start a task, all other lanes having started what they can."""
        step, position = divmod(self.gpu.position, self.gpu.count)
        visit = self._visits.get(position)
        if visit is None or not self.repeats.run_end:
            return
        if step != self._step:
            self._step = step
            self._seen.clear()
        state = _Seen(
            now_s,
            [(lane.position - step * lane.count, lane.klass, lane.remaining) for lane in self.lanes],
        )
        self._seen[visit] = state
        for period, run_end in self.repeats.run_end.items():
            if run_end[visit] - visit < period:
                continue  # Nothing left to skip.
            earlier = self._seen.get(visit - period)
            if earlier and self._recurs(state, earlier, visit, period):
                times = self._times(step, state, earlier, visit, period)
                if times > 0:
                    self._skip(times, state, earlier, visit, period)
                    return

    def _moves(self, visit: int, period: int) -> list[int]:
        """Tasks each lane runs in one period."""
        base = self.repeats.base
        return [after - before for before, after in zip(base[visit - period], base[visit], strict=True)]

    def _recurs(self, state: _Seen, earlier: _Seen, visit: int, period: int) -> bool:
        base, base_before = self.repeats.base[visit], self.repeats.base[visit - period]
        for lane, now, before in zip(self.lanes, state.lanes, earlier.lanes, strict=True):
            moves = base[lane.index] - base_before[lane.index]
            if now[0] - before[0] != moves or now[1] != before[1]:
                return False
            # A task running all the while on a lane that stands still only has less left of it.
            if now[1] and moves and abs(now[2] - before[2]) > SAME_REMAINING * lane.prices[now[0] % lane.count][0]:
                return False
        return True

    def _times(self, step: int, state: _Seen, earlier: _Seen, visit: int, period: int) -> int:
        """How many periods may be skipped: the visits they touch all repeat, and wait for nothing else."""
        repeats, moves = self.repeats, self._moves(visit, period)
        at = []
        for lane, (offset, _, _) in zip(self.lanes, state.lanes, strict=True):
            if moves[lane.index]:
                if not 0 <= offset < lane.count:
                    return 0  # A moving lane is in another step.
                at.append(repeats.visit_of(lane.index, offset))
        low, high = min(at), max(at)
        times = (repeats.run_end[period][low] - high) // period
        for lane, now, before in zip(self.lanes, state.lanes, earlier.lanes, strict=True):
            if not moves[lane.index] and times > 0:
                times = min(times, self._standing(lane, moves, times, before[2] - now[2]))
        if times <= 0:
            return 0
        for touched in range(low, high + times * period + 1):
            if any(self._pending(dep, step) for dep in repeats.distant[touched]) or any(
                self._pending(dep, step - 1) for dep in repeats.previous[touched]
            ):
                # Skip only up to the first visit that has something else to wait for.
                return (touched - 1 - high) // period
        return times

    def _standing(self, lane: Lane, moves: list[int], times: int, done_s: float) -> int:
        """Periods, up to `times`, through which a lane that ends no task stays as it is."""
        if lane.klass:
            # It must not come to its task's end.
            return int(lane.remaining / done_s) - 1 if done_s > 0 else 0
        blocker = lane.blocker(self.lanes)
        if blocker is None:
            return 0
        other, target = blocker
        return times if other.position + times * moves[other.index] <= target else 0

    def _pending(self, task: int, step: int) -> bool:
        number, position = self.place[task]
        lane = self.lanes[number]
        return lane.position <= step * lane.count + position

    def _skip(self, times: int, state: _Seen, earlier: _Seen, visit: int, period: int) -> None:
        moves = self._moves(visit, period)
        for lane, now, before in zip(self.lanes, state.lanes, earlier.lanes, strict=True):
            if moves[lane.index]:
                lane.position += times * moves[lane.index]
                # What a moved lane waits for has moved with it; one that stood still waits for the same task.
                if lane.awaited:
                    other, target = lane.awaited
                    lane.awaited = (other, target + times * moves[other.index])
            elif lane.klass:
                lane.remaining -= times * (before[2] - now[2])
        self.skipped_s += times * (state.now_s - earlier.now_s)
        self._seen.clear()
