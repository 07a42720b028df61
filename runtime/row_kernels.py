"""Embedding rows on the host: gathered for a batch, and their gradients from that of what they were looked up for.

Threads are the native kernels' pool, which Adam uses too: torch's own would compete with it for the cores.
"""

from __future__ import annotations

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


def sum_rows(upstream: Tensor, places: Tensor, out: Tensor, *, fresh: bool, threads: int) -> None:
    """For each row the sum of the gradients of the tokens that read it, in the tokens' order, rounded to bf16 after
    each: the bits of torch's embedding_dense_backward on the CPU.

    Args:
        upstream: bf16 [tokens, width], contiguous.
        places: int64 [tokens]: the row of `out` that each token read.
        out: [rows, width], contiguous. bf16 receives the sums; fp32 has them added, or is overwritten if `fresh`.
        fresh: this is the first micro-batch.
        threads: CPU threads, the calling one included.
    """
    rows, width = out.shape
    library = adam_native.library()
    if library is None:
        found = torch.ops.aten.embedding_dense_backward(upstream, places, rows, -1, False)
        out.copy_(found) if fresh else out.add_(found)
        return
    order = np.argsort(places.numpy(), kind="stable")
    starts = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(places.numpy(), minlength=rows), out=starts[1:])
    library.slidetune_sum_rows(
        threads,
        width,
        rows,
        starts.ctypes.data,
        order.ctypes.data,
        upstream.data_ptr(),
        out.data_ptr(),
        out.dtype == torch.float32,
        fresh,
    )
