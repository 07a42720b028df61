"""Dropout's random numbers: the same in the forward pass and in its recomputation, whatever runs in between.

Each unit and micro-batch of a step draws from a seed of its own, so the order in which a plan visits them changes
nothing. The device's generator is left as it was found. Code that draws from it at the very time of a pass sees the
pass's numbers, though: torch has one generator for all threads.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from slidetune import families


def draws_random_numbers(model: nn.Module) -> bool:
    """Whether the model in training mode has any dropout or routing noise."""
    dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    return dropout or families.draws_random_numbers(model.config.to_dict())


def seed_of(seed: int, step: int, unit: int, micro_batch: int) -> int:
    """The seed of one unit's forward pass of one micro-batch in one step (counted from 1)."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0x100000001B3 + unit * 65537 + micro_batch) % (1 << 63)


class Randomness:
    """Seeds torch's generators around each forward pass; does nothing for a model that draws no random numbers."""

    def __init__(self, seed: int, device: torch.device, active: bool) -> None:
        self.seed, self.device, self.active = seed, device, active
        # The CPU's generator is one for all threads.
        self._cpu = threading.Lock()

    @contextlib.contextmanager
    def on(self, device: torch.device, step: int, unit: int, micro_batch: int) -> Iterator[None]:
        """Random numbers drawn inside come from the seed of this unit and micro-batch."""
        if not self.active:
            yield
            return
        generator, lock = self._generator(device)
        with lock:
            before = generator.get_state()
            generator.manual_seed(seed_of(self.seed, step, unit, micro_batch))
            try:
                yield
            finally:
                generator.set_state(before)

    def _generator(self, device: torch.device) -> tuple[torch.Generator, Any]:
        if device.type == "cuda":
            index = device.index if device.index is not None else torch.cuda.current_device()
            return torch.cuda.default_generators[index], contextlib.nullcontext()
        return torch.default_generator, self._cpu
