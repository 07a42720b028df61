"""Tasks that move weights and activations between the tiers."""

from __future__ import annotations

import torch
from torch import Tensor

from slidetune.runtime.nvme import aligned
from slidetune.runtime.steps import Step
from slidetune.runtime.walk import EMBEDDING, Operation, Walk, as_hidden
from slidetune.schedule import Task


def fetch(walk: Walk, index: int, task: Task) -> Operation:
    """A unit's weights go up."""
    unit = task.unit
    master = walk.machine.masters[unit]
    target = walk.slot(index, "weights")
    if unit == walk.spec.head.index:
        return _fetch_head(walk, walk.slot(index, "head weights"))
    if target is None:
        target = walk.weights[unit]
    walk.weights[unit] = target = target[: master.layout.total]
    place = walk.placement(unit)
    source = walk.staged_weights[unit] if place.weights == "nvme" else master.high

    def run(step: Step) -> None:
        target.copy_(source, non_blocking=True)

    return run


def _fetch_head(walk: Walk, target: Tensor) -> Operation:
    head = walk.spec.head
    walk.weights[head.index] = target = target[: head.weight_elements]
    sources = [walk.machine.masters[head.index].high]
    if walk.spec.tied:
        matrix = walk.spec.vocab_size * walk.spec.hidden_size
        # The matrix comes first, but a frozen one last: so has the layout it.
        first = walk.machine.pointed[head.index].layout.entries[0].numel == matrix
        sources.insert(0 if first else 1, walk.machine.masters[EMBEDDING].high[:matrix])

    def run(step: Step) -> None:
        at = 0
        for source in sources:
            target[at : at + source.numel()].copy_(source, non_blocking=True)
            at += source.numel()

    return run


def read_weights(walk: Walk, index: int, task: Task) -> Operation:
    """A layer's weights come from NVMe."""
    drive = walk.machine.masters[task.unit].drive
    slot = walk.slot(index, "weight staging", torch.uint8)
    walk.staged_weights[task.unit] = slot[: 2 * drive.layout.total].view(torch.bfloat16)

    def run(step: Step) -> None:
        drive.read_weights(slot)

    return run


def save(walk: Walk, index: int, task: Task) -> Operation:
    """A layer's input goes down."""
    i, m = task.unit - 1, task.micro_batch
    target = walk.slot(index, "saved inputs (RAM)")
    target = walk.slot(index, "input staging") if target is None else target
    source = walk.hidden[i, m]
    walk.in_ram[i, m] = target
    return _copied(walk, source, target, m)


def load(walk: Walk, index: int, task: Task) -> Operation:
    """A layer's input comes back up."""
    i, m = task.unit - 1, task.micro_batch
    source = walk.in_ram[i, m]
    target = walk.hidden[i, m] = walk.slot(index, "hidden states")
    return _copied(walk, source, target, m)


def save_middle(walk: Walk, index: int, task: Task) -> Operation:
    """The sum in a layer's middle goes down."""
    return _middle_moved(walk, index, task, "saved middles (RAM)")


def load_middle(walk: Walk, index: int, task: Task) -> Operation:
    """The sum in a layer's middle comes back up."""
    return _middle_moved(walk, index, task, "middles")


def _middle_moved(walk: Walk, index: int, task: Task, pool: str) -> Operation:
    i, m = task.unit - 1, task.micro_batch
    source, target = walk.middles[i, m], walk.slot(index, pool)
    walk.middles[i, m] = target
    return _copied(walk, source, target, m)


def _copied(walk: Walk, source: Tensor, target: Tensor, m: int) -> Operation:
    """Hidden states of a micro-batch go from one slot to another."""

    def run(step: Step) -> None:
        shape, width = step.micro_batches[m].shape, walk.spec.hidden_size
        as_hidden(target, shape, width).copy_(as_hidden(source, shape, width), non_blocking=True)

    return run


def write_input(walk: Walk, index: int, task: Task) -> Operation:
    """A layer's input goes on to NVMe."""
    i, m = task.unit - 1, task.micro_batch
    raw = walk.in_ram[i, m].view(torch.uint8)
    return _move_input(walk, "write", raw, i, m)


def read_input(walk: Walk, index: int, task: Task) -> Operation:
    """A layer's input comes back from NVMe."""
    i, m = task.unit - 1, task.micro_batch
    raw = walk.slot(index, "input staging", torch.uint8)
    walk.in_ram[i, m] = raw.view(torch.bfloat16)
    return _move_input(walk, "read", raw, i, m)


def _move_input(walk: Walk, direction: str, raw: Tensor, i: int, m: int) -> Operation:

    move, offset = getattr(walk.machine.nvme, direction), walk.machine.inputs_at[i, m]
    size = walk.spec.hidden_size * torch.bfloat16.itemsize

    def run(step: Step) -> None:
        sequences, tokens = step.micro_batches[m].shape
        move(offset, raw[: aligned(size * sequences * tokens)])

    return run


def save_inner(walk: Walk, index: int, task: Task) -> Operation:
    """A layer's inner activations go down."""
    key = task.unit - 1, task.micro_batch
    inner, slot = walk.inner[key], walk.slot(index, "inner activations (RAM)", torch.uint8)
    return lambda step: inner.save(slot)


def load_inner(walk: Walk, index: int, task: Task) -> Operation:
    """A layer's inner activations come back up."""
    key = task.unit - 1, task.micro_batch
    inner = walk.inner[key]
    return lambda step: inner.load()
