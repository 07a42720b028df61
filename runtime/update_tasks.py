"""Tasks of gradients and updates: down to the host, Adam, and the state that Adam needs from NVMe."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slidetune import buffers
from slidetune.runtime.adam import AdamW, adam_rows, adam_step
from slidetune.runtime.clipping import applied, gradient_scale
from slidetune.runtime.masters import State
from slidetune.runtime.resident import update_resident
from slidetune.runtime.rounding import as_rounded
from slidetune.runtime.rows import Update as RowUpdate
from slidetune.runtime.steps import Step
from slidetune.runtime.walk import EMBEDDING, Operation, Walk
from slidetune.schedule import Task


def store(walk: Walk, index: int, task: Task) -> Operation:
    """A chunk of a unit's gradient comes down."""
    unit, chunk = task.unit, task.chunk
    start = chunk * buffers.chunk_params(walk.plan)
    source = as_rounded(walk.gradient[unit])[start : start + buffers.chunk_params(walk.plan)]
    count = source.numel()
    ring = walk.slot(index, "gradient ring")
    if ring is not None:
        walk.ring[unit, chunk] = ring[:count]
        targets = [ring[:count]]
    else:
        targets = _waiting_parts(walk, unit, start, count)

    def run(step: Step) -> None:
        at = 0
        for target in targets:
            target.copy_(source[at : at + target.numel()], non_blocking=True)
            at += target.numel()

    return run


def _waiting_parts(walk: Walk, unit: int, start: int, count: int) -> list[Tensor]:
    """Where elements [start, start + count) of a unit's gradient wait; a tied head's first ones with the
    embedding's."""
    if unit != walk.spec.head.index or not walk.tied:
        return [walk.waiting[unit][start : start + count]]
    matrix = walk.spec.vocab_size * walk.spec.hidden_size
    first = walk.waiting[EMBEDDING][start : min(start + count, matrix)]
    own = walk.waiting[unit][max(0, start - matrix) : max(0, start + count - matrix)]
    return [part for part in (first, own) if part.numel()]


def adam(walk: Walk, index: int, task: Task) -> Operation:
    """The CPU updates a chunk of a layer or of the head."""
    unit, chunk = task.unit, task.chunk
    start = chunk * buffers.chunk_params(walk.plan)
    master = walk.machine.masters[unit]
    stop = min(start + buffers.chunk_params(walk.plan), master.layout.trained)
    late = unit in walk.late
    if late or (walk.tied and unit == walk.spec.head.index):
        if unit == walk.spec.head.index and walk.tied and not walk.deferred:
            start, stop = 0, master.layout.trained
        gradient = walk.waiting[unit][start:stop]
    else:
        gradient = walk.ring[unit, chunk]
    staged = walk.staged_state.get((unit, chunk))
    if master.drive is None:
        state = master.state.range(start, stop)
    else:
        state = master.drive.staged(staged, chunk)
        if not master.drive.whole:
            state = state._replace(high=master.high[start:stop])
    pieces = [(low - start, high - start, hyper) for low, high, hyper in master.layout.pieces(start, stop)]

    def run(step: Step) -> None:
        source = step.source(late=late)
        if not applied(source, walk.plan.clip_norm):
            return
        update = updater(walk, source)
        for low, high, hyper in pieces:
            update(state.range(low, high), gradient[low:high], hyper)

    return run


def updater(walk: Walk, source: Step) -> Callable[[State, Tensor, AdamW], None]:
    """Adam with the step's number, learning rate and clipping."""
    threads, scale = walk.plan.adam_threads, gradient_scale(source, walk.plan.clip_norm)

    def update(state: State, gradient: Tensor, hyper: AdamW) -> None:
        adam_step(
            *state,
            gradient,
            hyper=source.scaled(hyper),
            step=source.update,
            grad_scale=scale,
            threads=threads,
        )

    return update


def row_updater(walk: Walk, source: Step) -> RowUpdate:
    """The same of rows of the embedding tables."""
    threads, scale, width = walk.plan.adam_threads, gradient_scale(source, walk.plan.clip_norm), walk.spec.hidden_size

    def update(state: State, rows: Tensor, places: Tensor, values: Tensor, dense: Tensor | None, hyper: AdamW) -> None:
        adam_rows(
            *state,
            width=width,
            rows=rows,
            places=places,
            values=values,
            dense=dense,
            hyper=source.scaled(hyper),
            step=source.update,
            grad_scale=scale,
            threads=threads,
        )

    return update


def adam_gpu(walk: Walk, index: int, task: Task) -> Operation:
    """The device updates a unit that lives there."""
    unit = task.unit
    master = walk.machine.masters[unit]
    gradient = walk.waiting[unit] if walk.deferred else walk.gradient[unit]

    def run(step: Step) -> None:
        source = step.source(late=walk.deferred)
        if source is None:
            return
        if source.loss_event is not None:
            source.loss_event.synchronize()
        if applied(source, walk.plan.clip_norm):
            scale = gradient_scale(source, walk.plan.clip_norm)
            update_resident(master, gradient, source, scale, walk.plan.adam_threads)

    return run


def read_state(walk: Walk, index: int, task: Task) -> Operation:
    """The state of a chunk of a unit's parameters comes from NVMe."""
    unit, chunk = task.unit, task.chunk
    slot = walk.slot(index, "state staging", torch.uint8)
    walk.staged_state[unit, chunk] = slot
    drive = walk.machine.masters[unit].drive
    return _where_updated(walk, unit, lambda: drive.read_state(slot, chunk))


def write_state(walk: Walk, index: int, task: Task) -> Operation:
    """A chunk's updated state goes back to NVMe from the slot it was read to."""
    unit, chunk = task.unit, task.chunk
    slot = walk.staged_state.pop((unit, chunk))
    drive = walk.machine.masters[unit].drive
    return _where_updated(walk, unit, lambda: drive.write_state(slot, chunk))


def _where_updated(walk: Walk, unit: int, move: Callable[[], None]) -> Operation:
    """Moves a state in the steps that update it: not where a late update isn't owed, or a mere update is another's."""
    late = unit in walk.late

    def run(step: Step) -> None:
        if step.source(late=late) is not None:
            move()

    return run
