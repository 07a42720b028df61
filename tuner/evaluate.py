"""What a plan is worth on a machine: whether it fits, by arithmetic, and how fast it is, by simulation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from slidetune import buffers, collector
from slidetune.builder import build
from slidetune.hardware import HardwareProfile
from slidetune.model import ModelSpec
from slidetune.plans import Plan
from slidetune.schedule import NVME_WRITE, TIERS, Schedule
from slidetune.simulator.engine import simulate
from slidetune.simulator.pricing import PriceList

if TYPE_CHECKING:
    from slidetune.tuner.workers import Workers


@dataclasses.dataclass(frozen=True, slots=True)
class Worth:
    """What one simulated plan achieves."""

    step_s: float
    tokens_per_s: float
    ram_bytes: int
    nvme_written_bytes_per_token: float
    tasks: int
    """Tasks of its schedule: what simulating it costs."""


class Evaluator:
    """Fits and simulates plans of one model on one machine; each plan once."""

    def __init__(self, model: ModelSpec, profile: HardwareProfile) -> None:
        self.model, self.profile = model, profile
        self.prices = PriceList(profile)
        self.capacity = {tier: profile.capacity_bytes(tier) for tier in TIERS}
        self._needs: dict[Plan, dict[str, int]] = {}
        self._worth: dict[Plan, Worth] = {}

    @property
    def simulated(self) -> int:
        """Distinct plans simulated so far."""
        return len(self._worth)

    @property
    def tasks(self) -> int:
        """Tasks in the schedules of those plans."""
        return sum(worth.tasks for worth in self._worth.values())

    def needs(self, plan: Plan) -> dict[str, int]:
        """Bytes the plan needs of each tier."""
        found = self._needs.get(plan)
        if found is None:
            found = self._needs[plan] = buffers.peak_bytes(self.model, plan, self.profile.gpu.kernels)
        return found

    def overflow(self, plan: Plan) -> dict[str, float]:
        """How far the plan overflows each tier, as a share of the tier; at most 0 where it fits."""
        needs = self.needs(plan)
        return {tier: (needs[tier] - size) / max(size, 1) for tier, size in self.capacity.items()}

    def fits(self, plan: Plan) -> bool:
        needs = self.needs(plan)
        return all(needs[tier] <= size for tier, size in self.capacity.items())

    def schedule(self, plan: Plan) -> Schedule:
        return build(self.model, plan, self.profile.gpu.kernels)

    def worth(self, plan: Plan) -> Worth:
        found = self._worth.get(plan)
        if found is None:
            found = self._worth[plan] = self.simulate(plan)
        return found

    def worths(self, plans: Sequence[Plan], workers: Workers) -> list[Worth]:
        """The worth of several plans, simulated side by side."""
        new = [plan for plan in dict.fromkeys(plans) if plan not in self._worth]
        # The heaviest first keeps all workers busy to the end.
        new.sort(key=lambda plan: -plan.accumulation)
        self._worth.update(zip(new, workers.map(Evaluator.simulate, new), strict=True))
        return [self._worth[plan] for plan in plans]

    def simulate(self, plan: Plan) -> Worth:
        """The worth of a plan, reckoned anew."""
        with collector.paused():
            schedule = self.schedule(plan)
            step_s = simulate(schedule, self.prices).step_s
        return Worth(
            step_s=step_s,
            tokens_per_s=plan.tokens / step_s,
            ram_bytes=self.needs(plan)["ram"],
            nvme_written_bytes_per_token=schedule.total("bytes", NVME_WRITE) / plan.tokens,
            tasks=len(schedule.tasks),
        )
