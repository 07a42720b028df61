"""The one function that says what a step is: `build(model, plan)` gives its Schedule.

The order in which tasks are emitted is the order in which every lane runs its own. Reading `_Step.build` from
top to bottom is reading an optimizer step. `build_forward` gives an evaluation's: the step's forward pass alone.
"""

from __future__ import annotations

from slidetune import buffers
from slidetune.model import BF16_BYTES, OPTIMIZER_BYTES_PER_PARAM, STATE_BYTES_PER_PARAM, ModelSpec, Unit, untrained
from slidetune.plans import Placement, Plan, captured, check, kept_nothing, late_units, place_layers
from slidetune.schedule import (
    CPU_ADAM,
    D2H,
    GPU,
    H2D,
    LANES,
    NVME_READ,
    NVME_WRITE,
    Hold,
    Pool,
    Schedule,
    Task,
    Work,
)

# DRAM traffic of Adam over a split master: gradient, weights, remainder and moments read (14), all but the
# gradient written (12). The GPU's Adam moves the same bytes in device memory.
ADAM_BYTES_PER_PARAM = 26.0
# A gradient added to the fp32 accumulator: read 2 + 4, written 4.
ACCUMULATE_BYTES_PER_PARAM = 10.0
# The sum rounded for its way down: read 4, written 2. Once a step.
ROUND_BYTES_PER_PARAM = 6.0
# Kernels a backward pass launches for each of the forward pass (H200 probe: 3.1 ms against 1.3 ms where
# launching is the limit).
BACKWARD_LAUNCHES = 2.4
EMBEDDING = 0


def build(model: ModelSpec, plan: Plan, kernels: str = "eager") -> Schedule:
    """The schedule of one optimizer step of `plan` on `model`.

    `kernels` ("eager" or "liger") names the implementation whose working sets and launches count. Raises
    SlidetuneError, naming every fault, when plan and model don't agree.
    """
    check(plan, model)
    return _Step(model, plan, kernels, buffers.pools(model, plan, kernels)).build()


def build_forward(model: ModelSpec, plan: Plan, kernels: str = "eager") -> Schedule:
    """The schedule of a forward pass and its mean loss, of a step's batch: what an evaluation of `plan` runs.

    It lies in the plan's own buffers, and takes no others; those of training stay allocated. One such pass begins when
    the loss of the one before is known. Raises SlidetuneError as `build` does.
    """
    check(plan, model)
    # What autograd would keep is not there.
    pools = [pool for pool in buffers.pools(model, plan, kernels) if not pool.transient]
    return _Forward(untrained(model), plan, kernels, pools).build()


def distinct_rows(tokens: int, vocab_size: int) -> int:
    """Expected distinct ids among `tokens` uniform ones; text, which repeats itself, has fewer."""
    return min(vocab_size, round(vocab_size * (1.0 - (1.0 - 1.0 / vocab_size) ** tokens)))


class _Slots:
    """A pool being handed out in emission order, the longest-free slot first."""

    __slots__ = ("first", "free", "index", "last")

    def __init__(self, index: int, slots: int) -> None:
        self.index = index
        # Each free slot with the tasks that must end before it is taken again.
        self.free: list[tuple[int, tuple[int, ...]]] = [(slot, ()) for slot in range(slots)]
        # Per slot, the step's first taker and last readers: the next step's first taker waits for the latter.
        self.first: dict[int, int] = {}
        self.last: dict[int, tuple[int, ...]] = {}


class _Held:
    """A slot in use since task `first`."""

    __slots__ = ("first", "pool", "slot")

    def __init__(self, pool: _Slots, slot: int, first: int) -> None:
        self.pool, self.slot, self.first = pool, slot, first


class _Step:
    def __init__(self, model: ModelSpec, plan: Plan, kernels: str, pools: list[Pool]) -> None:
        self.model, self.plan, self.kernels, self.pools = model, plan, kernels, pools
        self.name: str = plan.update
        self.layers = model.layers
        self.placements = place_layers(plan, len(self.layers))
        self.micro_batches = range(plan.accumulation)
        self.prefetch = min(plan.prefetch, len(self.layers))
        self.captured = captured(plan, model)
        self.hidden_bytes = model.hidden_bytes(plan.micro_batch, plan.seq_len)
        # Layers from here on are still in their slots when the backward pass comes for them.
        sliding = [i for i, p in enumerate(self.placements) if p.weights != "gpu"]
        self.turnaround = set(sliding[-plan.window :])
        self.deferred = plan.update == "forward"
        self.late = late_units(plan, model)
        self.accumulating_bytes = ACCUMULATE_BYTES_PER_PARAM + ROUND_BYTES_PER_PARAM / plan.accumulation
        self.trains_rows = model.embedding.params > 0
        self.tied = model.tied and self.trains_rows
        # Rows that a step doesn't read have no gradient from their use as input, so their update need not wait for the
        # end of the backward pass: of a tied matrix, unless deferred, it is made within the step.
        self.rest_within = self.tied and not self.deferred
        # The part of the rows that gets the last step's gradient at last.
        self.last_rows = "other rows" if self.rest_within else "rest"
        # Parameters of rows, as expected: what a batch really reads may differ.
        touched = distinct_rows(plan.tokens, model.vocab_size) / model.vocab_size
        self.read_params = round(touched * model.embedding.params)
        self.read_again_params = round(touched**2 * model.embedding.params)
        self.unread_params = model.embedding.params - self.read_params

        self.slots = {pool.name: _Slots(i, pool.slots) for i, pool in enumerate(self.pools)}
        self.tasks: list[Task] = []
        self.holds: list[Hold] = []
        self.visits: list[int] = []
        self.works: dict[tuple, Work] = {}
        # Tasks waiting for what the previous step will have marked under a name.
        self.waiting: list[tuple[int, tuple]] = []
        self.marks: dict[tuple, tuple[int, ...]] = {}

        self.weights: dict[int, tuple[tuple[int, ...], _Held | None]] = {}
        self.inputs: dict[tuple[int, int], tuple[int, _Held]] = {}
        self.loaded: dict[tuple[int, int], tuple[int, _Held]] = {}
        self.staged: dict[tuple[int, int], tuple[int, _Held]] = {}
        self.inner: dict[tuple[int, int], tuple[int, _Held | None]] = {}
        self.products: dict[tuple[int, int], _Held] = {}
        self.middles: dict[tuple[int, int], tuple[int, _Held]] = {}
        self.gradients: dict[int, int] = {}

    # ---- the step -----------------------------------------------------------------------------------------

    def build(self) -> Schedule:
        count = len(self.layers)
        self._forward()
        self._visit()
        self._head()
        for m in self.micro_batches:
            self._read_input(count - 1, m)
        self._load(count - 1, 0)
        for i in reversed(range(count)):
            self._visit()
            self._backward_layer(i)
        self._visit()
        self._scatter()
        return self._finished()

    def _forward(self) -> None:
        """The embedding's rows and all layers."""
        self._visit()
        self._gather()
        for ahead in range(self.prefetch):
            self._bring(ahead)
        for i in range(len(self.layers)):
            self._visit()
            self._forward_layer(i)

    def _gather(self) -> None:
        """Embedding rows go up, micro-batch by micro-batch: rows, never the matrix.

        The rows about to be read get the last step's update first. The others follow when there is time for
        them, in a step whose gradients are already known to be good. (Of a tied matrix, which the head soon reads,
        that step has updated all rows that it didn't read, unless the update is deferred: left are those it read.)
        """
        if self.trains_rows:
            params = self.read_again_params if self.rest_within else self.read_params
            self._update_embedding(params, "rows", await_mark="norm" if self.deferred else "rows down")
        work = self._work("gather", H2D, bytes=self.hidden_bytes, threads=self.plan.adam_threads)
        for m in self.micro_batches:
            held = self._take("saved inputs" if self._saved_on_gpu(0) else "hidden states")
            after = self.marks["rows updated",] if self.trains_rows else ()
            task = self._emit(work, EMBEDDING, after + held[2], m)
            self.inputs[0, m] = (task, self._own(held, task))
        # The update of whole stretches of the matrix would run over rows being read.
        self.marks["gathered",] = (task,)
        if self.rest_within:
            self._update_embedding(self.read_params - self.read_again_params, "other rows", after=(task,))
        elif self.trains_rows and not self.deferred:
            self._update_embedding(self.unread_params, "rest", after=(task,))

    def _forward_layer(self, i: int) -> None:
        self._bring(i + self.prefetch)
        unit, place = self.layers[i], self.placements[i]
        plan = self.plan
        if place.resident and self.deferred and unit.params:
            self._update_on_gpu(unit, await_norm=True)
        ready, slot = self._ready_weights(i)
        work = self._work(
            "forward",
            GPU,
            flops=unit.forward_flops(plan.micro_batch, plan.seq_len),
            traffic_bytes=self._traffic(unit),
            launches=self._launches(unit),
            working_bytes=buffers.forward_working_bytes(
                unit, plan, self.kernels, kept=place.inner != "recompute", products=place.products
            ),
        )
        for m in self.micro_batches:
            if m:
                self._visit()
            source, held = self.inputs[i, m]
            target = self._take("saved inputs" if self._saved_on_gpu(i + 1) else "hidden states")
            inner, middle = self._take_inner(place), self._take_middle(place)
            products = self._take(buffers.PRODUCTS) if place.products else None
            taken = tuple(after for slot in (target, inner, middle, products) if slot for after in slot[2])
            task = self._emit(work, unit.index, (source, *ready, *taken), m)
            self.inputs[i + 1, m] = (task, self._own(target, task))
            readers = (task,)
            if place.saved_input in ("ram", "nvme"):
                readers += (self._save_input(i, m, source),)
            if place.saved_input != "gpu":
                self._release(held, *readers)
            if inner:
                self._keep_inner(i, m, task, self._own(inner, task))
            if products:
                self.products[i, m] = self._own(products, task)
            if middle:
                self._save_middle(i, m, task, self._own(middle, task))
        if slot is not None and i not in self.turnaround:
            self._release(slot, task)
            del self.weights[i]

    def _launches(self, unit: Unit, for_each: float = 1.0) -> int:
        """Launches of a layer's pass, `for_each` of the forward pass's kernels so many."""
        return 1 if self.captured else round(for_each * unit.kernels(self.kernels).launches)

    def _head(self) -> None:
        """Final norm, head, chunked loss: forward and backward at once, so full logits never exist."""
        model, plan, head = self.model, self.plan, self.model.head
        count = len(self.layers)
        if count not in self.weights:
            self._bring_head()
        ready, slot = self._ready_weights(count)
        gradient = self._take("head gradient") if model.head_gradient_elements else None
        flops = head.forward_flops(plan.micro_batch, plan.seq_len)
        tokens = plan.micro_batch * plan.seq_len
        chunks = -(-tokens // model.loss_chunk_tokens(tokens))
        work = self._work(
            "head",
            GPU,
            flops=3.0 * flops,
            # Logits written, read for the loss, read and overwritten by their gradient, which is read twice: 2 bytes
            # each. The matrix is read twice a chunk, its fp32 gradient read and written.
            traffic_bytes=12.0 * tokens * model.vocab_size
            + (chunks * 12.0 + ROUND_BYTES_PER_PARAM / plan.accumulation) * head.weight_elements
            + 3.0 * head.kernels(self.kernels).traffic_bytes * tokens,
            launches=chunks * 3 * head.kernels(self.kernels).launches,
            working_bytes=buffers.head_working_bytes(model, plan, self.kernels),
        )
        held = None
        for m in self.micro_batches:
            source, _ = self.inputs[count, m]
            task = self._emit(work, head.index, (source, *ready, *(gradient[2] if gradient else ())), m)
            held = held or (self._own(gradient, task) if gradient else None)
            self.gradients[m] = task
        self._release(slot, task)
        if self.tied:
            self._send_tied_gradient(task, held)
        else:
            self._send_gradient(head, None, task, held)
            if self.deferred and self.trains_rows:
                self._update_embedding(self.unread_params, "rest", after=self.marks["gathered",])

    def _backward_layer(self, i: int) -> None:
        unit, place, plan = self.layers[i], self.placements[i], self.plan
        self._bring_back(i - self.prefetch)
        ready, slot = self._ready_weights(i)
        gradient = self._take("gradients") if unit.params else None
        recomputed = place.inner == "recompute"
        again = self._work(
            "recompute",
            GPU,
            flops=unit.recompute_flops(plan.micro_batch, plan.seq_len, middle=place.middle, products=place.products),
            # The sum isn't made: two terms not read, and it is not written.
            traffic_bytes=self._traffic(unit) - (3.0 * self.hidden_bytes if place.middle else 0.0),
            launches=self._launches(unit),
            working_bytes=buffers.recompute_working_bytes(unit, plan, self.kernels, products=place.products),
        )
        work = self._work(
            "backward",
            GPU,
            flops=unit.backward_flops(plan.micro_batch, plan.seq_len),
            traffic_bytes=2.0 * self._traffic(unit)
            + (self.accumulating_bytes * unit.params if plan.accumulation > 1 else 0.0),
            launches=self._launches(unit, BACKWARD_LAUNCHES),
            working_bytes=buffers.backward_working_bytes(
                unit, plan, self.kernels, recomputed=recomputed, products=place.products
            ),
        )
        held = None
        for m in self.micro_batches:
            if m:
                self._visit()
            if i > 0:
                self._read_input(i - 1, m)
            self._load_ahead(i, m)
            source, saved = self.loaded.pop((i, m), None) or self.inputs[i, m]
            after = (source, self.gradients[m], *ready)
            middle = self.middles.pop((i, m), None)
            if middle:
                after += (middle[0],)
            if recomputed:
                task = self._emit(again, unit.index, after, m)
                after = (task,)
            else:
                arrived, transit = self.inner.pop((i, m))
                after += (arrived,)
            task = self._emit(work, unit.index, after + (gradient[2] if gradient else ()), m)
            self.gradients[m] = task
            held = held or (self._own(gradient, task) if gradient else None)
            self._release(saved, task)
            if middle:
                self._release(middle[1], task)
            if place.products:
                self._release(self.products.pop((i, m)), task)
            if not recomputed and transit is not None:
                self._release(transit, task)
        if slot is not None:
            self._release(slot, task)
            del self.weights[i]
        if not unit.params:
            self.marks["computed", unit.index] = (task,)
        elif not place.resident:
            self._send_gradient(unit, place, task, held)
        elif self.deferred:
            self.marks["gradient on gpu", i] = (task,)
            self._release(held, task)
        else:
            self._release(held, self._update_on_gpu(unit, after=(task,)))

    def _scatter(self) -> None:
        """The gradient of the embedding's rows comes down.

        Tokens' gradients are summed by row on the device, where the embedding is a mere look-up. Those of several
        micro-batches would need a sum in fp32 beside them there: they come down as they are, and the host sums them.
        """
        sums = self.plan.accumulation == 1
        if sums:
            rows = distinct_rows(self.plan.tokens, self.model.vocab_size)
            work = self._work("store rows", D2H, bytes=BF16_BYTES * self.model.hidden_size * rows)
        else:
            work = self._work("store rows", D2H, bytes=self.hidden_bytes, threads=self.plan.adam_threads)
        # The last step's gradient was applied in this one: its place is free once all rows have it.
        free = self.marks[f"{self.last_rows} updated",] if self.trains_rows else ()
        for m in self.micro_batches:
            last = self.gradients[m]
            if self.trains_rows:
                place = self._take("hidden states") if sums else None
                last = self._emit(work, EMBEDDING, (self.gradients[m], *free, *(place[2] if place else ())), m)
                if place:
                    self._release(self._own(place, last), last)
                self.marks["rows down",] = self.marks["last down",] = (last,)
            self._release(self.inputs[len(self.layers), m][1], last)
        if self.rest_within:
            # After the layers: their gradients hold up the GPU sooner than the rest of the matrix does.
            self._update_embedding(self.unread_params, "rest", after=self.marks["tied down",])
        # With the last gradient down, the norm of all of them is known.
        self.marks["norm",] = (*self.marks.get(("last down",), ()), self.gradients[self.micro_batches[-1]])

    # ---- weights ------------------------------------------------------------------------------------------

    def _bring(self, i: int) -> None:
        """Issue the upload of layer i (or the head, past the last) for the forward pass; with a deferred
        update, Adam comes first."""
        if i > len(self.layers):
            return
        if i == len(self.layers):
            self._bring_head()
            return
        unit, place = self.layers[i], self.placements[i]
        if place.resident:
            return
        late = unit.index in self.late
        if late:
            self._update_deferred(unit, place)
        self._fetch(i, from_previous=not late)

    def _bring_back(self, i: int) -> None:
        """Issue the upload of layer i for the backward pass, unless its weights are still on the GPU."""
        if i >= 0 and self.placements[i].weights != "gpu" and i not in self.turnaround:
            self._fetch(i, from_previous=False)

    def _bring_head(self) -> None:
        head = self.model.head
        late = head.index in self.late
        if self.deferred and self.tied:
            self._update_embedding(self.unread_params, "rest", after=self.marks["gathered",])
        if late:
            self._update_deferred(head, None)
        slot = self._take("head weights")
        work = self._work("fetch", H2D, bytes=BF16_BYTES * head.weight_elements)
        after = self.marks.get(("updated", head.index), ()) if late else ()
        if self.tied:
            after += self.marks[f"{self.last_rows} updated",] + self.marks["rows updated",]
        task = self._emit(work, head.index, after + slot[2])
        if not late:
            self._await_previous(task, "updated", head.index)
        self.weights[len(self.layers)] = ((task,), self._own(slot, task))

    def _fetch(self, i: int, *, from_previous: bool) -> None:
        unit, place = self.layers[i], self.placements[i]
        # After a deferred update the weights are those of this step, else those the last step left.
        late = unit.index in self.late
        after = self.marks.get(("updated", unit.index), ()) if late else ()
        slot = None if place.weights == "gpu" else self._take("weights")
        staging = None
        if place.weights == "nvme":
            staging = self._take("weight staging")
            read = self._emit(
                self._work("read weights", NVME_READ, bytes=BF16_BYTES * unit.owned),
                unit.index,
                (*(self.marks.get(("written", unit.index), ()) if late else ()), *staging[2]),
            )
            if from_previous:
                self._await_previous(read, "written", unit.index)
            staging, after = self._own(staging, read), (read,)
        work = self._work("fetch", H2D, bytes=BF16_BYTES * unit.owned)
        task = self._emit(work, unit.index, after + (slot[2] if slot else ()))
        if from_previous:
            self._await_previous(task, "updated", unit.index)
        if place.weights == "gpu":
            # Staying weights are overwritten in place, so not before their last reader of the step before.
            self._await_previous(task, "computed", unit.index)
        if staging:
            self._release(staging, task)
        self.weights[i] = ((task,), self._own(slot, task) if slot else None)

    def _ready_weights(self, i: int) -> tuple[tuple[int, ...], _Held | None]:
        """The tasks after which unit i's weights are on the GPU, and the slot they are in, if any."""
        return self.weights.get(i, ((), None))

    # ---- activations --------------------------------------------------------------------------------------

    def _saved_on_gpu(self, i: int) -> bool:
        return i < len(self.layers) and self.placements[i].saved_input == "gpu"

    def _save_input(self, i: int, m: int, source: int) -> int:
        """Send layer i's input down to RAM, and on to NVMe if it lives there."""
        unit, tier = self.layers[i], self.placements[i].saved_input
        target = self._take("input staging" if tier == "nvme" else "saved inputs (RAM)")
        save = self._emit(self._work("save", D2H, bytes=self.hidden_bytes), unit.index, (source, *target[2]), m)
        held = self._own(target, save)
        if tier == "nvme":
            write = self._emit(self._work("write input", NVME_WRITE, bytes=self.hidden_bytes), unit.index, (save,), m)
            self._release(held, write)
            self.staged[i, m] = (write, held)
        else:
            self.staged[i, m] = (save, held)
        return save

    def _load_ahead(self, i: int, m: int) -> None:
        """Issue the load of the saved input used one micro-batch after (i, m)."""
        if m + 1 < self.plan.accumulation:
            self._load(i, m + 1)
        elif i > 0:
            self._load(i - 1, 0)

    def _read_input(self, i: int, m: int) -> None:
        """Read a saved input back from NVMe: a layer ahead, since reads of optimizer state come between."""
        if self.placements[i].saved_input != "nvme":
            return
        slot = self._take("input staging")
        work = self._work("read input", NVME_READ, bytes=self.hidden_bytes)
        read = self._emit(work, self.layers[i].index, (self.staged[i, m][0], *slot[2]), m)
        self.staged[i, m] = (read, self._own(slot, read))

    def _load(self, i: int, m: int) -> None:
        place = self.placements[i]
        if place.inner == "offload":
            self._load_inner(i, m)
        if place.saved_input == "gpu":
            return
        if place.middle:
            self._load_middle(i, m)
        work = self._work("load", H2D, bytes=self.hidden_bytes)
        self.loaded[i, m] = self._moved(work, "hidden states", i, m, *self.staged.pop((i, m)))

    def _take_middle(self, place: Placement) -> tuple | None:
        if not place.middle:
            return None
        return self._take("saved middles" if place.saved_input == "gpu" else "middles")

    def _save_middle(self, i: int, m: int, forward: int, held: _Held) -> None:
        """The sum in a layer's middle stays on the GPU, or goes down to RAM, as the layer's input does."""
        if self.placements[i].saved_input == "gpu":
            self.middles[i, m] = (forward, held)
            return
        work = self._work("save middle", D2H, bytes=self.hidden_bytes)
        self.middles[i, m] = self._moved(work, "saved middles (RAM)", i, m, forward, held)

    def _load_middle(self, i: int, m: int) -> None:
        work = self._work("load middle", H2D, bytes=self.hidden_bytes)
        self.middles[i, m] = self._moved(work, "middles", i, m, *self.middles[i, m])

    def _moved(self, work: Work, pool: str, i: int, m: int, source: int, held: _Held) -> tuple[int, _Held]:
        """Copy what task `source` has left in a slot to one of another pool, and let go of the first."""
        slot = self._take(pool)
        copy = self._emit(work, self.layers[i].index, (source, *slot[2]), m)
        self._release(held, copy)
        return copy, self._own(slot, copy)

    def _take_inner(self, place: Placement) -> tuple | None:
        if place.inner == "recompute":
            return None
        return self._take(buffers.KEPT if place.inner == "keep" else "activations in transit")

    def _inner_bytes(self, unit: Unit) -> int:
        return buffers.recompute_working_bytes(unit, self.plan, self.kernels)

    def _keep_inner(self, i: int, m: int, forward: int, held: _Held) -> None:
        """Inner activations stay where the forward pass left them, or go down to RAM."""
        if self.placements[i].inner == "keep":
            self.inner[i, m] = (forward, held)
            return
        work = self._work("save inner", D2H, bytes=self._inner_bytes(self.layers[i]))
        self.inner[i, m] = self._moved(work, "inner activations (RAM)", i, m, forward, held)

    def _load_inner(self, i: int, m: int) -> None:
        work = self._work("load inner", H2D, bytes=self._inner_bytes(self.layers[i]))
        self.inner[i, m] = self._moved(work, "activations in transit", i, m, *self.inner[i, m])

    # ---- gradients and updates ----------------------------------------------------------------------------

    def _send_gradient(self, unit: Unit, place: Placement | None, computed: int, held: _Held) -> None:
        """A unit's gradient comes down chunk by chunk; Adam follows each unless the update is deferred."""
        self.marks["computed", unit.index] = (computed,)
        store = computed
        # Deferred, gradients have a place each: free once this step's update has read the last one.
        late = unit.index in self.late
        free = self.marks.get(("updated", unit.index), ()) if late else ()
        for chunk, params in enumerate(self._chunks(unit.params)):
            ring = None if late else self._take("gradient ring")
            work = self._work("store", D2H, bytes=BF16_BYTES * params)
            store = self._emit(work, unit.index, (computed, *free, *(ring[2] if ring else ())), chunk=chunk)
            if ring:
                arrived = self._own(ring, store)
                self._release(arrived, self._adam(unit, place, chunk, params, (store,)))
        if held:
            self.marks["gradient down", unit.index] = self.marks["last down",] = (store,)
            self._release(held, store)

    def _send_tied_gradient(self, computed: int, held: _Held) -> None:
        """The head's gradient of a tied matrix: that of rows no token read is then complete."""
        head, store = self.model.head, computed
        # The buffer is free once the last step's update has read it.
        free = self.marks[f"{self.last_rows} updated",]
        for chunk, params in enumerate(self._chunks(self.model.head_gradient_elements)):
            work = self._work("store", D2H, bytes=BF16_BYTES * params)
            store = self._emit(work, head.index, (computed, *free), chunk=chunk)
        self._release(held, store)
        if not self.deferred:
            if head.params:
                self._adam(head, None, 0, head.params, (store,))
            self.marks["tied down",] = (store,)

    def _update_deferred(self, unit: Unit, place: Placement | None) -> None:
        for chunk, params in enumerate(self._chunks(unit.params)):
            task = self._adam(unit, place, chunk, params, ())
            if chunk == 0:
                # Where gradients are clipped, all of them must be down.
                self._await_previous(task, *(("norm",) if self.deferred else ("gradient down", unit.index)))

    def _adam(self, unit: Unit, place: Placement | None, chunk: int, params: int, after: tuple[int, ...]) -> int:
        """Update one chunk on the CPU; state on NVMe is read before and written back after."""
        on_nvme = place is not None and place.optimizer == "nvme"
        staging = None
        if on_nvme:
            per_param = STATE_BYTES_PER_PARAM if place.weights == "nvme" else OPTIMIZER_BYTES_PER_PARAM
            slot = self._take("state staging")
            read = self._emit(
                self._work("read state", NVME_READ, bytes=per_param * params),
                unit.index,
                slot[2],
                chunk=chunk,
            )
            if chunk == 0:
                self._await_previous(read, "written", unit.index)
            staging, after = self._own(slot, read), (*after, read)
        task = self._emit(self._adam_work(params), unit.index, after, chunk=chunk)
        self.marks["updated", unit.index] = (task,)
        if on_nvme:
            write = self._emit(
                self._work("write state", NVME_WRITE, bytes=per_param * params),
                unit.index,
                (task,),
                chunk=chunk,
            )
            self.marks["written", unit.index] = (write,)
            self._release(staging, write)
        return task

    def _adam_work(self, params: int, op: str = "adam") -> Work:
        return self._work(op, CPU_ADAM, params=params, param_bytes=ADAM_BYTES_PER_PARAM, threads=self.plan.adam_threads)

    def _update_embedding(self, params: int, part: str, after: tuple[int, ...] = (), await_mark: str = "") -> None:
        """Adam on some of the embedding's rows. How many is an expectation, so each part has a task, however small."""
        for chunk, size in enumerate(self._chunks(max(params, self.model.hidden_size))):
            task = self._emit(self._adam_work(size, f"adam {part}"), EMBEDDING, after, chunk=chunk)
            if await_mark and chunk == 0:
                self._await_previous(task, await_mark)
        self.marks[f"{part} updated",] = (task,)

    def _update_on_gpu(self, unit: Unit, after: tuple[int, ...] = (), await_norm: bool = False) -> int:
        """The GPU's fused Adam on a resident layer."""
        work = self._work("adam", GPU, traffic_bytes=ADAM_BYTES_PER_PARAM * unit.params, launches=1, params=unit.params)
        task = self._emit(work, unit.index, after)
        if await_norm:
            self._await_previous(task, "norm")
        return task

    # ---- plumbing -----------------------------------------------------------------------------------------

    def _traffic(self, unit: Unit) -> float:
        """Device-memory traffic of a forward pass of one micro-batch: activations, and the weights once."""
        tokens = self.plan.micro_batch * self.plan.seq_len
        return unit.kernels(self.kernels).traffic_bytes * tokens + BF16_BYTES * unit.weight_elements

    def _chunks(self, params: int) -> list[int]:
        size = buffers.chunk_params(self.plan)
        whole, rest = divmod(params, size)
        return [size] * whole + [rest] * (rest > 0)

    def _visit(self) -> None:
        self.visits.append(len(self.tasks))

    def _work(self, op: str, lane: str, **amounts: float) -> Work:
        key = (op, lane, *amounts.values())
        work = self.works.get(key)
        if work is None:
            work = self.works[key] = Work(op=op, lane=lane, **amounts)  # type: ignore[arg-type]
        return work

    def _emit(self, work: Work, unit: int, after: tuple[int, ...] = (), micro_batch: int = -1, chunk: int = -1) -> int:
        self.tasks.append(Task(work, unit, micro_batch, chunk, after))
        return len(self.tasks) - 1

    def _await_previous(self, task: int, *mark: object) -> None:
        """Make a task wait for what the step before will have marked so."""
        self.waiting.append((task, mark))

    def _take(self, pool: str) -> tuple[_Slots, int, tuple[int, ...]]:
        """A free slot of the pool and the tasks its taker must wait for."""
        slots = self.slots[pool]
        return (slots, *slots.free.pop(0))

    def _own(self, taken: tuple[_Slots, int, tuple[int, ...]], first: int) -> _Held:
        slots, slot, _ = taken
        slots.first.setdefault(slot, first)
        return _Held(slots, slot, first)

    def _release(self, held: _Held, *readers: int) -> None:
        """The slot is free again once `readers` have ended."""
        self.holds.append(Hold(held.pool.index, held.slot, held.first, readers))
        held.pool.free.append((held.slot, readers))
        held.pool.last[held.slot] = readers

    def _finished(self) -> Schedule:
        previous: dict[int, tuple[int, ...]] = {}
        for task, mark in self.waiting:
            previous[task] = previous.get(task, ()) + self.marks.get(mark, ())
        for slots in self.slots.values():
            for slot, first in slots.first.items():
                previous[first] = previous.get(first, ()) + slots.last[slot]
        for task, awaited in previous.items():
            self.tasks[task] = self.tasks[task]._replace(after_previous=tuple(sorted(set(awaited))))
        return Schedule(
            name=self.name,
            lanes=LANES,
            tasks=tuple(self.tasks),
            pools=tuple(self.pools),
            holds=tuple(self.holds),
            tokens=self.plan.tokens,
            visits=tuple(self.visits),
            visits_per_layer=self.plan.accumulation,
        )


class _Forward(_Step):
    """A forward pass that no backward pass follows, of a model of which nothing is trained: then nothing is updated
    and nothing is waited for on its way up."""

    def __init__(self, model: ModelSpec, plan: Plan, kernels: str, pools: list[Pool]) -> None:
        super().__init__(model, plan, kernels, pools)
        self.name = "forward"
        self.placements = kept_nothing(self.placements)
        self.turnaround = set()

    def build(self) -> Schedule:
        self._forward()
        self._visit()
        self._loss()
        # No lane runs ahead into the next pass: buffers of the host are free once the loss is there.
        first = {task.work.lane: i for i, task in reversed(list(enumerate(self.tasks)))}
        for task in first.values():
            self._await_previous(task, "loss")
        return self._finished()

    def _loss(self) -> None:
        """Final norm, head and chunked loss."""
        model, head, count = self.model, self.model.head, len(self.layers)
        if count not in self.weights:
            self._bring_head()
        ready, slot = self._ready_weights(count)
        tokens = self.plan.micro_batch * self.plan.seq_len
        chunks = -(-tokens // model.loss_chunk_tokens(tokens))
        costs = head.kernels(self.kernels)
        work = self._work(
            "loss",
            GPU,
            flops=head.forward_flops(self.plan.micro_batch, self.plan.seq_len),
            # Logits written, read for the loss, and, since the kernel is the step's, read and overwritten by their
            # gradient: 2 bytes each. The matrix is read once a chunk.
            traffic_bytes=8.0 * tokens * model.vocab_size
            + 2.0 * chunks * head.weight_elements
            + costs.traffic_bytes * tokens,
            launches=chunks * costs.launches,
            working_bytes=buffers.loss_working_bytes(model, self.plan, self.kernels),
        )
        for m in self.micro_batches:
            source, held = self.inputs[count, m]
            task = self._emit(work, head.index, (source, *ready), m)
            self._release(held, task)
        self._release(slot, task)
        self.marks["loss",] = (task,)
