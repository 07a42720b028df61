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

Update = Callable[[State, Tensor, Tensor, Tensor, Tensor | None, AdamW], None]
"""Adam over some rows: (whole state, rows, places, values, dense, hyper-parameters), as for `adam.adam_rows`."""


@dataclass(slots=True)
class RowGradients:
    """bf16 gradients [rows, width] of the rows `ids` (sorted)."""

    ids: Tensor
    values: Tensor

    def places(self, ids: Tensor) -> Tensor:
        """For each of `ids` its place in `self.ids`, -1 where it has none."""
        if not self.ids.numel() or not ids.numel():
            return torch.full_like(ids, -1)
        at = torch.searchsorted(self.ids, ids).clamp_(max=self.ids.numel() - 1)
        return torch.where(self.ids[at] == ids, at, -1)


class RowTables:
    """All rows of one width as one flat state, with the hyper-parameters of each table."""

    def __init__(self, state: State, width: int, tables: Sequence[tuple[int, AdamW | None]]) -> None:
        """`tables`: rows and hyper-parameters (None: frozen) of each. Frozen tables are last in `state`."""
        self.width = width
        self.spans: list[tuple[int, int, AdamW]] = []
        start = 0
        for rows, hyper in tables:
            if hyper is not None:
                self.spans.append((start, start + rows, hyper))
            start += rows
        self.rows = self.spans[-1][1] if self.spans else 0
        self.state = state.range(0, self.rows * width)

    def update_rows(self, ids: Tensor, dense: Tensor | None, gradients: RowGradients | None, update: Update) -> None:
        """Update the rows `ids` (sorted): with their part of `dense` (bf16, flat, of all rows), if there is one, plus
        `gradients`, where they have one."""
        for start, stop, hyper in self.spans:
            mine = ids[(ids >= start) & (ids < stop)]
            if not mine.numel():
                continue
            places, values = self._gradients(mine, dense, gradients)
            whole = None if dense is None else dense[: self.rows * self.width]
            update(self.state, mine, places, values, whole, hyper)

    def update_rest(
        self,
        part: int,
        parts: int,
        but: Tensor,
        dense: Tensor | None,
        gradients: RowGradients | None,
        update: Update,
    ) -> None:
        """Update part `part` of `parts` of all rows except `but` (sorted); gradients as for `update_rows`."""
        low, high = self.rows * part // parts, self.rows * (part + 1) // parts
        rest = torch.ones(high - low, dtype=torch.bool)
        rest[but[(but >= low) & (but < high)] - low] = False
        self.update_rows(rest.nonzero().flatten() + low, dense, gradients, update)

    def _gradients(self, ids: Tensor, dense: Tensor | None, gradients: RowGradients | None) -> tuple[Tensor, Tensor]:
        """(place of each row's gradient or -1, gradients)."""
        if gradients is None:
            return torch.full_like(ids, -1), torch.zeros(0, self.width, dtype=torch.bfloat16)
        places = gradients.places(ids)
        if dense is None:
            return places, gradients.values
        own = places >= 0
        matrix = dense[: self.rows * self.width].view(self.rows, self.width)
        sums = matrix.index_select(0, ids[own]) + gradients.values[places[own]]
        places[own] = torch.arange(sums.shape[0])
        return places, sums
