"""Where a schedule repeats itself: visits of like layers, one after the other, that do the same work.

A visit's signature is its tasks' works and how far back their dependencies reach. Equal signatures p visits
apart mean that the schedule, shifted by p visits, looks the same. The backward pass meets the layers in the
opposite order of the forward pass, so dependencies from one on the other, or on the step before, never shift
alike; they are left out of the signature: whoever uses a repetition must see that they are met.
"""

from __future__ import annotations

from bisect import bisect_right

from slidetune.schedule import Schedule

# Layers after which a pattern may repeat: what spreading a share of the layers evenly, and mixed attention, make.
_LAYER_PERIODS = (1, 2, 3, 4, 6, 8)


class Repeats:
    """Visits of a schedule: where each lane stands at their starts, and which visits repeat."""

    def __init__(self, schedule: Schedule, lane_index: dict[str, int]) -> None:
        tasks, visits = schedule.tasks, schedule.visits
        count = len(visits)
        self.base: list[tuple[int, ...]] = []
        """Per visit, tasks of each lane before it."""
        self.distant: list[list[int]] = [[] for _ in range(count)]
        """Per visit, tasks of this step it waits for that the signature leaves out."""
        self.previous: list[list[int]] = [[] for _ in range(count)]
        """Per visit, tasks of the step before it waits for."""
        position = [0] * len(lane_index)
        signatures: list[int] = []
        ends = (*visits[1:], len(tasks))[:count]
        turn = visits[count // 2] if count else 0
        for visit, (start, end) in enumerate(zip(visits, ends, strict=True)):
            self.base.append(tuple(position))
            near = turn if start > turn else 0
            parts: list[object] = [end - start]
            for index in range(start, end):
                work, _, _, _, after, after_previous = tasks[index]
                parts.append(id(work))
                for dep in after:
                    if dep >= near:
                        parts.append(index - dep)
                    else:
                        self.distant[visit].append(dep)
                if after_previous:
                    self.previous[visit].extend(after_previous)
                position[lane_index[work.lane]] += 1
            signatures.append(hash(tuple(parts)))
        self._columns = [[base[lane] for base in self.base] for lane in range(len(lane_index))]
        self.run_end: dict[int, list[int]] = {}
        """Per period p, per visit, the last visit up to which each equals the one p before it."""
        # One micro-batch after the other within a layer, or one layer after the other.
        for period in sorted({1, *(n * schedule.visits_per_layer for n in _LAYER_PERIODS)}):
            ends_at = [0] * count
            for visit in range(count - 1, period - 1, -1):
                if signatures[visit] == signatures[visit - period]:
                    following = ends_at[visit + 1] if visit + 1 < count else 0
                    ends_at[visit] = max(visit, following)
            if any(end - visit >= 2 * period for visit, end in enumerate(ends_at)):
                self.run_end[period] = ends_at

    def visit_of(self, lane: int, position: int) -> int:
        """The visit to which a lane's task at this position belongs."""
        return bisect_right(self._columns[lane], position) - 1
