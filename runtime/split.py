"""The split master: an fp32 parameter kept as its bf16 half and the 16 bits that are left.

    fp32 bits = (bf16 bits << 16) + remainder        remainder: a signed 16-bit number; all modulo 2**32

The bf16 half is what the GPU reads, so an upload needs no conversion, and the master costs four bytes in place of six.

**Rounding.** The low 16 bits of the fp32 pattern, read as a signed number, are the remainder, and that leaves no
choice for the half: it is the fp32 number rounded to nearest, *ties away from zero*. Ties to even, as torch rounds,
cannot be had: a tie that goes down would need the remainder +32768, which 16 bits do not hold. The two differ only
in exact ties, one number in 65536 of those with random low bits.

**Infinities and NaN.** The pairs are as many as the patterns, so every pattern comes back bit for bit. Infinities are
infinite in the half, and so is (as with any rounding) a finite number within half a bf16 step of overflow. The NaN
patterns of fp32 outnumber the pairs whose half is NaN by 65535 for each sign, so *no* exact split can show every NaN
in the half. This one shows each NaN that arithmetic makes on x86 or Arm (0x7FC00000, 0xFFC00000) and hides those
with a payload of 0x000001..0x007FFF (the half is infinite: signalling NaN) or 0x7F8000..0x7FFFFF (the half is a zero
of the other sign: 0x7FFFFFFF is CUDA's NaN). `adam_step` therefore stores each NaN as 0x7FC00000, and
`quiet_nans` does it for tensors from elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF_BITS = 16


def split(master: Tensor, *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The bf16 half and the int16 remainder of an fp32 tensor of any shape, on its device.

    `out` receives them when given (bf16 and int16 of the same shape, such as views of an arena).

    Raises:
        TypeError: if `master` is not fp32 or `out` has other dtypes.
    """
    _require(master, torch.float32, "master")
    bits = master.detach().view(torch.int32)
    # No addition of 0x8000 to the whole word: it may pass 2**31, which C leaves undefined.
    half = ((bits >> _HALF_BITS) + ((bits >> (_HALF_BITS - 1)) & 1)).to(torch.int16).view(torch.bfloat16)
    if out is None:
        return half, bits.to(torch.int16)
    high, low = out
    _require(high, torch.bfloat16, "out[0]")
    _require(low, torch.int16, "out[1]")
    high.copy_(half)
    low.copy_(bits)
    return high, low


def join(high: Tensor, low: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The fp32 tensor whose split is (`high`, `low`), bit for bit; any shape, on their device, into `out` if given.

    Raises:
        TypeError: if `high` is not bf16, `low` not int16 or `out` not fp32.
    """
    _require(high, torch.bfloat16, "high")
    _require(low, torch.int16, "low")
    bits = (high.detach().view(torch.int16).to(torch.int32) << _HALF_BITS).add_(low)
    if out is None:
        return bits.view(torch.float32)
    _require(out, torch.float32, "out")
    return out.copy_(bits.view(torch.float32))


def quiet_nans(master: Tensor) -> Tensor:
    """Make every NaN of an fp32 tensor 0x7FC00000, in place, so that its half is a NaN too; returns the tensor."""
    _require(master, torch.float32, "master")
    return master.masked_fill_(master.isnan(), float("nan"))


def _require(tensor: Tensor, dtype: torch.dtype, name: str) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, not {tensor.dtype}")
