"""The embedding tables on the host: rows gathered for the GPU, their gradients, and the update of all rows.

Tables (token embedding, learned positions) are numbered through: row r of the second table is row
(rows of the first) + r. A step reads few rows of many. Rows it doesn't read have no gradient from it, but they are
updated all the same, as AdamW does it: moments decay, and the weights follow them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from slidetune.runtime.adam import AdamW
from slidetune.runtime.masters import State

Update = Callable[[State, Tensor, Tensor, Tensor, Tensor | None, AdamW], None]
"""Adam over some rows: (whole state, rows, places, values, dense, hyper-parameters), as for `adam.adam_rows`."""


class RowGradients:
    """bf16 gradients [rows, width] of the rows `ids` (sorted int64)."""

    def __init__(self, ids: Tensor, values: Tensor) -> None:
        self.ids, self.values = ids, values
        # By row, its place: a look-up that costs less than a search, and no threads.
        self._place = np.full(int(ids[-1]) + 1 if ids.numel() else 0, -1, dtype=np.int64)
        self._place[ids.numpy()] = np.arange(ids.numel())

    def places(self, ids: np.ndarray) -> np.ndarray:
        """For each of `ids` (sorted) its place in `self.ids`, -1 where it has none."""
        known = np.searchsorted(ids, self._place.size)
        found = np.full(ids.size, -1, dtype=np.int64)
        found[:known] = self._place[ids[:known]]
        return found


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
        self._update(ids.numpy(), dense, gradients, update)

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
        rest = np.ones(high - low, dtype=bool)
        first, last = np.searchsorted(but.numpy(), (low, high))
        rest[but.numpy()[first:last] - low] = False
        self._update(np.flatnonzero(rest) + low, dense, gradients, update)

    # numpy, not torch, for the bookkeeping: torch's threads would compete with Adam's for the cores.

    def _update(self, ids: np.ndarray, dense: Tensor | None, gradients: RowGradients | None, update: Update) -> None:
        for start, stop, hyper in self.spans:
            first, last = np.searchsorted(ids, (start, stop))
            if first == last:
                continue
            mine = ids[first:last]
            places, values = self._gradients(mine, gradients)
            whole = None if dense is None else dense[: self.rows * self.width]
            update(self.state, torch.from_numpy(mine), torch.from_numpy(places), values, whole, hyper)

    def _gradients(self, ids: np.ndarray, gradients: RowGradients | None) -> tuple[np.ndarray, Tensor]:
        """(place of each row's gradient or -1, gradients)."""
        if gradients is None:
            return np.full(ids.size, -1, dtype=np.int64), torch.zeros(0, self.width, dtype=torch.bfloat16)
        return gradients.places(ids), gradients.values
