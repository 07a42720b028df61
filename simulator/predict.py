"""A prediction: one schedule on one machine, with everything a report wants to know."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from slidetune.hardware import HardwareProfile
from slidetune.schedule import GPU, LANE_NAMES, NVME_READ, NVME_WRITE, TIERS, Schedule, layer_updates
from slidetune.simulator.bottleneck import LaneShare, critical_path, lane_shares, steady
from slidetune.simulator.bounds import bounds_s
from slidetune.simulator.engine import simulate
from slidetune.simulator.memory import TierMemory, tier_memory
from slidetune.simulator.pricing import PriceList
from slidetune.trace import TraceRow

# A lane whose tasks take this much longer than alone is held back by what it shares.
_CONTENDED = 1.15
# A lane that asks for more than this of a resource, when alone, is as fast as that resource.
_FILLED = 0.999
_SHARED = {"host DRAM": "host DRAM", "link duplex": "both directions of the link", "CPU cores": "CPU cores"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One steady step of a schedule on a machine. Times in seconds."""

    schedule: Schedule
    profile: HardwareProfile
    step_s: float
    bounds_s: dict[str, float]
    """Least time each lane and shared resource allows, the longest first."""
    lanes: dict[str, LaneShare]
    critical_s: dict[str, float]
    """Seconds of the step's critical path spent on each lane, the most first."""
    memory: dict[str, TierMemory]
    trace: list[TraceRow]
    """Every task of the steady step once. 0 is the moment the GPU ended the step before; what runs ahead
    or behind lies before 0 or after step_s."""

    @property
    def tokens_per_s(self) -> float:
        return self.schedule.tokens / self.step_s

    @property
    def bound_s(self) -> float:
        return next(iter(self.bounds_s.values()))

    @property
    def gpu_busy(self) -> float:
        """Share of the step in which the GPU computes."""
        return self.lanes[GPU].busy_s / self.step_s

    @property
    def adam_alone_s(self) -> float:
        """Seconds of a step's CPU Adam on the layers in RAM, were nothing else running."""
        prices = PriceList(self.profile)
        return sum(prices.price(task.work).alone_s for task in layer_updates(self.schedule))

    @property
    def nvme_written_bytes(self) -> int:
        return int(self.schedule.total("bytes", NVME_WRITE))

    @property
    def limiter(self) -> str:
        """What the step waits for most: the lane with most of the critical path, or what holds that lane back."""
        lane = next(iter(self.critical_s))
        name = LANE_NAMES.get(lane, lane)
        share = self.lanes[lane]
        contended = share.busy_s > _CONTENDED * share.alone_s
        if lane == GPU:
            return name
        if lane in (NVME_READ, NVME_WRITE):
            return "NVMe drive (reads and writes together)" if contended else name
        prices, works = PriceList(self.profile), Counter(t.work for t in self.schedule.tasks if t.work.lane == lane)
        # By what most of the lane's time goes to.
        work = max(works, key=lambda work: works[work] * prices.price(work).alone_s)
        asked = dict(prices.price(work).demand.shares)
        if contended:
            # Of what it shares with other lanes, what the step asks most of.
            held_by = max(asked.keys() & _SHARED.keys(), key=self.bounds_s.__getitem__)
            return f"{name} ({_SHARED[held_by]})"
        return f"{name} (host DRAM)" if asked["host DRAM"] > _FILLED else name


def predict(schedule: Schedule, profile: HardwareProfile, prices: PriceList | None = None) -> Prediction:
    """Simulate a schedule task by task and analyse its steady step."""
    prices = prices or PriceList(profile)
    run = simulate(schedule, prices, record=True)
    origin = run.boundaries[-2]
    rows = []
    for done in steady(run):
        task = schedule.tasks[done.task]
        rows.append(
            TraceRow(
                step=done.step,
                op=task.work.op,
                unit=task.unit,
                micro_batch=task.micro_batch,
                chunk=task.chunk,
                lane=task.work.lane,
                start_s=done.start_s - origin,
                end_s=done.end_s - origin,
                bytes=task.work.bytes,
                flops=task.work.flops,
                task=done.task,
                ready_s=done.ready_s - origin,
                blocked_by=done.blocked_by,
            )
        )
    alone = {i: prices.price(task.work).alone_s for i, task in enumerate(schedule.tasks)}
    critical: dict[str, float] = {}
    for task, seconds in critical_path(schedule, run):
        lane = schedule.tasks[task].work.lane
        critical[lane] = critical.get(lane, 0.0) + seconds
    return Prediction(
        schedule=schedule,
        profile=profile,
        step_s=run.step_s,
        bounds_s=bounds_s(schedule, prices),
        lanes=lane_shares(schedule, run, alone),
        critical_s=dict(sorted(critical.items(), key=lambda item: -item[1])),
        memory={tier: tier_memory(schedule, rows, run.step_s, tier, profile.capacity_bytes(tier)) for tier in TIERS},
        trace=sorted(rows, key=lambda row: (row.start_s, row.task)),
    )
