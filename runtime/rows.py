"""The embedding tables on the host: rows gathered for the GPU, their gradients, and the update of all rows.

Tables (token embedding, learned positions) are numbered through: row r of the second table is row
(rows of the first) + r. A step reads few rows of many. Rows it doesn't read have no gradient from it, but they are
updated all the same, as AdamW does it: moments decay, and the weights follow them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slidetune.runtime.adam import AdamW
from slidetune.runtime.masters import State

# Rows copied out, updated and copied back at a time: bounds the copies' memory.
_ROWS_AT_ONCE = 4096

Update = Callable[[State, Tensor, AdamW], None]
"""Adam over a flat state and its bf16 gradient."""


@dataclass(slots=True)
class RowGradients:
    """bf16 gradients [rows, width] of the rows `ids` (sorted)."""

    ids: Tensor
    values: Tensor

    def of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(places in `ids`, places in `self.ids`) of the ids that both have."""
        if not self.ids.numel() or not ids.numel():
            return ids[:0], ids[:0]
        at = torch.searchsorted(self.ids, ids).clamp_(max=self.ids.numel() - 1)
        found = (self.ids[at] == ids).nonzero().flatten()
        return found, at[found]


class RowTables:
    """All rows of one width as one flat state, with the hyper-parameters of each table."""

    def __init__(self, state: State, width: int, tables: Sequence[tuple[int, AdamW | None]]) -> None:
        """`tables`: rows and hyper-parameters (None: frozen) of each. Frozen tables are last in `state`."""
        self.state, self.width = state, width
        self.spans: list[tuple[int, int, AdamW]] = []
        start = 0
        for rows, hyper in tables:
            if hyper is not None:
                self.spans.append((start, start + rows, hyper))
            start += rows
        self.rows = self.spans[-1][1] if self.spans else 0
        self._zeros = torch.zeros(0, dtype=torch.bfloat16)

    def update_rows(self, ids: Tensor, dense: Tensor | None, gradients: RowGradients | None, update: Update) -> None:
        """Update the rows `ids` (sorted): with their part of `dense` (bf16, flat, of all rows), if there is one, plus
        `gradients`, where they have one."""
        ids = ids[ids < self.rows]
        for start, stop, hyper in self.spans:
            mine = ids[(ids >= start) & (ids < stop)]
            for piece in mine.split(_ROWS_AT_ONCE):
                if not piece.numel():
                    continue
                tables = [part[: self.rows * self.width].view(self.rows, self.width) for part in self.state]
                copies = [table.index_select(0, piece) for table in tables]
                gradient = self._gradient(piece, dense, gradients)
                update(State(*(copy.view(-1) for copy in copies)), gradient.view(-1), hyper)
                for table, copy in zip(tables, copies, strict=True):
                    table.index_copy_(0, piece, copy)

    def update_rest(
        self,
        part: int,
        parts: int,
        but: Tensor,
        dense: Tensor | None,
        gradients: RowGradients | None,
        update: Update,
    ) -> None:
        """Update part `part` of `parts` of all rows except `but` (sorted); gradients as for `update_rows`.

        Whole stretches are updated and the excepted rows put back as they were: nobody else may read or write
        these tables meanwhile.
        """
        low, high = self.rows * part // parts, self.rows * (part + 1) // parts
        for start, stop, hyper in self.spans:
            first, last = max(low, start), min(high, stop)
            if first >= last:
                continue
            span = slice(first * self.width, last * self.width)
            state = State(*(array[span] for array in self.state))
            kept_ids = but[(but >= first) & (but < last)] - first
            tables = [array.view(last - first, self.width) for array in state]
            kept = [table.index_select(0, kept_ids) for table in tables]
            gradient = self._zero(span.stop - span.start) if dense is None else dense[span].clone()
            touched = self._add(gradient, first, last, dense is not None, gradients)
            update(state, gradient, hyper)
            for table, rows in zip(tables, kept, strict=True):
                table.index_copy_(0, kept_ids, rows)
            if dense is None and touched is not None:
                gradient.view(-1, self.width).index_fill_(0, touched, 0.0)

    def _add(
        self, gradient: Tensor, first: int, last: int, adds: bool, gradients: RowGradients | None
    ) -> Tensor | None:
        """Put the gradients of rows in [first, last) into a flat gradient; returns those rows, from 0."""
        if gradients is None:
            return None
        inside = ((gradients.ids >= first) & (gradients.ids < last)).nonzero().flatten()
        if not inside.numel():
            return None
        ids, values = gradients.ids[inside] - first, gradients.values[inside]
        rows = gradient.view(-1, self.width)
        rows.index_copy_(0, ids, rows.index_select(0, ids) + values if adds else values)
        return ids

    def _gradient(self, ids: Tensor, dense: Tensor | None, gradients: RowGradients | None) -> Tensor:
        if dense is None:
            gradient = torch.zeros(ids.numel(), self.width, dtype=torch.bfloat16)
        else:
            gradient = dense[: self.rows * self.width].view(self.rows, self.width).index_select(0, ids)
        if gradients is not None:
            here, there = gradients.of(ids)
            values = gradients.values[there]
            gradient.index_copy_(0, here, values if dense is None else gradient[here] + values)
        return gradient

    def _zero(self, count: int) -> Tensor:
        """A gradient of zeros; whoever writes into it leaves it zero again."""
        if self._zeros.numel() < count:
            self._zeros = torch.zeros(count, dtype=torch.bfloat16)
        return self._zeros[:count]
