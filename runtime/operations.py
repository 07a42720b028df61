"""What each task of a schedule does, bound once to the buffers its holds give it.

`Operations` walks the schedule in its order and keeps, as the builder does, where everything is: a task that takes a
slot moves something there, later tasks find it. What comes out is one function a task, `run[i](step)`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from slidetune import buffers
from slidetune.model import ModelSpec
from slidetune.plans import Placement, Plan
from slidetune.runtime.adam import AdamW, adam_step
from slidetune.runtime.binding import Parts
from slidetune.runtime.clipping import add_squares, gradient_scale
from slidetune.runtime.embedding import HostEmbedding
from slidetune.runtime.masters import Master, State
from slidetune.runtime.pointing import Pointed
from slidetune.runtime.pools import Pools
from slidetune.runtime.randomness import Randomness
from slidetune.runtime.resident import update_resident
from slidetune.runtime.rows import RowGradients, RowTables
from slidetune.runtime.saved import Inner
from slidetune.runtime.steps import Step
from slidetune.schedule import CPU_ADAM, D2H, GPU, H2D, NVME_READ, NVME_WRITE, Schedule, Task

Operation = Callable[[Step], None]
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
    nvme: Any = None
    inputs_at: dict[tuple[int, int], int] | None = None
    """Where in the NVMe file saved inputs go, by layer and micro-batch."""
    loss_chunk: int = 0
    """Tokens whose logits exist at a time."""


class Operations:
    """`run[i]` carries out task i of the schedule."""

    def __init__(self, schedule: Schedule, machine: Machine) -> None:
        self.schedule, self.machine = schedule, machine
        self.spec, self.plan, self.pools, self.device = machine.spec, machine.plan, machine.pools, machine.device
        self.layers = len(self.spec.layers)
        self.deferred = self.plan.update == "forward"
        # A tied matrix that is trained gets its gradient from the head and from the rows.
        self.tied = self.spec.tied and self.spec.embedding.params > 0
        # The embedding's update of a step is made in the next one, unless the head needs the matrix before.
        self.rows_late = self.deferred or not self.tied
        self._taken: dict[int, dict[str, int]] = {}
        for hold in schedule.holds:
            self._taken.setdefault(hold.first, {})[schedule.pools[hold.pool].name] = hold.slot
        # Where things are, as the walk goes on.
        self.weights: dict[int, Tensor] = self._resident_weights()
        self.hidden: dict[tuple[int, int], Tensor] = {}
        self.in_ram: dict[tuple[int, int], Tensor] = {}
        self.upstream: dict[int, Tensor] = {}
        self.gradient: dict[int, Tensor] = {}
        self.ring: dict[tuple[int, int], Tensor] = {}
        self.staged_weights: dict[int, Tensor] = {}
        self.staged_state: dict[tuple[int, int], Tensor] = {}
        self.inner: dict[tuple[int, int], Inner] = {}
        self.parts_of_rows = {
            part: sum(task.work.op == f"adam {part}" for task in schedule.tasks) for part in ("rows", "rest")
        }
        self._place_gradients()
        self.embedding = HostEmbedding(
            machine.parts, machine.masters[EMBEDDING].high, self.spec.hidden_size, machine.randomness
        )
        self._head = machine.parts.head()
        self.run = [self._bound(index, task) for index, task in enumerate(schedule.tasks)]

    # ---- binding ------------------------------------------------------------------------------------------

    def _bound(self, index: int, task: Task) -> Operation:
        op, lane = task.work.op, task.work.lane
        bind = _BINDERS[op, lane]
        run = bind(self, index, task)
        updates = op.startswith("adam") or op in ("read state", "write state")
        return run if updates else _skipped_if_only_update(run)

    def _slot(self, index: int, pool: str, dtype: torch.dtype = torch.bfloat16) -> Tensor | None:
        """The slot of a pool that a task takes, None if it takes none."""
        number = self._taken.get(index, {}).get(pool)
        return None if number is None else self.pools.slot(pool, number, dtype)

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
        masters = self.machine.masters
        if self.deferred:
            gpu_at = ram_at = 0
            for unit in self.spec.units:
                size = masters[unit.index].layout.trained
                place = self._placement(unit.index)
                if place is not None and place.resident:
                    self.waiting[unit.index] = self.pools.slot("resident gradients")[gpu_at : gpu_at + size]
                    gpu_at += size
                else:
                    self.waiting[unit.index] = self.pools.slot("all gradients")[ram_at : ram_at + size]
                    ram_at += size
        elif self.tied:
            self.waiting[EMBEDDING] = self.pools.slot("tied gradient")
            own = torch.zeros(self.spec.head.params, dtype=torch.bfloat16)
            self.waiting[self.spec.head.index] = own.pin_memory() if self.device.type == "cuda" else own
        self.dense = self.waiting[EMBEDDING] if self.tied else None

    def _placement(self, unit: int) -> Placement | None:
        return self.machine.places[unit - 1] if 0 < unit <= self.layers else None

    # ---- embedding ----------------------------------------------------------------------------------------

    def _gather(self, index: int, task: Task) -> Operation:
        m = task.micro_batch
        target = self._slot(index, "hidden states")
        target = self._slot(index, "saved inputs") if target is None else target
        self.hidden[0, m] = target
        staging = self._rows_staging(0, m)

        def run(step: Step) -> None:
            shape = step.micro_batches[m].shape
            staged = _as_hidden(staging, shape, self.spec.hidden_size)
            self.embedding.gather(step, m, staged)
            _as_hidden(target, shape, self.spec.hidden_size).copy_(staged, non_blocking=True)

        return run

    def _rows_staging(self, slot: int, m: int) -> Tensor:
        size = self.spec.hidden_size * self.plan.micro_batch * self.plan.seq_len
        return self.pools.slot("embedding rows", slot)[m * size : (m + 1) * size]

    def _store_rows(self, index: int, task: Task) -> Operation:
        """The gradient of the first layer's input comes down and becomes that of the embedding's rows."""
        m = task.micro_batch
        source, staging = self.upstream[m], self._rows_staging(1, m)
        last = self.plan.accumulation - 1

        def run(step: Step) -> None:
            batch = step.micro_batches[m]
            staged = _as_hidden(staging, batch.shape, self.spec.hidden_size)
            staged.copy_(_as_hidden(source, batch.shape, self.spec.hidden_size), non_blocking=True)
            self._synchronize()
            values = self.embedding.gradients(step, m, staged)
            if m == 0 and last > 0:
                values = values.float()
            if m == 0:
                step.row_gradients = RowGradients(step.rows, values)
            else:
                step.row_gradients.values.add_(values)
            if m == last:
                step.row_gradients.values = step.row_gradients.values.to(torch.bfloat16)
                step.compact_rows = []
                self._count_row_squares(step)

        return run

    def _count_row_squares(self, step: Step) -> None:
        if self.plan.clip_norm is None:
            return
        values = step.row_gradients.values
        if self.dense is not None:
            # The matrix's squares were counted without the rows' part.
            head = self.dense.view(-1, self.spec.hidden_size).index_select(0, step.rows)
            step.host_squares -= float(head.double().square().sum())
            values = head + values
        step.host_squares += float(values.double().square().sum())

    def _adam_rows(self, index: int, task: Task) -> Operation:
        part, parts = task.chunk, self.parts_of_rows["rows"]

        def run(step: Step) -> None:
            source = step.source(late=self.rows_late)
            if source is None or not source.good or step.rows is None:
                return
            ids = step.rows.tensor_split(parts)[part]
            dense = self.dense
            self.machine.tables.update_rows(ids, dense, source.row_gradients, self._updater(source))

        return run

    def _adam_rest(self, index: int, task: Task) -> Operation:
        part, parts = task.chunk, self.parts_of_rows["rest"]

        def run(step: Step) -> None:
            source = step.source(late=self.rows_late)
            if source is None or not source.good:
                return
            but = step.rows if step.rows is not None else torch.zeros(0, dtype=torch.long)
            gradients = source.row_gradients if self.rows_late else None
            self.machine.tables.update_rest(part, parts, but, self.dense, gradients, self._updater(source))

        return run

    # ---- weights ------------------------------------------------------------------------------------------

    def _fetch(self, index: int, task: Task) -> Operation:
        unit = task.unit
        master = self.machine.masters[unit]
        target = self._slot(index, "weights")
        if unit == self.spec.head.index:
            return self._fetch_head(self._slot(index, "head weights"))
        if target is None:
            target = self.weights[unit]
        self.weights[unit] = target = target[: master.layout.total]
        place = self._placement(unit)
        source = self.staged_weights[unit] if place.weights == "nvme" else master.high

        def run(step: Step) -> None:
            target.copy_(source, non_blocking=True)

        return run

    def _fetch_head(self, target: Tensor) -> Operation:
        head = self.spec.head
        self.weights[head.index] = target = target[: head.weight_elements]
        sources = [self.machine.masters[head.index].high]
        if self.spec.tied:
            matrix = self.spec.vocab_size * self.spec.hidden_size
            # The matrix comes first, but a frozen one last: so has the layout it.
            first = self.machine.pointed[head.index].layout.entries[0].numel == matrix
            sources.insert(0 if first else 1, self.machine.masters[EMBEDDING].high[:matrix])

        def run(step: Step) -> None:
            at = 0
            for source in sources:
                target[at : at + source.numel()].copy_(source, non_blocking=True)
                at += source.numel()

        return run

    def _read_weights(self, index: int, task: Task) -> Operation:
        drive = self.machine.masters[task.unit].drive
        slot = self._slot(index, "weight staging", torch.uint8)
        self.staged_weights[task.unit] = slot[: 2 * drive.layout.total].view(torch.bfloat16)

        def run(step: Step) -> None:
            drive.read_weights(slot)

        return run

    # ---- layers -------------------------------------------------------------------------------------------

    def _forward(self, index: int, task: Task) -> Operation:
        i, m = task.unit - 1, task.micro_batch
        source = self.hidden[i, m]
        target = self._slot(index, "hidden states")
        target = self._slot(index, "saved inputs") if target is None else target
        self.hidden[i + 1, m] = target
        pointed, weights = self.machine.pointed[task.unit], self.weights[task.unit]
        inner = None
        if self.machine.places[i].inner != "recompute":
            inner = self.inner[i, m] = Inner(self.device)

        def run(step: Step) -> None:
            batch = step.micro_batches[m]
            if i == 0 and m == 0 and step.prepared is not None:
                torch.cuda.current_stream(self.device).wait_event(step.prepared)
            pointed.point(weights)
            x = _as_hidden(source, batch.shape, self.spec.hidden_size)
            if inner is None:
                with torch.no_grad():
                    out = self._layer(step, i, m, x)
            else:
                x.requires_grad_()
                with torch.enable_grad(), inner.collecting(batch.shared, x, weights):
                    out = self._layer(step, i, m, x)
                step.graphs[i, m] = (x, get_gradient_edge(out))
            with torch.no_grad():
                _as_hidden(target, batch.shape, self.spec.hidden_size).copy_(out.detach())

        return run

    def _layer(self, step: Step, i: int, m: int, x: Tensor) -> Tensor:
        args, kwargs = step.micro_batches[m].calls[i]
        with self._randomly(step, i + 1, m):
            out = self.machine.parts.layers[i](x, *args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def _recompute(self, index: int, task: Task) -> Operation:
        i, m = task.unit - 1, task.micro_batch
        source = self.hidden[i, m]
        pointed, weights = self.machine.pointed[task.unit], self.weights[task.unit]

        def run(step: Step) -> None:
            pointed.point(weights)
            x = _as_hidden(source, step.micro_batches[m].shape, self.spec.hidden_size).requires_grad_()
            with torch.enable_grad():
                step.graphs[i, m] = (x, get_gradient_edge(self._layer(step, i, m, x)))

        return run

    def _backward(self, index: int, task: Task) -> Operation:
        i, m, unit = task.unit - 1, task.micro_batch, task.unit
        accumulates = self.plan.accumulation > 1
        pointed, weights, source = self.machine.pointed[unit], self.weights[unit], self.hidden[i, m]
        if m == 0:
            slot = self._slot(index, "gradients", torch.float32 if accumulates else torch.bfloat16)
            self.gradient[unit] = None if slot is None else slot[: pointed.layout.trained]
        gradient, upstream = self.gradient[unit], self.upstream[m]
        place, inner = self.machine.places[i], self.inner.pop((i, m), None)
        last = m == self.plan.accumulation - 1
        keeps = self.waiting.get(unit) if place.resident and last and gradient is not None else None

        def run(step: Step) -> None:
            shape = step.micro_batches[m].shape
            x, out = step.graphs.pop((i, m))
            pointed.collect_into(gradient, fresh=m == 0)
            upward = _as_hidden(upstream, shape, self.spec.hidden_size)
            again = contextlib.nullcontext()
            if inner is not None:
                again = inner.brought_back(_as_hidden(source, shape, self.spec.hidden_size), weights)
            with again:
                torch.autograd.backward(out, upward)
            if m == 0:
                pointed.finish_collecting()
            upward.copy_(x.grad)
            if keeps is not None:
                keeps.copy_(gradient)
                if self.plan.clip_norm is not None:
                    add_squares(step.squares[1], keeps)

        return run

    # ---- head ---------------------------------------------------------------------------------------------

    def _head_task(self, index: int, task: Task) -> Operation:
        m, unit = task.micro_batch, task.unit
        pointed, weights = self.machine.pointed[unit], self.weights[unit]
        if m == 0:
            slot = self._slot(index, "head gradient", torch.float32)
            self.gradient[unit] = None if slot is None else slot[: pointed.layout.trained]
        gradient = self.gradient[unit]
        hidden = self.upstream[m] = self.hidden[self.layers, m]
        last = m == self.plan.accumulation - 1

        def run(step: Step) -> None:
            pointed.point(weights)
            pointed.collect_into(gradient, fresh=m == 0)
            loss = self._loss(step, m, hidden)
            step.losses[m].copy_(loss, non_blocking=True)
            if m == 0:
                pointed.finish_collecting()
            if last and self.device.type == "cuda":
                step.loss_event = torch.cuda.Event(blocking=True)
                step.loss_event.record()

        return run

    def _loss(self, step: Step, m: int, hidden: Tensor) -> Tensor:
        """Forward and backward of norm, head and loss, some tokens at a time; the gradient takes the place of the
        hidden states."""
        batch, parts = step.micro_batches[m], self.machine.parts
        rows = _as_hidden(hidden, batch.shape, self.spec.hidden_size).view(-1, self.spec.hidden_size)
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        size = self.machine.loss_chunk
        for start in range(0, rows.shape[0], size):
            part = rows[start : start + size]
            with torch.enable_grad(), self._randomly(step, self.spec.head.index, m):
                x = part.data.requires_grad_()
                loss = parts.loss(self._head(x.unsqueeze(0)), batch.labels[start : start + size], step.items)
                loss.backward()
            total += loss.detach()
            part.copy_(x.grad)
        return total

    # ---- activations --------------------------------------------------------------------------------------

    def _save(self, index: int, task: Task) -> Operation:
        i, m = task.unit - 1, task.micro_batch
        target = self._slot(index, "saved inputs (RAM)")
        target = self._slot(index, "input staging") if target is None else target
        source = self.hidden[i, m]
        self.in_ram[i, m] = target

        def run(step: Step) -> None:
            shape = step.micro_batches[m].shape
            _as_hidden(target, shape, self.spec.hidden_size).copy_(
                _as_hidden(source, shape, self.spec.hidden_size), non_blocking=True
            )

        return run

    def _load(self, index: int, task: Task) -> Operation:
        i, m = task.unit - 1, task.micro_batch
        source = self.in_ram[i, m]
        target = self.hidden[i, m] = self._slot(index, "hidden states")

        def run(step: Step) -> None:
            shape = step.micro_batches[m].shape
            _as_hidden(target, shape, self.spec.hidden_size).copy_(
                _as_hidden(source, shape, self.spec.hidden_size), non_blocking=True
            )

        return run

    def _write_input(self, index: int, task: Task) -> Operation:
        i, m = task.unit - 1, task.micro_batch
        raw = self.in_ram[i, m].view(torch.uint8)
        return self._move_input("write", raw, i, m)

    def _read_input(self, index: int, task: Task) -> Operation:
        i, m = task.unit - 1, task.micro_batch
        raw = self._slot(index, "input staging", torch.uint8)
        self.in_ram[i, m] = raw.view(torch.bfloat16)
        return self._move_input("read", raw, i, m)

    def _move_input(self, direction: str, raw: Tensor, i: int, m: int) -> Operation:
        from slidetune.runtime.nvme import aligned

        move, offset = getattr(self.machine.nvme, direction), self.machine.inputs_at[i, m]
        size = self.spec.hidden_size * torch.bfloat16.itemsize

        def run(step: Step) -> None:
            sequences, tokens = step.micro_batches[m].shape
            move(offset, raw[: aligned(size * sequences * tokens)])

        return run

    def _save_inner(self, index: int, task: Task) -> Operation:
        key = task.unit - 1, task.micro_batch
        inner, slot = self.inner[key], self._slot(index, "inner activations (RAM)", torch.uint8)
        return lambda step: inner.save(slot)

    def _load_inner(self, index: int, task: Task) -> Operation:
        key = task.unit - 1, task.micro_batch
        inner = self.inner[key]
        return lambda step: inner.load()

    # ---- gradients and updates ----------------------------------------------------------------------------

    def _store(self, index: int, task: Task) -> Operation:
        if task.unit == EMBEDDING:
            return self._store_rows(index, task)
        unit, chunk = task.unit, task.chunk
        start = chunk * buffers.chunk_params(self.plan)
        source = self.gradient[unit][start : start + buffers.chunk_params(self.plan)]
        count = source.numel()
        ring = self._slot(index, "gradient ring")
        if ring is not None:
            self.ring[unit, chunk] = ring[:count]
            targets = [ring[:count]]
        else:
            targets = self._waiting_parts(unit, start, count)
        rounded = None
        if source.dtype != torch.bfloat16:
            rounded = self.pools.slot("rounded gradient", chunk % 2)[:count]

        def run(step: Step) -> None:
            values = source
            if rounded is not None:
                rounded.copy_(source)
                values = rounded
            at = 0
            for target in targets:
                target.copy_(values[at : at + target.numel()], non_blocking=True)
                at += target.numel()
            if self.plan.clip_norm is not None:
                add_squares(step.squares[0], values)

        return run

    def _waiting_parts(self, unit: int, start: int, count: int) -> list[Tensor]:
        """Where elements [start, start + count) of a unit's gradient wait; a tied head's first ones with the
        embedding's."""
        if unit != self.spec.head.index or not self.tied:
            return [self.waiting[unit][start : start + count]]
        matrix = self.spec.vocab_size * self.spec.hidden_size
        first = self.waiting[EMBEDDING][start : min(start + count, matrix)]
        own = self.waiting[unit][max(0, start - matrix) : max(0, start + count - matrix)]
        return [part for part in (first, own) if part.numel()]

    def _adam(self, index: int, task: Task) -> Operation:
        unit, chunk = task.unit, task.chunk
        start = chunk * buffers.chunk_params(self.plan)
        master = self.machine.masters[unit]
        stop = min(start + buffers.chunk_params(self.plan), master.layout.trained)
        if self.deferred or (self.tied and unit == self.spec.head.index):
            if unit == self.spec.head.index and self.tied and not self.deferred:
                start, stop = 0, master.layout.trained
            gradient = self.waiting[unit][start:stop]
        else:
            gradient = self.ring[unit, chunk]
        staged = self.staged_state.pop((unit, chunk), None)
        if master.drive is None:
            state = master.state.range(start, stop)
        else:
            state = master.drive.staged(staged, chunk)
            if not master.drive.whole:
                state = state._replace(high=master.high[start:stop])
        pieces = [(low - start, high - start, hyper) for low, high, hyper in master.layout.pieces(start, stop)]

        def run(step: Step) -> None:
            source = step.source(late=self.deferred)
            if source is None or not source.good:
                return
            update = self._updater(source)
            for low, high, hyper in pieces:
                update(state.range(low, high), gradient[low:high], hyper)

        return run

    def _updater(self, source: Step) -> Callable[[State, Tensor, AdamW], None]:
        """Adam with the step's number, learning rate and clipping."""
        threads, scale = self.plan.adam_threads, gradient_scale(source, self.plan.clip_norm)

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

    def _adam_gpu(self, index: int, task: Task) -> Operation:
        unit = task.unit
        master = self.machine.masters[unit]
        gradient = self.waiting[unit] if self.deferred else self.gradient[unit]

        def run(step: Step) -> None:
            source = step.source(late=self.deferred)
            if source is None:
                return
            if source.loss_event is not None:
                source.loss_event.synchronize()
            if source.good:
                scale = gradient_scale(source, self.plan.clip_norm)
                update_resident(master, gradient, source, scale)

        return run

    def _read_state(self, index: int, task: Task) -> Operation:
        unit, chunk = task.unit, task.chunk
        slot = self._slot(index, "state staging", torch.uint8)
        self.staged_state[unit, chunk] = slot
        drive = self.machine.masters[unit].drive
        return lambda step: drive.read_state(slot, chunk)

    def _write_state(self, index: int, task: Task) -> Operation:
        unit, chunk = task.unit, task.chunk
        # The slot that this chunk's read took.
        slot = self._state_slot(index, unit, chunk)
        drive = self.machine.masters[unit].drive
        return lambda step: drive.write_state(slot, chunk)

    def _state_slot(self, index: int, unit: int, chunk: int) -> Tensor:
        for hold in self.schedule.holds:
            if index in hold.last and self.schedule.pools[hold.pool].name == "state staging":
                return self.pools.slot("state staging", hold.slot, torch.uint8)
        raise AssertionError(f"no staging for unit {unit}, chunk {chunk}")

    # ---- plumbing -----------------------------------------------------------------------------------------

    def _randomly(self, step: Step, unit: int, m: int) -> Any:
        return self.machine.randomness.on(self.device, step.number, unit, m)

    def _synchronize(self) -> None:
        """Wait for this lane's stream."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def _as_hidden(slot: Tensor, shape: tuple[int, int], width: int) -> Tensor:
    """A slot as hidden states [sequences, tokens, width], with a version counter of their own."""
    sequences, tokens = shape
    return slot[: sequences * tokens * width].view(sequences, tokens, width).data


def _skipped_if_only_update(run: Operation) -> Operation:
    def skipping(step: Step) -> None:
        if not step.only_update:
            run(step)

    return skipping


_BINDERS = {
    ("gather", H2D): Operations._gather,
    ("fetch", H2D): Operations._fetch,
    ("load", H2D): Operations._load,
    ("load inner", H2D): Operations._load_inner,
    ("forward", GPU): Operations._forward,
    ("recompute", GPU): Operations._recompute,
    ("backward", GPU): Operations._backward,
    ("head", GPU): Operations._head_task,
    ("adam", GPU): Operations._adam_gpu,
    ("save", D2H): Operations._save,
    ("save inner", D2H): Operations._save_inner,
    ("store", D2H): Operations._store,
    ("adam", CPU_ADAM): Operations._adam,
    ("adam rows", CPU_ADAM): Operations._adam_rows,
    ("adam rest", CPU_ADAM): Operations._adam_rest,
    ("read weights", NVME_READ): Operations._read_weights,
    ("read state", NVME_READ): Operations._read_state,
    ("read input", NVME_READ): Operations._read_input,
    ("write state", NVME_WRITE): Operations._write_state,
    ("write input", NVME_WRITE): Operations._write_input,
}
