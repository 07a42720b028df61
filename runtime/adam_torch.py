"""AdamW over a split master in torch and numpy: the fallback where the native kernel was not built.

Same bits as the native kernel, by the same chain of correctly rounded fp32 operations (see `adam`). Two of them need
care: torch fuses multiply and add or not, as its build and the CPU have it, so `_fma` computes the fused result
itself; and torch's fp32 square root is MKL's, which is off by one bit in a fifth of all cases, so numpy's is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from slidetune.runtime.split import join, quiet_nans, set_down, split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slidetune.runtime.adam import Coefficients

# The temporaries of one block stay in a core's cache.
_BLOCK = 1 << 16
# Rows copied out, updated and copied back at a time.
_ROWS = 1024


def step(high: Tensor, low: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, c: Coefficients) -> None:
    """One update in place; arguments as `adam.adam_step` has checked them."""
    whole = (high, low, exp_avg, exp_avg_sq, grad)
    with torch.no_grad(), np.errstate(all="ignore"):
        for start in range(0, high.numel(), _BLOCK):
            _block(*(tensor[start : start + _BLOCK] for tensor in whole), c)


def rows_step(
    state: Sequence[Tensor],
    width: int,
    rows: Tensor,
    places: Tensor,
    values: Tensor,
    dense: Tensor | None,
    c: Coefficients,
) -> None:
    """One update of rows in place; arguments as `adam.adam_rows` has checked them."""
    tables = [part[: part.numel() // width * width].view(-1, width) for part in state]
    for ids, at in zip(rows.split(_ROWS), places.split(_ROWS), strict=True):
        copies = [table.index_select(0, ids) for table in tables]
        if dense is None:
            gradient = torch.zeros(ids.numel(), width, dtype=torch.bfloat16)
        else:
            gradient = dense.view(-1, width).index_select(0, ids)
        own = at >= 0
        gradient[own] += values[at[own]]
        step(*(copy.view(-1) for copy in copies), gradient.view(-1), c)
        for table, copy in zip(tables, copies, strict=True):
            table.index_copy_(0, ids, copy)


def _block(high: Tensor, low: Tensor, m: Tensor, v: Tensor, grad: Tensor, c: Coefficients) -> None:
    down = v.signbit()
    v.abs_()
    g = grad.float() * c.grad_scale
    m.copy_(_fma(c.lerp, g - m, g if c.lerp_from_grad else m))
    v.copy_(_fma(g * c.one_minus_beta2, g, v * c.beta2))
    denominator = (torch.from_numpy(np.sqrt(v.numpy())) / c.sqrt_correction2).add_(c.eps)
    parameter = join(high, low, down).mul_(c.decay).sub_((m * c.step_size).div_(denominator))
    for tensor in (m, v, parameter):
        quiet_nans(tensor)
    set_down(v, split(parameter, out=(high, low, down))[2])


def _fma(a: Tensor | float, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c, rounded once, of fp32 values.

    The product is exact in fp64. The sum is rounded to odd there: where it is inexact its last bit is set, which
    keeps the second rounding, to fp32, from seeing a tie that is none (Boldo and Melquiond, 2008).
    """
    if not isinstance(a, Tensor):
        a = torch.tensor(a, dtype=torch.float32)
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    # What the sum lost, exactly (Knuth).
    part = total - product
    lost = (product - (total - part)).add_(addend - part)
    bits = total.view(torch.int64)
    # Towards the exact value: one step of the magnitude up or down, from an even pattern to an odd one.
    outward = (lost > 0) == (total > 0)
    inexact = (lost != 0) & lost.isfinite() & (bits & 1 == 0)
    step = torch.where(outward, 1, -1).mul_(inexact)
    return (bits + step).view(torch.float64).float()
