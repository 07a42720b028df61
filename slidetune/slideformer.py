"""SlideFormer's own policy as a schedule, so that the simulator can be checked against a system written elsewhere.

After arXiv 2603.16428 and its published code: two GPU cache units, each as large as the largest unit's weights
and gradients; one thread and one stream carry both directions of the link, so nothing is duplex; masters are
fp32, so the thread converts every unit to bf16 before each of its two uploads a step, and converts the next one
only when the last transfer has ended; one host gradient buffer, so a unit's gradient comes down only once Adam
has emptied it of the last; every layer recomputes, every layer input goes to page-locked RAM; a barrier ends the
step. It has no clipping, accumulation or NVMe optimizer here.

Left out, since together they move a step by less than 2 %: activations have a stream of their own, the last
layer's input stays on the GPU, and at most four gradient chunks wait for Adam.

benchmarks/slideformer.py compares this with the published steps and peaks.
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
# Its fused loss holds seven tensors of the hidden size (the slope of its published peaks at batch 2 to 8) and the
# bf16 logits of two chunks: a chunk's name is bound anew only after the next one's product.
HEAD_TENSORS, LOGIT_BYTES = 7, 2 * BF16_BYTES
# Device-memory traffic of that loss. A logit: product, two passes of the loss and its gradient, two more products.
# An element of the head's matrix and chunk: two products read it, a third reads and writes its gradient; and once a
# step that gradient is cleared and added to the cache unit's.
LOGIT_TRAFFIC, MATRIX_TRAFFIC, MATRIX_TRAFFIC_ONCE = 12.0, 8.0, 10.0
# cuBLAS keeps 4096 KiB twice and 16 KiB eight times for each thread that multiplies: the forward's and autograd's.
WORKSPACE_BYTES = 2 * (2 * 4096 + 8 * 16) * 1024
# Its published RAM is this much above what masters, moments and page-locked buffers add up to.
PROCESS_BYTES = int(1.57 * 2**30)


def build_slideformer(
    model: ModelSpec, *, batch: int, seq_len: int, adam_threads: int, kernels: str = "liger"
) -> Schedule:
    """The schedule of one SlideFormer step of `batch` sequences of `seq_len` tokens.

    `adam_threads` CPU threads convert and update: all cores, as torch and OpenMP take them. Raises
    `SlidetuneError` for sizes that make no step.
    """
    for name, value in (("batch", batch), ("seq_len", seq_len), ("adam_threads", adam_threads)):
        if value < 1:
            raise SlidetuneError(f"{name} ({value}) must be at least 1.")
    if kernels not in ("eager", "liger"):
        raise SlidetuneError(f"kernels is {kernels!r}; it must be eager or liger.")
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
        self.pools = self._pools()
        self.pool = {pool.name: i for i, pool in enumerate(self.pools)}
        # The two cache units: who must be done before each may be filled again.
        self.units: list[tuple[int, ...]] = [(), ()]
        self.filled = [-1, -1]
        self.taken = 0
        # The last weights or gradients the one thread sent, and Adam's last task.
        self.sent: tuple[int, ...] = ()
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
            self._release(slot, done)
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
        after = (*self.units[slot], *self.sent)
        first, upload = len(self.tasks), -1
        for params in self._chunks(self._weights(unit)):
            convert = self._work(
                "convert", CONVERT, params=params, param_bytes=CONVERT_BYTES_PER_PARAM, threads=self.threads
            )
            task = self._emit(convert, unit, after)
            upload = self._transfer("fetch", unit, BF16_BYTES * params, (task,))
        self._hold("weight buffer", 0, first, upload)
        self.filled[slot], self.sent = first, (upload,)
        return upload, slot

    def _fetch_back(self, unit: Unit, saved: dict[int, int]) -> tuple[int, int]:
        """The same for the backward pass, with the layer's saved input behind its weights."""
        ready, slot = self._fetch(unit)
        if unit.kind == "layer":
            ready = self._transfer("load", unit, self.hidden_bytes, (saved[unit.index],))
            self._hold("saved inputs", unit.index - 1, saved[unit.index], ready)
        return ready, slot

    def _send(self, unit: Unit, computed: int, slot: int) -> None:
        """The gradient comes down once Adam has emptied the host's one gradient buffer, and is applied.

        A tied head's matrix is only kept, for Adam to apply with the embedding's gradient.
        """
        first, store, left = len(self.tasks), computed, unit.params
        after = (computed, *self.emptied)
        for chunk, params in enumerate(self._chunks(self._weights(unit))):
            store = self._transfer("store", unit, BF16_BYTES * params, after, chunk)
            if (updated := min(params, left)) > 0:
                work = self._work(
                    "adam", CPU_ADAM, params=updated, param_bytes=ADAM_BYTES_PER_PARAM, threads=self.threads
                )
                self.emptied = (self._emit(work, unit, (store,), chunk),)
                left -= updated
        self._hold("gradient buffer", 0, first, store, *self.emptied)
        self._release(slot, store)
        self.sent = (store,)

    def _release(self, slot: int, reader: int) -> None:
        """The cache unit may be filled again once `reader` is done."""
        self._hold("cache units", slot, self.filled[slot], reader)
        self.units[slot] = (reader,)

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
            # Autograd makes a weight's gradient before it adds it to the cache unit's.
            working_bytes=per_token * self.tokens + BF16_BYTES * unit.largest_tensor * layer,
        )

    def _head(self) -> Work:
        model, head = self.model, self.model.head
        hidden = HEAD_TENSORS * BF16_BYTES * model.hidden_size * self.tokens
        matrix = BF16_BYTES * model.vocab_size * model.hidden_size
        chunk = self._logit_tokens()
        chunks = -(-self.tokens // chunk)
        costs = head.kernels(self.kernels)
        return self._work(
            "head",
            GPU,
            flops=3.0 * head.forward_flops(self.batch, self.seq_len),
            traffic_bytes=LOGIT_TRAFFIC * model.vocab_size * self.tokens
            + (MATRIX_TRAFFIC * chunks + MATRIX_TRAFFIC_ONCE) * head.weight_elements,
            launches=chunks * 3 * costs.launches,
            # The fused loss makes a gradient of the head's matrix of its own.
            working_bytes=matrix + hidden + LOGIT_BYTES * model.vocab_size * chunk,
        )

    def _logit_tokens(self) -> int:
        """Tokens whose logits its fused loss (Liger's) takes at a time: about as many bytes as the hidden states."""
        ratio = -(-self.model.vocab_size // self.model.hidden_size)
        predicted = self.tokens - self.batch
        return power_of_two(-(-predicted // ratio))

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

    def _hold(self, pool: str, slot: int, first: int, *last: int) -> None:
        self.holds.append(Hold(self.pool[pool], slot, first, last))

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
            pools=tuple(self.pools),
            holds=tuple(self.holds),
            tokens=self.tokens,
            visits=tuple(self.visits),
        )

    def _pools(self) -> list[Pool]:
        model = self.model
        largest = max(self._weights(unit) for unit in model.units)
        buffer = power_of_two(BF16_BYTES * largest)
        tied = power_of_two(BF16_BYTES * model.embedding.params) if model.tied else 0
        rows = (
            ("cache units", "gpu", 2, 2 * BF16_BYTES * largest, False),
            ("workspaces", "gpu", 1, WORKSPACE_BYTES, False),
            ("masters and moments", "ram", 1, STATE_BYTES_PER_PARAM * model.params, False),
            ("gradient buffer", "ram", 1, buffer, True),
            ("weight buffer", "ram", 1, buffer, True),
            ("tied gradient", "ram", 1, tied, True),
            ("saved inputs", "ram", len(model.layers), power_of_two(self.hidden_bytes), True),
            ("process", "ram", 1, PROCESS_BYTES, False),
        )
        return [
            Pool(name=name, tier=tier, slots=slots, slot_bytes=size, page_locked=locked)
            for name, tier, slots, size, locked in rows
            if size
        ]
