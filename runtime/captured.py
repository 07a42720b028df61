"""Passes of layers as CUDA graphs: of a small micro-batch, launching the kernels takes longer than running them.

A task finds its buffers in the same slots in every step, so in every step its kernels are the same and work at the same
addresses. They are recorded once and from then on launched together. Masks and rotary embeddings, which are made anew
in each step, are copied to where the recorded kernels read them.

A pass runs as it is once: libraries set themselves up, compilers compile. In a later step whose arguments are of the
same form, of all its micro-batches, it is recorded, and from then on replayed. A step of another form runs as it is and
takes the place of all recordings: what is recorded uses memory that the allocator takes to be free, so within a step
either all passes are or none. Python runs while a pass is recorded and not while it is replayed: models with hooks in
their layers are not recorded, and a hook added later is not called.

Passes, recorded or not, and the head take their memory from one pool of torch's allocator, in the lane's order, so
that recording takes none a second time. What a pass keeps for its backward pass stays allocated for good: the
allocator doesn't see replays, and would give it to the head in between.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from slidetune.runtime.binding import Call
from slidetune.runtime.steps import MicroBatch, Step

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes what launches kernels; returns what launches the same ones again."""


class Inputs(Protocol):
    """What layers are called with beside hidden states."""

    calls: list[Call]
    shared: set[int]


Body = Callable[[Step, Inputs], None]
"""A pass of one layer and micro-batch. Of the step it may use nothing that another step has otherwise."""


class Passes:
    """Runs passes as they are, or recorded; for one lane's thread.

    With `record` None nothing is recorded.
    """

    def __init__(self, record: Record | None = None, pool: Any = None) -> None:
        self._record, self._pool = record, pool
        self._state = _State()
        self.recording = False
        """Whether the pass under way is being recorded."""

    def bind(self, m: int, body: Body) -> Callable[[Step], None]:
        """The pass `body` of the step's micro-batch `m` as a task of a lane."""
        state, replay, ran, recorded = self._state, None, 0, 0

        def run(step: Step) -> None:
            nonlocal replay, ran, recorded
            batches = step.micro_batches
            if self._record is not None and state.batches is not batches:
                state.take(batches)
            now = state.generation
            if state.fixed is None or ran != now:
                with self.memory():
                    body(step, batches[m])
                ran = now
                return
            if recorded != now:
                replay, recorded = self._recorded(lambda: body(step, state.fixed[m])), now
            replay()

        return run

    def memory(self) -> contextlib.AbstractContextManager[None]:
        """What is allocated inside, in this thread, comes from the passes' pool."""
        return contextlib.nullcontext() if self._pool is None else torch.cuda.use_mem_pool(self._pool)

    def keep(self, graph: Any) -> None:
        """Keep what autograd has of the forward pass being recorded, and so the memory of what it saved."""
        self._state.kept.append(graph)

    def _recorded(self, body: Callable[[], None]) -> Callable[[], None]:
        self.recording = True
        try:
            return self._record(body)
        finally:
            self.recording = False


class _State:
    """How the passes of the step under way run."""

    __slots__ = ("batches", "fixed", "form", "generation", "kept")

    def __init__(self) -> None:
        self.batches: list[MicroBatch] | None = None
        """The step's."""
        self.form: Any = None
        """Of all their arguments."""
        self.fixed: list[_FixedInputs] | None = None
        """By micro-batch, where recorded passes read them; None if passes run as they are."""
        self.generation = 0
        """Counts changes of form: recordings of other generations are out of date."""
        self.kept: list[Any] = []

    def take(self, batches: list[MicroBatch]) -> None:
        """Go on to the next step."""
        arguments = [Arguments.of(batch.calls) for batch in batches]
        form = None
        if None not in arguments:
            form = [(batch.shape, one.form) for batch, one in zip(batches, arguments, strict=True)]
        same = form is not None and form == self.form
        self.batches, self.form = batches, form
        if not same:
            if self.fixed is not None:
                # Replays under way use what is given up here.
                self.fixed[0].synchronize()
            self.fixed = None
            self.generation += 1
            self.kept.clear()
            return
        if self.fixed is None:
            self.fixed = [_FixedInputs(one) for one in arguments]
        for fixed, one in zip(self.fixed, arguments, strict=True):
            fixed.take(one)


def cuda_passes(device: torch.device) -> Passes:
    """Passes that are recorded as CUDA graphs, in the stream that is current when they run."""
    with torch.cuda.device(device):
        pool = torch.cuda.MemPool()
    return Passes(recorder(pool.id), pool)


def recorder(pool_id: Any) -> Record:
    """Records CUDA graphs, whose memory comes from a pool of torch's allocator."""

    def record(body: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # What the collector might free meanwhile (another trainer's graphs, registered memory) must not be recorded.
        collecting = gc.isenabled()
        gc.disable()
        try:
            graph.capture_begin(pool=pool_id, capture_error_mode="thread_local")
            try:
                body()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        return graph.replay

    return record


@dataclass(frozen=True, slots=True)
class Arguments:
    """Layers' arguments taken apart."""

    form: Any
    """All but the tensors' contents: equal for arguments that recorded kernels can't tell apart."""
    storages: list[Tensor]
    """The tensors' storages, uint8, each once."""

    @classmethod
    def of(cls, calls: list[Call]) -> Arguments | None:
        """None where an argument is neither tensor, plain value nor a collection of them."""
        storages: dict[int, Tensor] = {}
        places: dict[int, int] = {}
        try:
            form = _form(calls, storages, places)
        except _Unknown:
            return None
        return cls(form, list(storages.values()))


class _Unknown(Exception):
    """An argument that may be another in each step without anyone seeing it."""


def _form(value: Any, storages: dict[int, Tensor], places: dict[int, int]) -> Any:
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        address = storage.data_ptr()
        if address not in storages:
            places[address] = len(storages)
            storages[address] = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
        return _View(
            places[address],
            storage.nbytes(),
            value.dtype,
            value.storage_offset(),
            tuple(value.shape),
            value.stride(),
        )
    if isinstance(value, Mapping):
        return {name: _form(one, storages, places) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return tuple([_form(one, storages, places) for one in value])
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return value
    raise _Unknown


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor among arguments."""

    storage: int
    """Number of its storage."""
    nbytes: int
    """The storage's."""
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _FixedInputs:
    """A micro-batch's arguments at addresses of their own."""

    def __init__(self, arguments: Arguments) -> None:
        self._storages = [torch.empty_like(storage) for storage in arguments.storages]
        self.calls: list[Call] = list(self._filled(arguments.form))
        self.shared = {storage.data_ptr() for storage in self._storages}

    def take(self, arguments: Arguments) -> None:
        """Copy arguments of the same form here."""
        for mine, theirs in zip(self._storages, arguments.storages, strict=True):
            mine.copy_(theirs, non_blocking=True)

    def synchronize(self) -> None:
        """Wait until nothing on this stream reads them."""
        if any(storage.is_cuda for storage in self._storages):
            torch.cuda.current_stream().synchronize()

    def _filled(self, form: Any) -> Any:
        if isinstance(form, _View):
            storage = self._storages[form.storage]
            tensor = torch.empty(0, dtype=form.dtype, device=storage.device)
            return tensor.set_(storage.untyped_storage(), form.offset, form.shape, form.stride)
        if isinstance(form, Mapping):
            return {name: self._filled(one) for name, one in form.items()}
        if isinstance(form, tuple):
            return tuple([self._filled(one) for one in form])
        return form
