"""Gradients of embedding rows on the host, from the gradient of what they were looked up for."""

from __future__ import annotations

import torch
from torch import Tensor

from slidetune.runtime import adam_native


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
    order = torch.sort(places, stable=True).indices
    starts = torch.zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(places, minlength=rows), 0, out=starts[1:])
    library.slidetune_sum_rows(
        threads,
        width,
        rows,
        starts.data_ptr(),
        order.data_ptr(),
        upstream.data_ptr(),
        out.data_ptr(),
        out.dtype == torch.float32,
        fresh,
    )
