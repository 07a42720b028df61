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

from collections.abc import Iterator

import torch
from torch import Tensor

_HALF_BITS = 16
# Elements at once.
_BLOCK = 1 << 22


def split(master: Tensor, *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The bf16 half and the int16 remainder of an fp32 tensor of any shape, on its device.

    `out` receives them when given: contiguous bf16 and int16 tensors of as many elements, such as views of an arena.
    The temporaries are then of one block, whatever the size.

    Raises:
        TypeError: if `master` is not fp32 or `out` has other dtypes.
        ValueError: if `out` is not contiguous or of another size.
    """
    _require(master, torch.float32, "master")
    if out is None:
        out = (
            torch.empty(master.shape, dtype=torch.bfloat16, device=master.device),
            torch.empty(master.shape, dtype=torch.int16, device=master.device),
        )
    _require(out[0], torch.bfloat16, "out[0]", like=master)
    _require(out[1], torch.int16, "out[1]", like=master)
    for part, high, low in _blocks(master.detach(), *out):
        bits = part.view(torch.int32)
        # No addition of 0x8000 to the whole word: it may pass 2**31, which C leaves undefined.
        high.view(torch.int16).copy_((bits >> _HALF_BITS) + ((bits >> (_HALF_BITS - 1)) & 1))
        low.copy_(bits)
    return out


def join(high: Tensor, low: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The fp32 tensor whose split is (`high`, `low`), bit for bit; any shape, on their device, into `out` if given.

    Raises:
        TypeError: if `high` is not bf16, `low` not int16 or `out` not fp32.
        ValueError: if the sizes differ or `out` is not contiguous.
    """
    _require(high, torch.bfloat16, "high")
    _require(low, torch.int16, "low")
    if low.numel() != high.numel():
        raise ValueError(f"high has {high.numel()} elements, low {low.numel()}")
    if out is None:
        out = torch.empty(high.shape, dtype=torch.float32, device=high.device)
    _require(out, torch.float32, "out", like=high)
    for part, upper, lower in _blocks(out, high.detach(), low.detach()):
        part.view(torch.int32).copy_((upper.view(torch.int16).to(torch.int32) << _HALF_BITS).add_(lower))
    return out


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
