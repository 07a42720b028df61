"""The gradients of embedding rows, summed on the device: what crosses the link is a row's gradient, not a token's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _sum_rows(upstream, order, starts, out, width: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    first, last = tl.load(starts + row), tl.load(starts + row + 1)
    total = tl.zeros((block,), tl.float32)
    for place in range(first, last):
        token = tl.load(order + place).to(tl.int64)
        one = tl.load(upstream + token * width + columns, inside, other=0.0).to(tl.float32)
        # Rounded after each, as on the host.
        total = (total + one).to(tl.bfloat16).to(tl.float32)
    tl.store(out + row.to(tl.int64) * width + columns, total.to(tl.bfloat16), inside)


def launch(upstream: Tensor, order: Tensor, starts: Tensor, out: Tensor) -> None:
    """As `row_kernels.sum_rows_there`, unchecked."""
    rows, width = out.shape
    if not rows:
        return
    with torch.cuda.device(out.device):
        _sum_rows[rows, triton.cdiv(width, _BLOCK)](upstream, order, starts, out, width=width, block=_BLOCK)
