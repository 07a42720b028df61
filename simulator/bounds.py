"""The least a step can take: no schedule beats its busiest lane or its busiest shared resource."""

from __future__ import annotations

from slidetune.schedule import LANE_NAMES, Schedule
from slidetune.simulator.pricing import PriceList


def bounds_s(schedule: Schedule, prices: PriceList) -> dict[str, float]:
    """Seconds each lane and each shared resource is needed for at full speed, the longest first.

    A lane runs one task at a time, so it needs the sum of their durations alone; a resource must supply what
    all tasks ask of it.
    """
    counts: dict[int, list] = {}
    for task in schedule.tasks:
        entry = counts.setdefault(id(task.work), [task.work, 0])
        entry[1] += 1
    need: dict[str, float] = {}
    for work, count in counts.values():
        price = prices.price(work)
        lane = LANE_NAMES.get(work.lane, work.lane)
        need[lane] = need.get(lane, 0.0) + count * price.alone_s
        for resource, share in price.demand.shares:
            need[resource] = need.get(resource, 0.0) + count * price.alone_s * share
    return dict(sorted(need.items(), key=lambda item: -item[1]))
