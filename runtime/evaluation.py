"""Evaluation: the mean loss of a batch by the weights as they are, forward only.

Its passes run in training's buffers, lanes and streams, by a schedule of their own, and draw no random numbers. A
model without dropout is left in training mode, so that its modules choose the kernels that training has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from slidetune.builder import build_forward
from slidetune.model import untrained
from slidetune.plans import kept_nothing
from slidetune.runtime.lanes import Lanes
from slidetune.runtime.operations import Operations
from slidetune.runtime.randomness import Randomness
from slidetune.runtime.walk import Machine


class Evaluation:
    """Forward passes over a trainer's machine, as another course of its lanes."""

    def __init__(self, machine: Machine, kernels: str, lanes: Lanes) -> None:
        self._model, self._draws = machine.parts.model, machine.randomness.active
        self.schedule = build_forward(machine.spec, machine.plan, kernels)
        alone = replace(
            machine,
            spec=untrained(machine.spec),
            places=kept_nothing(machine.places),
            randomness=Randomness(machine.randomness.seed, machine.device, active=False),
        )
        # Some of a model's modules are copied here, and their mode with them.
        with self.without_dropout():
            self.operations = Operations(self.schedule, alone)
        self.last_task = len(self.schedule.tasks) - 1
        """The one that makes the last micro-batch's loss known."""
        self.course = lanes.add(self.schedule, self.operations.run, awaited=[self.last_task])

    @contextlib.contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Inside, a model with dropout or routing noise has none; nothing else may compute with it meanwhile."""
        if not self._draws:
            yield
            return
        self._model.eval()
        try:
            yield
        finally:
            self._model.train()
