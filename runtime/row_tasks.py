"""Tasks of the embedding: rows up, their gradient down, and the update of all rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from slidetune.runtime.clipping import applied
from slidetune.runtime.rounding import round_in_place
from slidetune.runtime.row_kernels import growth_of_squares
from slidetune.runtime.rows import RowGradients
from slidetune.runtime.steps import Step
from slidetune.runtime.update_tasks import row_updater
from slidetune.runtime.walk import Operation, Walk, as_hidden
from slidetune.schedule import Task


def gather(walk: Walk, index: int, task: Task) -> Operation:
    """The first layer's input goes up."""
    m = task.micro_batch
    target = walk.slot(index, "hidden states")
    target = walk.slot(index, "saved inputs") if target is None else target
    walk.hidden[0, m] = target
    staging = _rows_staging(walk, 0, m)
    # In evaluation the host may be a pass ahead of the device.
    copied = torch.cuda.Event(blocking=True) if walk.device.type == "cuda" else None

    def run(step: Step) -> None:
        shape = step.micro_batches[m].shape
        staged = as_hidden(staging, shape, walk.spec.hidden_size)
        if copied is not None:
            copied.synchronize()
        there = as_hidden(target, shape, walk.spec.hidden_size).flatten(0, 1)
        here = staged.flatten(0, 1)
        for piece in walk.embedding.gather(step, m, staged, walk.plan.adam_threads):
            there[piece].copy_(here[piece], non_blocking=True)
        if copied is not None:
            copied.record()

    return run


def _rows_staging(walk: Walk, slot: int, m: int) -> Tensor:
    size = walk.spec.hidden_size * walk.plan.micro_batch * walk.plan.seq_len
    return walk.pools.slot("embedding rows", slot)[m * size : (m + 1) * size]


def store_rows(walk: Walk, index: int, task: Task) -> Operation:
    """The gradient of the first layer's input becomes that of the embedding's rows, which comes down."""
    m = task.micro_batch
    source, staging, summed = walk.upstream[m], _rows_staging(walk, 1, m), walk.slot(index, "hidden states")
    last, width = walk.plan.accumulation - 1, walk.spec.hidden_size
    sums = walk.pools.slot("row gradients", 0, torch.float32 if last else torch.bfloat16)

    def run(step: Step) -> None:
        batch = step.micro_batches[m]
        upstream = as_hidden(source, batch.shape, width)
        flat = sums[: step.rows.numel() * width]
        rows = flat.view(-1, width)
        if walk.embedding.sums_there(step, m):
            there = summed[: flat.numel()].view(-1, width).data
            walk.embedding.sum_there(step, m, upstream.flatten(0, 1), there)
            rows.copy_(there, non_blocking=True)
        else:
            staged = as_hidden(staging, batch.shape, width)
            staged.copy_(upstream, non_blocking=True)
            walk.synchronize()
            walk.embedding.add_gradients(step, m, staged, rows, walk.plan.adam_threads)
        if m == last:
            rounded = round_in_place(flat) if last else flat
            step.row_gradients = RowGradients(step.rows, rounded.view(-1, width))
            step.compact_rows = []
            _count_row_squares(walk, step)

    return run


def _count_row_squares(walk: Walk, step: Step) -> None:
    if walk.plan.clip_norm is None:
        return
    walk.synchronize()
    # A tied matrix's squares were counted without the rows' part.
    dense = None if walk.dense is None else walk.dense.view(-1, walk.spec.hidden_size)
    step.host_squares += growth_of_squares(step.row_gradients.values, step.rows, dense, threads=walk.plan.adam_threads)


def adam_rows(walk: Walk, index: int, task: Task) -> Operation:
    """Bring a part of the rows that the step reads up to date: all of them, or where the step before has updated what
    it didn't read itself, those that it read."""

    def due(step: Step, source: Step) -> Tensor | None:
        if step.rows is None or not walk.rest_within:
            return step.rows
        return step.rows[torch.from_numpy(source.row_gradients.places(step.rows.numpy()) >= 0)]

    return _adam_on_rows(walk, task, "rows", due)


def adam_other_rows(walk: Walk, index: int, task: Task) -> Operation:
    """Update a part of the rows that the step before read and this one doesn't."""

    def due(step: Step, source: Step) -> Tensor | None:
        if step.rows is None:
            return source.rows
        others = np.ones(walk.embedding.table.shape[0], dtype=bool)
        others[step.rows.numpy()] = False
        return source.rows[torch.from_numpy(others[source.rows.numpy()])]

    return _adam_on_rows(walk, task, "other rows", due)


def _adam_on_rows(walk: Walk, task: Task, name: str, due: Callable[[Step, Step], Tensor | None]) -> Operation:
    part, parts = task.chunk, walk.parts_of_rows[name]

    def run(step: Step) -> None:
        source = step.source(late=True)
        if not applied(source, walk.plan.clip_norm):
            return
        ids = due(step, source)
        if ids is not None:
            mine = ids.tensor_split(parts)[part]
            walk.machine.tables.update_rows(mine, walk.dense, source.row_gradients, row_updater(walk, source))

    return run


def adam_rest(walk: Walk, index: int, task: Task) -> Operation:
    """Update a part of the rows that the step doesn't read."""
    part, parts = task.chunk, walk.parts_of_rows["rest"]

    def run(step: Step) -> None:
        source = step.source(late=not walk.rest_within)
        if not applied(source, walk.plan.clip_norm):
            return
        but = step.rows if step.rows is not None else torch.zeros(0, dtype=torch.long)
        gradients = None if walk.rest_within else source.row_gradients
        walk.machine.tables.update_rest(part, parts, but, walk.dense, gradients, row_updater(walk, source))

    return run
