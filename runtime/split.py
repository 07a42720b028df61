"""The split master: an fp32 parameter kept as its bf16 half, the 16 bits that are left, and one bit more.

    fp32 bits = (bf16 bits << 16) + remainder + (down << 16)     remainder: a signed 16-bit number; all modulo 2**32

The bf16 half is what the GPU reads, so an upload needs no conversion, and the master costs four bytes in place of six.

**Rounding.** The half is the fp32 number rounded to nearest, ties to even, as torch rounds: training sees the weights
that a plain loop sees, bit for bit. A tie that is rounded down leaves +32768, which 16 bits do not hold. It is kept as
-32768 with `down` set, a bit that Adam's state has to spare: the sign of the second moment (see `adam`). One number in
131072 of those with random low bits has it.

**Infinities and NaN.** Every pattern comes back bit for bit. Infinities are infinite in the half, and so is (as with
any rounding) a finite number half a bf16 step or less below overflow. A NaN whose payload rounding would carry out of
the NaNs does not show in the half: those with a payload of 0x000001..0x008000 (the half is infinite: signalling NaN)
or 0x7F8000..0x7FFFFF (the half is a zero of the other sign: 0x7FFFFFFF is CUDA's NaN). `adam_step` therefore stores
each NaN as 0x7FC00000, and `quiet_nans` does it for tensors from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_HALF_BITS = 16
_TIE = 1 << 15
# Elements at once.
_BLOCK = 1 << 22


def split(master: Tensor, *, out: tuple[Tensor, Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The bf16 half, the int16 remainder and the bool `down` of an fp32 tensor of any shape, on its device.

    `out` receives them when given: contiguous tensors of as many elements, such as views of an arena. The temporaries
    are then of one block, whatever the size.

    Raises:
        TypeError: if `master` is not fp32 or `out` has other dtypes.
        ValueError: if `out` is not contiguous or of another size.
    """
    _require(master, torch.float32, "master")
    dtypes = (torch.bfloat16, torch.int16, torch.bool)
    if out is None:
        out = tuple(torch.empty(master.shape, dtype=dtype, device=master.device) for dtype in dtypes)
    for number, dtype in enumerate(dtypes):
        _require(out[number], dtype, f"out[{number}]", like=master)
    for part, high, low, down in _blocks(master.detach(), *out):
        bits = part.view(torch.int32)
        # No addition to the whole word: it may pass 2**31, which C leaves undefined.
        truncated, rest = bits >> _HALF_BITS, bits & 0xFFFF
        odd = (truncated & 1).bool()
        high.view(torch.int16).copy_(truncated + ((rest > _TIE) | ((rest == _TIE) & odd)))
        low.copy_(bits)
        down.copy_((rest == _TIE) & ~odd)
    return out


def join(high: Tensor, low: Tensor, down: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The fp32 tensor whose split is (`high`, `low`, `down`), bit for bit; any shape, on their device, into `out` if
    given.

    Raises:
        TypeError: if `high` is not bf16, `low` not int16, `down` not bool or `out` not fp32.
        ValueError: if the sizes differ or `out` is not contiguous.
    """
    _require(high, torch.bfloat16, "high")
    _require(low, torch.int16, "low")
    _require(down, torch.bool, "down")
    if not low.numel() == down.numel() == high.numel():
        raise ValueError(f"high has {high.numel()} elements, low {low.numel()}, down {down.numel()}")
    if out is None:
        out = torch.empty(high.shape, dtype=torch.float32, device=high.device)
    _require(out, torch.float32, "out", like=high)
    for part, upper, lower, below in _blocks(out, high.detach(), low.detach(), down.detach()):
        truncated = upper.view(torch.int16).to(torch.int32).add_(below)
        part.view(torch.int32).copy_((truncated << _HALF_BITS).add_(lower))
    return out


def set_down(exp_avg_sq: Tensor, down: Tensor) -> None:
    """Keep `down` in the signs of a contiguous fp32 second moment, whose sign says nothing else."""
    bits = exp_avg_sq.view(torch.int32)
    bits.bitwise_and_(0x7FFFFFFF).bitwise_or_(down.to(torch.int32) << 31)


def quiet_nans(master: Tensor) -> Tensor:
    """Make every NaN of an fp32 tensor 0x7FC00000, in place, so that its half is a NaN too; returns the tensor."""
    _require(master, torch.float32, "master")
    return master.masked_fill_(master.isnan(), float("nan"))


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, flat, cut into pieces that bound the temporaries."""
    return zip(*(tensor.reshape(-1).split(_BLOCK) for tensor in tensors), strict=True)


def _require(tensor: Tensor, dtype: torch.dtype, name: str, like: Tensor | None = None) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, not {tensor.dtype}")
    # Written through a flat view, which only a contiguous tensor has.
    if like is not None and (not tensor.is_contiguous() or tensor.numel() != like.numel()):
        raise ValueError(f"{name} must be contiguous, of {like.numel()} elements, not {tuple(tensor.shape)}")
