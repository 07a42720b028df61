"""One optimizer step, described once: tasks on lanes, their dependencies, and the buffers they hold.

The simulator prices a `Schedule`, the runtime executes it. Tasks stand in one global order in which each
depends only on earlier tasks of its step or on any task of the step before; every lane runs its own tasks in
that order. So whatever their durations, the first unfinished task can always run: no schedule deadlocks.

Buffers are part of it. A pool is a number of equal slots; a `Hold` says which tasks own a slot from when to
when, and whoever takes a slot next depends on its last reader. Two tasks can't own one slot at a time, and
what a tier must hold is known before anything runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

GPU, H2D, D2H, CPU_ADAM = "gpu", "h2d", "d2h", "cpu_adam"
NVME_READ, NVME_WRITE = "nvme_read", "nvme_write"
LANES = (GPU, H2D, D2H, CPU_ADAM, NVME_READ, NVME_WRITE)
LANE_NAMES = {
    GPU: "GPU compute",
    H2D: "uploads",
    D2H: "downloads",
    CPU_ADAM: "CPU Adam",
    NVME_READ: "NVMe reads",
    NVME_WRITE: "NVMe writes",
    "link": "transfers",
    "convert": "conversion to bf16",
}

TIERS = ("gpu", "ram", "nvme")

# Embedding rows that the host gathers go up a piece of this size at a time, while it gathers the next.
GATHERED_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a task asks of the hardware. Tasks that ask the same share one Work."""

    op: str
    """fetch, forward, recompute, backward, head, loss, store, adam, save, load, nvme_read, nvme_write, ..."""
    lane: str
    flops: float = 0.0
    """Matrix and attention FLOPs on the GPU."""
    traffic_bytes: float = 0.0
    """Device-memory traffic of memory-bound GPU kernels."""
    launches: int = 0
    """GPU kernels launched."""
    bytes: int = 0
    """Bytes over the lane's link or drive."""
    params: int = 0
    """Parameters updated (Adam) or converted."""
    param_bytes: float = 0.0
    """DRAM traffic a parameter, for Adam and conversion."""
    threads: int = 0
    """CPU threads used."""
    working_bytes: int = 0
    """GPU memory alive only while the task runs."""


class Task(NamedTuple):
    """One operation of one unit, micro-batch and chunk; -1 where one of them doesn't apply."""

    work: Work
    unit: int
    micro_batch: int
    chunk: int
    after: tuple[int, ...]
    """Tasks of the same step that must have finished, by index."""
    after_previous: tuple[int, ...] = ()
    """Tasks of the step before that must have finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Equal slots in one tier, allocated for the whole run unless transient. One slot of a reserved size is a pool
    too."""

    name: str
    tier: str
    slots: int
    slot_bytes: int
    page_locked: bool = False
    transient: bool = False
    """A slot exists only while it is held: autograd makes what is in it."""

    @property
    def bytes(self) -> int:
        return self.slots * self.slot_bytes


class Hold(NamedTuple):
    """A slot owned from the start of task `first` to the end of the last of `last`, all of one step."""

    pool: int
    slot: int
    first: int
    last: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The tasks of one optimizer step, or of one forward pass for an evaluation, repeated step after step."""

    name: str
    lanes: tuple[str, ...]
    tasks: tuple[Task, ...]
    pools: tuple[Pool, ...]
    holds: tuple[Hold, ...]
    tokens: int
    """Tokens a step."""
    visits: tuple[int, ...] = ()
    """Index of the first task of each visit, one a unit and micro-batch: where the simulator looks for a
    repeating state."""
    visits_per_layer: int = 1
    """Visits after which the next layer is at the same point."""

    def lane_tasks(self) -> dict[str, list[int]]:
        """Task indices of every lane, in the order it runs them."""
        lanes: dict[str, list[int]] = {lane: [] for lane in self.lanes}
        for index, task in enumerate(self.tasks):
            lanes[task.work.lane].append(index)
        return lanes

    def total(self, amount: str, lane: str | None = None) -> float:
        """Sum of one of Work's amounts over the step: `total("bytes", "h2d")`."""
        return sum(getattr(task.work, amount) for task in self.tasks if lane is None or task.work.lane == lane)

    def pools_of(self, tier: str) -> Iterator[Pool]:
        return (pool for pool in self.pools if pool.tier == tier)

    def working_bytes(self) -> int:
        """The largest working set of any GPU task."""
        return max((task.work.working_bytes for task in self.tasks), default=0)

    def peak_bytes(self, tier: str) -> int:
        """What the tier must hold: its pools, and on the GPU what a task needs beside them at most: its working set
        and the transient slots held meanwhile."""
        lasting = sum(pool.bytes for pool in self.pools_of(tier) if not pool.transient)
        return lasting + (self._passing_bytes() if tier == "gpu" else 0)

    def _passing_bytes(self) -> int:
        changes = [0] * (len(self.tasks) + 1)
        for hold in self.holds:
            pool = self.pools[hold.pool]
            if pool.transient:
                changes[hold.first] += pool.slot_bytes
                changes[max(hold.last) + 1] -= pool.slot_bytes
        held = itertools.accumulate(changes)
        return max((task.work.working_bytes + slots for task, slots in zip(self.tasks, held, strict=False)), default=0)


def layer_updates(schedule: Schedule) -> list[Task]:
    """CPU Adam's tasks on layers whose optimizer state is in RAM."""
    on_drive = {task.unit for task in schedule.tasks if task.work.op == "read state"}
    head = max(task.unit for task in schedule.tasks)
    return [
        task
        for task in schedule.tasks
        if (task.work.op, task.work.lane) == ("adam", CPU_ADAM) and task.unit != head and task.unit not in on_drive
    ]
