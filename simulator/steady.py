"""When a simulation has reached its steady state, and how long a step then takes.

Steps are looked at whenever the GPU ends one. They repeat for certain once the whole state recurs, one step later or
a few (steps that differ by turns: their mean counts). Short of that, they are taken to repeat once every lane's steps
last as long as its last ones did. Lanes may then still drift apart, one falling behind the others by as much every
step; it holds the others up once it is a step behind, so the slowest lane's pace is the step's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slidetune.simulator.engine import Lane

# Steps simulated at most. The second is nearly always the steady state.
MAX_STEPS = 12
# Step times this close, as a fraction, are the same.
_SAME_STEP = 1e-4
# What is left of a task may differ by this share of its duration between states taken as equal.
SAME_REMAINING = 1e-5


class Steadiness:
    """Watches the steps of one simulation."""

    def __init__(self, lanes: list[Lane], gpu: Lane) -> None:
        self.lanes, self.gpu = lanes, gpu
        self._states: list[list[tuple[int, int, float]]] = []

    def step_s(self) -> float | None:
        """Called when the GPU has ended a step: the steady step's duration, or None if it isn't steady yet."""
        steps = len(self.gpu.ends_s)
        now = [(lane.position - steps * lane.count, lane.klass, lane.remaining) for lane in self.lanes]
        for ago, before in enumerate(reversed(self._states), start=1):
            if self._same(now, before):
                return self._pace(self.gpu, ago)
        self._states.append(now)
        if steps >= MAX_STEPS:
            # Neither: the mean of the later half evens out what alternates.
            return max(self._pace(lane, steps // 2) for lane in self.lanes)
        if steps >= 3 and all(self._even(lane) for lane in self.lanes):
            return max(self._pace(lane, 1) for lane in self.lanes)
        return None

    def _same(self, now: list[tuple[int, int, float]], before: list[tuple[int, int, float]]) -> bool:
        return all(
            a[:2] == b[:2] and (not a[1] or abs(a[2] - b[2]) <= SAME_REMAINING * lane.prices[a[0] % lane.count][0])
            for lane, a, b in zip(self.lanes, now, before, strict=True)
        )

    def _even(self, lane: Lane) -> bool:
        """Whether a lane's last two steps took as long as each other."""
        ends = lane.ends_s
        if len(ends) < 3:
            return False
        return abs((ends[-1] - ends[-2]) - (ends[-2] - ends[-3])) <= _SAME_STEP * (ends[-1] - ends[-2])

    def _pace(self, lane: Lane, steps: int) -> float:
        """Mean duration of a lane's last steps; of those it has, where it is behind."""
        steps = min(steps, len(lane.ends_s) - 1)
        return (lane.ends_s[-1] - lane.ends_s[-1 - steps]) / steps if steps > 0 else 0.0
