"""Embedding rows on the host: gathered for a batch, and their gradients from that of what they were looked up for.

Threads are a pool of the native kernels, and Adam's, which take part between two blocks of their own: torch's would
compete with those for the cores. On CUDA, a plain look-up's gradients are summed there, to the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slidetune.runtime import adam_native


def gather_rows(table: Tensor, rows: Tensor, out: Tensor, *, threads: int) -> None:
    """Copy rows of a bf16 table [any, width] to `out` [n, width], both contiguous. `rows`: int64 [n], all in the table
    (not checked: they come from a batch that was)."""
    library = adam_native.library()
    if library is None:
        torch.index_select(table, 0, rows, out=out)
        return
    library.slidetune_gather_rows(
        threads, table.shape[1], rows.numel(), rows.data_ptr(), table.data_ptr(), out.data_ptr()
    )


@dataclass(frozen=True, slots=True)
class Readers:
    """Which tokens read which row."""

    places: Tensor
    """int64 [tokens]: the row that each token read."""
    order: np.ndarray
    """The tokens by row, those of one row in their own order."""
    starts: np.ndarray
    """int64 [rows + 1]: where in `order` each row's tokens start."""

    @classmethod
    def of(cls, places: Tensor, rows: int) -> Readers:
        """Sorts: not for when everything waits."""
        starts = np.zeros(rows + 1, dtype=np.int64)
        np.cumsum(np.bincount(places.numpy(), minlength=rows), out=starts[1:])
        return cls(places, np.argsort(places.numpy(), kind="stable"), starts)

    def on(self, device: torch.device) -> ReadersThere:
        order, starts = (torch.from_numpy(found.astype(np.int32)) for found in (self.order, self.starts))
        return ReadersThere(order.to(device), starts.to(device))


@dataclass(frozen=True, slots=True)
class ReadersThere:
    """`Readers` on a CUDA device."""

    order: Tensor
    """int32 [tokens]."""
    starts: Tensor
    """int32 [rows + 1]."""


def sum_rows(upstream: Tensor, readers: Readers, out: Tensor, *, fresh: bool, threads: int) -> None:
    """For each row the sum of the gradients of the tokens that read it, in the tokens' order, rounded to bf16 after
    each: the bits of torch's embedding_dense_backward on the CPU, but for NaN, which is always 0x7FC0.

    Args:
        upstream: bf16 [tokens, width], contiguous.
        readers: the tokens that read each row of `out`.
        out: [rows, width], contiguous. bf16 receives the sums; fp32 has them added, or is overwritten if `fresh`.
        fresh: this is the first micro-batch.
        threads: CPU threads, the calling one included.
    """
    rows, width = out.shape
    if readers.starts.size != rows + 1 or readers.order.size != upstream.shape[0]:
        raise ValueError(f"readers of {readers.starts.size - 1} rows by {readers.order.size} tokens don't fit")
    library = adam_native.library()
    if library is None:
        found = torch.ops.aten.embedding_dense_backward(upstream, readers.places, rows, -1, False)
        out.copy_(found) if fresh else out.add_(found)
        return
    library.slidetune_sum_rows(
        threads,
        width,
        rows,
        readers.starts.ctypes.data,
        readers.order.ctypes.data,
        upstream.data_ptr(),
        out.data_ptr(),
        out.dtype == torch.float32,
        fresh,
    )


def sum_rows_there(upstream: Tensor, readers: ReadersThere, out: Tensor) -> None:
    """`sum_rows` on a CUDA device, of one micro-batch: `out` is bf16. Asynchronous; the same bits but for NaN."""
    if upstream.dtype != torch.bfloat16 or out.dtype != torch.bfloat16:
        raise ValueError(f"bf16 needed, not {upstream.dtype} and {out.dtype}")
    if readers.starts.numel() != out.shape[0] + 1 or readers.order.numel() != upstream.shape[0]:
        raise ValueError(f"readers of {readers.starts.numel() - 1} rows by {readers.order.numel()} tokens don't fit")
    from slidetune.runtime.row_sums_triton import launch

    launch(upstream, readers.order, readers.starts, out)


def growth_of_squares(values: Tensor, rows: Tensor, dense: Tensor | None, *, threads: int) -> float:
    """By how much the sum of a gradient's squares grows in fp64 as the gradients `values` of some of its rows are added
    to it, each element rounded to bf16.

    Args:
        values: bf16 [n, width], contiguous.
        rows: int64 [n], each once.
        dense: bf16 [any, width], contiguous: the gradient before; None if it was nothing.
        threads: CPU threads, the calling one included.
    """
    library = adam_native.library()
    if library is None:
        before = None if dense is None else dense.index_select(0, rows)
        after = values if before is None else before + values
        grown = after.double().square().sum()
        return float(grown if before is None else grown - before.double().square().sum())
    growths = np.empty(values.shape[0])
    library.slidetune_row_growths(
        threads,
        values.shape[1],
        values.shape[0],
        rows.data_ptr(),
        values.data_ptr(),
        None if dense is None else dense.data_ptr(),
        growths.ctypes.data,
    )
    return float(growths.sum())
