"""SlideFormer's own policy as a schedule, so that the simulator can be checked against a system written elsewhere.

After arXiv 2603.16428 and its published code: two GPU cache units, each as large as the largest unit's weights
and gradients; one thread and one stream carry both directions of the link, so nothing is duplex; masters are
fp32, so the thread converts every unit to bf16 before each of its two uploads a step; one host gradient buffer,
so a unit's gradient comes down only once Adam has emptied it of the last; every layer recomputes, every layer
input goes to page-locked RAM; a barrier ends the step. It has no clipping, accumulation or NVMe optimizer here.
"""

from __future__ import annotations

from slidetune.builder import ADAM_BYTES_PER_PARAM, BACKWARD_LAUNCHES, BF16_BYTES
from slidetune.errors import SlidetuneError
from slidetune.kernel_costs import SLIDEFORMER_BOUNDARY_TENSORS
from slidetune.model import STATE_BYTES_PER_PARAM, ModelSpec, Unit
from slidetune.schedule import CPU_ADAM, GPU, Hold, Pool, Schedule, Task, Work
from slidetune.units import MIB

LINK, CONVERT = "link", "convert"
LANES = (GPU, LINK, CONVERT, CPU_ADAM)
CHUNK_BYTES = 64 * MIB
# fp32 read, bf16 written and, with ordinary stores, read for ownership first. The H200 probe converts 13.3 G
# parameters/s where Adam moves 131 GB/s: 9.8 B each.
CONVERT_BYTES_PER_PARAM = 9.8
# int64 ids and labels of a token.
ID_BYTES = 16
# Its fused loss takes the vocabulary in chunks as long as a 32nd of it, with fp32 logits: with seven tensors of
# the hidden size beside them, that is the slope of its published peaks at batch 2 to 8.
HEAD_TENSORS, LOGIT_CHUNKS, LOGIT_BYTES = 7, 32, 4
# Its published RAM is this much above what masters, moments and page-locked buffers add up to.
PROCESS_BYTES = int(1.57 * 2**30)


def build_slideformer(
    model: ModelSpec, *, batch: int, seq_len: int, adam_threads: int, kernels: str = "liger"
) -> Schedule:
    """The schedule of one SlideFormer step of `batch` sequences of `seq_len` tokens."""
    if batch < 1 or seq_len < 1:
        raise SlidetuneError(f"batch ({batch}) and seq_len ({seq_len}) must be at least 1.")
    if seq_len > model.max_seq_len:
        raise SlidetuneError(f"seq_len ({seq_len}) exceeds the model's {model.max_seq_len} positions.")
    return _Step(model, batch, seq_len, adam_threads, kernels).build()


def power_of_two(size: int) -> int:
    """What torch's page-locked allocator takes for `size` bytes."""
    return 1 << max(0, size - 1).bit_length()


class _Step:
    def __init__(self, model: ModelSpec, batch: int, seq_len: int, threads: int, kernels: str) -> None:
        self.model, self.batch, self.seq_len, self.threads, self.kernels = (
            model,
            batch,
            seq_len,
            threads,
            kernels,
        )
        self.tokens = batch * seq_len
        self.hidden_bytes = model.hidden_bytes(batch, seq_len)
        self.tasks: list[Task] = []
        self.holds: list[Hold] = []
        self.visits: list[int] = []
        self.works: dict[tuple, Work] = {}
        # The two cache units: who must be done before each may be filled again.
        self.units: list[tuple[int, ...]] = [(), ()]
        self.taken = 0
        self.emptied: tuple[int, ...] = ()

    def build(self) -> Schedule:
        units, last = self.model.units, len(self.model.units) - 1
        saved: dict[int, int] = {}
        self._visit()
        ready, slot = self._fetch(units[0])
        done = -1
        for i, unit in enumerate(units[:-1]):
            self._visit()
            upcoming = self._fetch(units[i + 1])
            done = self._emit(self._forward(unit, "forward"), unit, (ready, *((done,) if i else ())))
            self.units[slot] = (done,)
            if unit.kind == "layer":
                # A layer's input is what the unit before it left.
                saved[i] = self._transfer("save", unit, self.hidden_bytes, (done,))
            ready, slot = upcoming
        self._visit()
        upcoming = self._fetch_back(units[last - 1], saved)
        done = self._emit(self._head(), units[last], (ready, done))
        self._send(units[last], done, slot)
        for i in reversed(range(last)):
            self._visit()
            unit = units[i]
            ready, slot = upcoming
            if i > 0:
                upcoming = self._fetch_back(units[i - 1], saved)
            if unit.kind == "layer":
                done = self._emit(self._forward(unit, "recompute"), unit, (ready, done))
                done = self._emit(self._backward(unit), unit, (done,))
            else:
                done = self._emit(self._backward(unit), unit, (ready, done))
            self._send(unit, done, slot)
        return self._finished()

    # ---- tasks --------------------------------------------------------------------------------------------

    def _fetch(self, unit: Unit) -> tuple[int, int]:
        """Convert a unit chunk by chunk and upload it into the next cache unit: (last upload, cache unit)."""
        slot, self.taken = self.taken % 2, self.taken + 1
        free = self.units[slot]
        upload = -1
        for params in self._chunks(self._weights(unit)):
            convert = self._work(
                "convert", CONVERT, params=params, param_bytes=CONVERT_BYTES_PER_PARAM, threads=self.threads
            )
            task = self._emit(convert, unit, free)
            upload = self._transfer("fetch", unit, BF16_BYTES * params, (task,))
        return upload, slot

    def _fetch_back(self, unit: Unit, saved: dict[int, int]) -> tuple[int, int]:
        """The same for the backward pass, with the layer's saved input behind its weights."""
        ready, slot = self._fetch(unit)
        if unit.kind == "layer":
            ready = self._transfer("load", unit, self.hidden_bytes, (saved[unit.index],))
        return ready, slot

    def _send(self, unit: Unit, computed: int, slot: int) -> None:
        """The gradient comes down once Adam has emptied the host's one gradient buffer, and is applied."""
        store, adam = computed, ()
        after = (computed, *self.emptied)
        for chunk, params in enumerate(self._chunks(self._weights(unit))):
            store = self._transfer("store", unit, BF16_BYTES * params, after, chunk)
            work = self._work("adam", CPU_ADAM, params=params, param_bytes=ADAM_BYTES_PER_PARAM, threads=self.threads)
            adam = (self._emit(work, unit, (store,), chunk),)
        self.emptied = adam
        self.units[slot] = (store,)

    def _weights(self, unit: Unit) -> int:
        """Elements that travel: a tied head's matrix too, the embedding whole."""
        return max(unit.params, unit.weight_elements)

    def _forward(self, unit: Unit, op: str) -> Work:
        costs = unit.kernels(self.kernels)
        return self._work(
            op,
            GPU,
            flops=unit.forward_flops(self.batch, self.seq_len),
            traffic_bytes=costs.traffic_bytes * self.tokens + BF16_BYTES * unit.weight_elements,
            launches=costs.launches,
        )

    def _backward(self, unit: Unit) -> Work:
        costs = unit.kernels(self.kernels)
        boundary = SLIDEFORMER_BOUNDARY_TENSORS * BF16_BYTES * self.model.hidden_size + ID_BYTES
        layer = unit.kind == "layer"
        per_token = costs.saved_bytes + costs.backward_bytes + boundary if layer else 0
        return self._work(
            "backward",
            GPU,
            flops=unit.backward_flops(self.batch, self.seq_len),
            traffic_bytes=2.0 * (costs.traffic_bytes * self.tokens + BF16_BYTES * unit.weight_elements),
            launches=round(BACKWARD_LAUNCHES * costs.launches),
            # Beside a token's tensors, 0.110 GiB that its published peaks show at any batch.
            working_bytes=per_token * self.tokens + (int(0.110 * 2**30) if layer else 0),
        )

    def _head(self) -> Work:
        model, head = self.model, self.model.head
        per_token = HEAD_TENSORS * BF16_BYTES * model.hidden_size + LOGIT_BYTES * model.vocab_size / LOGIT_CHUNKS
        matrix = BF16_BYTES * model.vocab_size * model.hidden_size
        costs = head.kernels(self.kernels)
        return self._work(
            "head",
            GPU,
            flops=3.0 * head.forward_flops(self.batch, self.seq_len),
            traffic_bytes=24.0 * self.tokens * model.vocab_size + LOGIT_CHUNKS * 12.0 * head.weight_elements,
            launches=LOGIT_CHUNKS * 3 * costs.launches,
            # The fused loss makes a gradient of the head's matrix of its own.
            working_bytes=int(matrix + per_token * self.tokens),
        )

    # ---- plumbing -----------------------------------------------------------------------------------------

    def _chunks(self, params: int) -> list[int]:
        size = CHUNK_BYTES // BF16_BYTES
        whole, rest = divmod(params, size)
        return [size] * whole + [rest] * (rest > 0)

    def _visit(self) -> None:
        self.visits.append(len(self.tasks))

    def _work(self, op: str, lane: str, **amounts: float) -> Work:
        key = (op, lane, *amounts.values())
        if key not in self.works:
            self.works[key] = Work(op=op, lane=lane, **amounts)  # type: ignore[arg-type]
        return self.works[key]

    def _transfer(self, op: str, unit: Unit, size: int, after: tuple[int, ...], chunk: int = -1) -> int:
        return self._emit(self._work(op, LINK, bytes=size), unit, after, chunk)

    def _emit(self, work: Work, unit: Unit, after: tuple[int, ...], chunk: int = -1) -> int:
        self.tasks.append(Task(work, unit.index, 0, chunk, after))
        return len(self.tasks) - 1

    def _finished(self) -> Schedule:
        # The barrier: no lane begins a step before every lane has ended the last.
        last = {task.work.lane: i for i, task in enumerate(self.tasks)}
        first: dict[str, int] = {}
        for i, task in enumerate(self.tasks):
            first.setdefault(task.work.lane, i)
        for i in first.values():
            self.tasks[i] = self.tasks[i]._replace(after_previous=tuple(last.values()))
        return Schedule(
            name="slideformer",
            lanes=LANES,
            tasks=tuple(self.tasks),
            pools=tuple(self._pools()),
            holds=tuple(self.holds),
            tokens=self.tokens,
            visits=tuple(self.visits),
        )

    def _pools(self) -> list[Pool]:
        model = self.model
        largest = max(self._weights(unit) for unit in model.units)
        layers = len(model.layers)
        return [
            Pool(name="cache units", tier="gpu", slots=2, slot_bytes=2 * BF16_BYTES * largest),
            Pool(
                name="masters and moments",
                tier="ram",
                slots=1,
                slot_bytes=STATE_BYTES_PER_PARAM * model.params,
            ),
            Pool(
                name="gradient and weight buffers",
                tier="ram",
                slots=2,
                slot_bytes=power_of_two(BF16_BYTES * largest),
                page_locked=True,
            ),
            Pool(
                name="saved inputs",
                tier="ram",
                slots=layers,
                slot_bytes=power_of_two(self.hidden_bytes),
                page_locked=True,
            ),
            Pool(name="process", tier="ram", slots=1, slot_bytes=PROCESS_BYTES),
        ]
