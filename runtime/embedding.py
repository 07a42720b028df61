"""The embedding on the host: hidden states of a step's tokens for the first layer, and the gradient of their rows.

Most families look rows up and do nothing else; the others (learned positions, scaling, dropout) run what their model
does before the first layer, over the rows that the step reads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from slidetune.runtime.binding import Parts, Table
from slidetune.runtime.randomness import Randomness
from slidetune.runtime.row_kernels import gather_rows, sum_rows, sum_rows_there
from slidetune.runtime.steps import Step
from slidetune.schedule import GATHERED_BYTES

_UNIT = 0
_HOST = torch.device("cpu")


class HostEmbedding:
    """`gather` and `add_gradients` may run at once, each in one thread."""

    def __init__(self, parts: Parts, weights: Tensor, width: int, randomness: Randomness) -> None:
        """`weights`: bf16, flat, of all tables one behind the other."""
        self.parts, self.randomness = parts, randomness
        self.table = weights.view(-1, width)
        self.plain = _is_plain_lookup(parts, width)
        self._forward, self._again = parts.prelude(), parts.prelude()

    def gather(self, step: Step, m: int, out: Tensor, threads: int) -> Iterator[slice]:
        """Write the first layer's input of micro-batch m to `out` [sequences, tokens, width]; yields which of its
        tokens are there, a piece at a time."""
        batch = step.micro_batches[m]
        if self.plain:
            ids, rows = batch.inputs["input_ids"].reshape(-1), out.flatten(0, 1)
            size = max(1, GATHERED_BYTES // (out.element_size() * out.shape[-1]))
            for start in range(0, ids.numel(), size):
                piece = slice(start, start + size)
                gather_rows(self.table, ids[piece], rows[piece], threads=threads)
                yield piece
            return
        if m == 0:
            # Copies: the table may change before the backward pass needs them again.
            step.compact_rows = [self.table.index_select(0, ids + at) for at, ids in self._ids(step)]
        with torch.no_grad(), self.randomness.on(_HOST, step.number, _UNIT, m):
            out.copy_(self._forward(step.compact_rows, batch.rows, batch.inputs))
        yield slice(None)

    def sums_there(self, step: Step, m: int) -> bool:
        """Whether `sum_there` can take micro-batch m."""
        return self.plain and step.micro_batches[m].readers_there is not None

    def sum_there(self, step: Step, m: int, upstream: Tensor, out: Tensor) -> None:
        """As `add_gradients` of the first micro-batch, on the device and asynchronous."""
        sum_rows_there(upstream, step.micro_batches[m].readers_there, out)
        # Of the one table there is, rows are numbered as its own.
        out[_padding(self.parts.tables[0], step.rows)] = 0.0

    def add_gradients(self, step: Step, m: int, upstream: Tensor, out: Tensor, threads: int) -> None:
        """Add the gradients of the step's rows from micro-batch m, each in bf16, to `out` [rows, width]; the first
        micro-batch's overwrite it. `upstream`: the gradient of `gather`'s output."""
        batch = step.micro_batches[m]
        if self.plain:
            flat = upstream.view(-1, out.shape[1])
            sum_rows(flat, batch.readers, out, fresh=m == 0, threads=threads)
        else:
            leaves = [rows.detach().requires_grad_() for rows in step.compact_rows]
            with torch.enable_grad(), self.randomness.on(_HOST, step.number, _UNIT, m):
                hidden = self._again(leaves, batch.rows, batch.inputs)
            found = torch.cat(torch.autograd.grad(hidden, leaves, upstream))
            out.copy_(found) if m == 0 else out.add_(found)
        first = 0
        for table, (_, ids) in zip(self.parts.tables, self._ids(step), strict=True):
            out[first : first + ids.numel()][_padding(table, ids)] = 0.0
            first += ids.numel()

    def _ids(self, step: Step) -> list[tuple[int, Tensor]]:
        """Per table, its first row and the rows of it, from 0, that the step reads."""
        found, at = [], 0
        for table in self.parts.tables:
            found.append((at, step.rows[(step.rows >= at) & (step.rows < at + table.rows)] - at))
            at += table.rows
        return found


def _padding(table: Table, ids: Tensor) -> slice:
    """Where among `ids` (sorted) a table's padding row stands, whose gradient is zero."""
    if table.padding_row is None:
        return slice(0)
    first = int(torch.searchsorted(ids, table.padding_row))
    return slice(first, int(torch.searchsorted(ids, table.padding_row, right=True)))


def _is_plain_lookup(parts: Parts, width: int) -> bool:
    """Whether the first layer's input is the rows of the ids, unchanged."""
    if len(parts.tables) != 1:
        return False
    rows = torch.linspace(-1.0, 1.0, 4 * width).view(4, width).to(torch.bfloat16)
    numbers = torch.tensor([[2, 0, 3, 3]])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        hidden = parts.prelude()([rows], [numbers], {"input_ids": numbers})
    return torch.equal(hidden, rows[numbers])
