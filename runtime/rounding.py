"""Gradients that add up in fp32 become bf16, in which they travel."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements that are rounded through a temporary.
_FIRST = 1 << 20


def as_rounded(values: Tensor) -> Tensor:
    """Where `round_in_place` leaves what it makes of a flat tensor: bf16, as long; the tensor itself if it is bf16."""
    return values if values.dtype == torch.bfloat16 else values.view(torch.bfloat16)[: values.numel()]


def round_in_place(values: Tensor) -> Tensor:
    """Round a flat fp32 tensor to bf16 in the first half of its own memory; returns that half.

    Elements [n, 2n) go to bytes that held elements [n / 2, n), which were rounded before: only the first ones need a
    temporary.
    """
    rounded, count = as_rounded(values), values.numel()
    first = values[:_FIRST].to(torch.bfloat16)
    done = first.numel()
    while done < count:
        stop = min(2 * done, count)
        rounded[done:stop].copy_(values[done:stop])
        done = stop
    rounded[: first.numel()].copy_(first)
    return rounded
