"""The embedding on the host: hidden states of a step's tokens for the first layer, and the gradient of their rows.

Most families look rows up and do nothing else; the others (learned positions, scaling, dropout) run what their model
does before the first layer, over the rows that the step reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slidetune.runtime.binding import Parts
from slidetune.runtime.randomness import Randomness
from slidetune.runtime.row_kernels import gather_rows, sum_rows
from slidetune.runtime.steps import Step

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

    def gather(self, step: Step, m: int, out: Tensor, threads: int) -> None:
        """Write the first layer's input of micro-batch m to `out` [sequences, tokens, width]."""
        batch = step.micro_batches[m]
        if self.plain:
            ids = batch.inputs["input_ids"].reshape(-1)
            gather_rows(self.table, ids, out.view(-1, out.shape[-1]), threads=threads)
            return
        if m == 0:
            # Copies: the table may change before the backward pass needs them again.
            step.compact_rows = [self.table.index_select(0, ids + at) for at, ids in self._ids(step)]
        with torch.no_grad(), self.randomness.on(_HOST, step.number, _UNIT, m):
            out.copy_(self._forward(step.compact_rows, batch.rows, batch.inputs))

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
            if table.padding_row is not None:
                out[first : first + ids.numel()][ids == table.padding_row] = 0.0
            first += ids.numel()

    def _ids(self, step: Step) -> list[tuple[int, Tensor]]:
        """Per table, its first row and the rows of it, from 0, that the step reads."""
        found, at = [], 0
        for table in self.parts.tables:
            found.append((at, step.rows[(step.rows >= at) & (step.rows < at + table.rows)] - at))
            at += table.rows
        return found


def _is_plain_lookup(parts: Parts, width: int) -> bool:
    """Whether the first layer's input is the rows of the ids, unchanged."""
    if len(parts.tables) != 1:
        return False
    rows = torch.linspace(-1.0, 1.0, 4 * width).view(4, width).to(torch.bfloat16)
    numbers = torch.tensor([[2, 0, 3, 3]])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        hidden = parts.prelude()([rows], [numbers], {"input_ids": numbers})
    return torch.equal(hidden, rows[numbers])
