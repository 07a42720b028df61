"""One optimizer step in flight: its batch, what was computed of it so far, and whether its gradients are good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slidetune.runtime.adam import AdamW

if TYPE_CHECKING:
    from slidetune.runtime.again import Saved
    from slidetune.runtime.binding import Call
    from slidetune.runtime.row_kernels import Readers, ReadersThere
    from slidetune.runtime.rows import RowGradients


@dataclass(slots=True, kw_only=True)
class MicroBatch:
    """What the micro-batches of one step bring along."""

    inputs: Mapping[str, Tensor]
    """As the model's forward takes them, on the host."""
    labels: Tensor
    """int64 [sequences * tokens] on the device, shifted: what each position is to predict, or -100."""
    calls: list[Call]
    """What each layer is called with, on the device."""
    rows: list[Tensor]
    """Per embedding table, each id's place among the step's rows; on the host."""
    readers: Readers | None
    """The same of one table's, by row; None where there are more tables, and where nothing is trained."""
    readers_there: ReadersThere | None
    """And on a CUDA device, for a step of one micro-batch: there gradients can be summed."""
    shape: tuple[int, int]
    """Sequences and tokens."""
    shared: set[int]
    """Addresses of the storages in `calls`."""


@dataclass(slots=True, kw_only=True)
class Step:
    """A step, or with no micro-batches the mere update that a finished training still owes."""

    number: int
    """Steps so far, this one included; seeds the dropout."""
    micro_batches: list[MicroBatch] = field(default_factory=list)
    items: int = 0
    """Labels that count, all micro-batches together."""
    losses: Tensor | None = None
    """fp32 [micro-batches] on the host, page-locked on CUDA; filled by the head."""
    rows: Tensor | None = None
    """int64, sorted: rows of the embedding tables, numbered through, that the step reads."""
    update: int = 0
    """Number of the optimizer update its gradients make, from 1."""
    lr_scale: float = 1.0
    """Multiplies every learning rate."""
    owed: Step | None = None
    """The step whose gradients are applied in this one, where the update is late."""
    accepts_non_finite: bool = False
    """Make an update even of a loss that is not finite."""
    refused: bool = False
    """Loss or gradient norm was not finite: no update is made of it."""
    squares: Tensor | None = None
    """fp64 scalar on the device: the sum of the squares of the gradients made there."""
    host_squares: float = 0.0
    """The part of it that is summed on the host."""
    scale: float | None = None
    """What gradients are multiplied by to clip them, once known."""
    row_gradients: RowGradients | None = None
    graphs: dict[tuple[int, int], Any] = field(default_factory=dict)
    """What autograd keeps, by layer and micro-batch."""
    saved: dict[tuple[int, int], Saved | None] = field(default_factory=dict)
    """What layers that recompute have saved beside their input, by layer and micro-batch: the products that are kept,
    none where it is the sum in the middle alone; None if they ran with hooks and have saved nothing."""
    compact_rows: list[Tensor] = field(default_factory=list)
    prepared: Any = None
    """CUDA event after which masks and labels are on the device."""
    loss_event: Any = None
    """CUDA event after which `losses` are known."""
    times: list | None = None
    """(start, end) of every task where a trace is recorded."""

    @property
    def only_update(self) -> bool:
        return not self.micro_batches

    @property
    def good(self) -> bool:
        """Whether an update may be made of its gradients; all losses must be known."""
        if self.losses is not None and not self.accepts_non_finite and not bool(torch.isfinite(self.losses).all()):
            self.refused = True
        return not self.refused

    def source(self, *, late: bool) -> Step | None:
        """The step whose gradients an update in this step applies, if there is any."""
        if late:
            return self.owed
        return None if self.only_update else self

    def scaled(self, hyper: AdamW) -> AdamW:
        """Hyper-parameters with this step's learning rate."""
        return hyper if self.lr_scale == 1.0 else replace(hyper, lr=hyper.lr * self.lr_scale)
