"""A walk over a schedule: where everything is when a task runs, by the slots that the schedule's holds give.

The walk goes through the tasks in the schedule's order and keeps, as the builder does, where things are: a task that
takes a slot moves something there, later tasks find it. The functions of the `*_tasks` modules bind one task each
to what they find.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slidetune.model import ModelSpec
from slidetune.plans import Placement, Plan, late_units
from slidetune.runtime.binding import Parts
from slidetune.runtime.captured import Passes
from slidetune.runtime.embedding import HostEmbedding
from slidetune.runtime.head_loss import head_loss
from slidetune.runtime.masters import Master
from slidetune.runtime.pointing import Pointed
from slidetune.runtime.pools import Pools
from slidetune.runtime.randomness import Randomness
from slidetune.runtime.rows import RowTables
from slidetune.runtime.saved import Inner
from slidetune.runtime.steps import Step
from slidetune.schedule import Schedule

Operation = Callable[[Step], None]
"""Carries out one task of one step."""
EMBEDDING = 0


@dataclass(slots=True, kw_only=True)
class Machine:
    """All that operations work on."""

    spec: ModelSpec
    plan: Plan
    places: list[Placement]
    device: torch.device
    pools: Pools
    parts: Parts
    pointed: list[Pointed | None]
    """By unit; none for the embedding."""
    masters: list[Master]
    """By unit."""
    tables: RowTables
    randomness: Randomness
    passes: Passes
    nvme: Any = None
    inputs_at: dict[tuple[int, int], int] | None = None
    """Where in the NVMe file saved inputs go, by layer and micro-batch."""
    loss_chunk: int = 0
    """Tokens whose logits exist at a time."""


class Walk:
    """The buffers of a machine as the tasks of a schedule find them, one task after the other."""

    def __init__(self, schedule: Schedule, machine: Machine) -> None:
        self.schedule, self.machine = schedule, machine
        self.spec, self.plan, self.pools, self.device = machine.spec, machine.plan, machine.pools, machine.device
        self.layers = len(self.spec.layers)
        self.deferred = self.plan.update == "forward"
        self.late = late_units(self.plan, self.spec)
        # A tied matrix that is trained gets its gradient from the head and from the rows.
        self.tied = self.spec.tied and self.spec.embedding.params > 0
        # Rows that a step doesn't read it updates itself, where the head of the next one needs them soon; those that it
        # reads are updated in the next one.
        self.rest_within = self.tied and not self.deferred
        self._taken: dict[int, dict[str, int]] = {}
        for hold in schedule.holds:
            self._taken.setdefault(hold.first, {})[schedule.pools[hold.pool].name] = hold.slot
        # Where things are, as the walk goes on.
        self.weights: dict[int, Tensor] = self._resident_weights()
        self.hidden: dict[tuple[int, int], Tensor] = {}
        self.in_ram: dict[tuple[int, int], Tensor] = {}
        self.middles: dict[tuple[int, int], Tensor] = {}
        self.upstream: dict[int, Tensor] = {}
        self.gradient: dict[int, Tensor] = {}
        self.ring: dict[tuple[int, int], Tensor] = {}
        self.staged_weights: dict[int, Tensor] = {}
        self.staged_state: dict[tuple[int, int], Tensor] = {}
        self.inner: dict[tuple[int, int], Inner] = {}
        self.parts_of_rows = {
            part: sum(task.work.op == f"adam {part}" for task in schedule.tasks)
            for part in ("rows", "other rows", "rest")
        }
        self._place_gradients()
        self.embedding = HostEmbedding(
            machine.parts, machine.masters[EMBEDDING].high, self.spec.hidden_size, machine.randomness
        )
        self.head_loss = head_loss(machine.parts, machine.pointed[self.spec.head.index], self.device)

    def slot(self, index: int, pool: str, dtype: torch.dtype = torch.bfloat16) -> Tensor | None:
        """The slot of a pool that a task takes, None if it takes none."""
        number = self._taken.get(index, {}).get(pool)
        return None if number is None else self.pools.slot(pool, number, dtype)

    def placement(self, unit: int) -> Placement | None:
        return self.machine.places[unit - 1] if 0 < unit <= self.layers else None

    def randomly(self, step: Step, unit: int, m: int) -> Any:
        return self.machine.randomness.on(self.device, step.number, unit, m)

    def synchronize(self) -> None:
        """Wait for this lane's stream."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _resident_weights(self) -> dict[int, Tensor]:
        """Weights that stay on the device, by unit: residents', and room for those that only stay."""
        staying: dict[int, Tensor] = {}
        at = 0
        for unit, place in zip(self.spec.layers, self.machine.places, strict=True):
            if place.resident:
                staying[unit.index] = self.machine.masters[unit.index].high
            elif place.weights == "gpu":
                size = self.machine.masters[unit.index].layout.total
                staying[unit.index] = self.pools.slot("resident weights")[at : at + size]
                at += size
        return staying

    def _place_gradients(self) -> None:
        """Where gradients wait for a deferred update, by unit, and a tied matrix's in any case."""
        self.waiting: dict[int, Tensor] = {}
        taken = {"resident gradients": 0, "waiting gradients": 0}
        for unit in self.spec.units:
            if unit.index not in self.late:
                continue
            size = self.machine.masters[unit.index].layout.trained
            if not size:
                self.waiting[unit.index] = torch.empty(0, dtype=torch.bfloat16)
                continue
            place = self.placement(unit.index)
            pool = "resident gradients" if place is not None and place.resident else "waiting gradients"
            self.waiting[unit.index] = self.pools.slot(pool)[taken[pool] : taken[pool] + size]
            taken[pool] += size
        if self.tied and not self.deferred:
            self.waiting[EMBEDDING] = self.pools.slot("tied gradient")
            own = torch.zeros(self.spec.head.params, dtype=torch.bfloat16)
            self.waiting[self.spec.head.index] = own.pin_memory() if self.device.type == "cuda" else own
        self.dense = self.waiting[EMBEDDING] if self.tied else None


def as_hidden(slot: Tensor, shape: tuple[int, int], width: int) -> Tensor:
    """A slot as hidden states [sequences, tokens, width], with a version counter of their own."""
    sequences, tokens = shape
    return slot[: sequences * tokens * width].view(sequences, tokens, width).data
