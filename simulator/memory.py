"""Memory of each tier over a step: who owns what when, and which owners make the peak.

Most pools are arenas, allocated for the whole run, so their bytes count throughout; transient ones and the working
sets of GPU tasks come and go. What of each pool is *in use* follows from the holds, and shows where an arena stands
idle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slidetune.schedule import GPU, Schedule
from slidetune.trace import TraceRow

WORKING_SET = "working set"


@dataclass(frozen=True, slots=True, kw_only=True)
class TierMemory:
    """One tier's memory over one steady step of `step_s` seconds."""

    tier: str
    capacity_bytes: int
    times_s: tuple[float, ...]
    """Moments at which something changes, from 0; each value below holds until the next moment."""
    allocated: dict[str, tuple[int, ...]]
    """Bytes allocated to each owner from each moment on."""
    in_use: dict[str, tuple[int, ...]]
    """Bytes of it that hold something."""
    peak_bytes: int
    peak_s: float
    """The first moment of the peak."""
    peak_task: str
    """What the GPU was doing then; empty where memory doesn't vary."""

    @property
    def peak_owners(self) -> dict[str, int]:
        """Bytes of each owner at the peak, the largest first."""
        at = self.times_s.index(self.peak_s)
        owners = {name: values[at] for name, values in self.allocated.items() if values[at]}
        return dict(sorted(owners.items(), key=lambda item: -item[1]))


def tier_memory(schedule: Schedule, rows: list[TraceRow], step_s: float, tier: str, capacity_bytes: int) -> TierMemory:
    """The tier's memory over the steady step that `rows` trace (every task of the schedule once).

    Times are taken modulo the step, since what one step leaves unfinished the one before left too.
    """
    by_task = {row.task: row for row in rows}
    in_use: dict[str, list[tuple[float, float, int]]] = {}
    handed_out = {hold.pool for hold in schedule.holds}
    for index, pool in enumerate(schedule.pools):
        if pool.tier == tier and index not in handed_out:
            in_use[pool.name] = [(0.0, step_s, pool.bytes)]
    for hold in schedule.holds:
        pool = schedule.pools[hold.pool]
        if pool.tier == tier:
            start = by_task[hold.first].start_s
            end = max(by_task[task].end_s for task in hold.last)
            in_use.setdefault(pool.name, []).append((start, end, pool.slot_bytes))
    working: list[tuple[float, float, int]] = []
    if tier == "gpu":
        for row in rows:
            size = schedule.tasks[row.task].work.working_bytes
            if row.lane == GPU and size:
                working.append((row.start_s, row.end_s, size))
    spans = {name: _wrapped(parts, step_s) for name, parts in in_use.items()}
    working = _wrapped(working, step_s)
    times = sorted(
        {0.0, *(t for parts in (*spans.values(), working) for s, e, _ in parts for t in (s, e) if t < step_s)}
    )

    used = {name: _sums(parts, times) for name, parts in spans.items()}
    allocated = {
        pool.name: used.get(pool.name, ()) if pool.transient else (pool.bytes,) * len(times)
        for pool in schedule.pools_of(tier)
    }
    if working:
        allocated[WORKING_SET] = used[WORKING_SET] = _sums(working, times, together=max)
    totals = [sum(values[i] for values in allocated.values()) for i in range(len(times))] or [0]
    peak = max(totals)
    peak_s = times[totals.index(peak)]
    task = ""
    if working:
        doing = [
            row
            for row in rows
            if row.lane == GPU and any(s <= peak_s < e for s, e, _ in _wrapped([(row.start_s, row.end_s, 0)], step_s))
        ]
        task = f"{doing[-1].op} of unit {doing[-1].unit}" if doing else ""
    return TierMemory(
        tier=tier,
        capacity_bytes=capacity_bytes,
        times_s=tuple(times),
        allocated=allocated,
        in_use=used,
        peak_bytes=peak,
        peak_s=peak_s,
        peak_task=task,
    )


def _wrapped(parts: list[tuple[float, float, int]], step_s: float) -> list[tuple[float, float, int]]:
    """Intervals cut at the step's ends and laid into [0, step_s)."""
    # One holder's end is the next one's start, but for rounding: twelve digits of the step are the same moment.
    digits = 12 - math.ceil(math.log10(step_s))
    cut: list[tuple[float, float, int]] = []
    for start, end, size in parts:
        if end - start >= step_s:
            # Held all step long, and by the next step's holder already for the overlap.
            cut.append((0.0, step_s, size))
            end -= step_s
        begin, until = round(start % step_s, digits), round(end % step_s, digits)
        if begin < until:
            cut.append((begin, until, size))
        elif begin > until or end - start > step_s / 2:
            cut += [(begin, step_s, size), (0.0, until, size)]
    return [(start, end, size) for start, end, size in cut if start < min(end, step_s)]


def _sums(parts: list[tuple[float, float, int]], times: list[float], together=sum) -> tuple[int, ...]:
    """Bytes at each moment: the sum (or maximum) of the intervals that cover it."""
    if together is max:
        # GPU tasks follow one another: at most one covers a moment, but for rounding at their ends.
        return tuple(max((size for s, e, size in parts if s <= t < e), default=0) for t in times)
    changes: dict[float, int] = {}
    for start, end, size in parts:
        changes[start] = changes.get(start, 0) + size
        changes[end] = changes.get(end, 0) - size
    moments = sorted(changes)
    total, at, out = 0, 0, []
    for t in times:
        while at < len(moments) and moments[at] <= t:
            total += changes[moments[at]]
            at += 1
        out.append(total)
    return tuple(out)
