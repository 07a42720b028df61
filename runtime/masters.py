"""Where each unit's master and moments live: RAM, the device, or NVMe; and what of them a chunk is.

A master is split (see `split`): bf16 half and remainder. Over all units of a tier the arrays lie one behind the
other, so a tier is four arrays: halves, remainders, first and second moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from slidetune.runtime.layout import Entry, Layout
from slidetune.runtime.nvme import ALIGNMENT, NvmeFile, aligned
from slidetune.runtime.split import join, split

if TYPE_CHECKING:
    from slidetune.runtime.pools import Pools

# Bytes of an element: two moments and the remainder.
_MOMENTS, _STATE = 8, 10


class State(NamedTuple):
    """Views over a range of a unit's elements, all flat and of one length."""

    high: Tensor
    low: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def range(self, start: int, stop: int) -> State:
        return State(*(part[start:stop] for part in self))


@dataclass(slots=True, kw_only=True)
class Master:
    """One unit's master and moments."""

    layout: Layout
    tier: str
    """gpu (all of it), ram, or nvme (remainder and moments, or all)."""
    high: Tensor | None = None
    """bf16 halves of all elements; None where they live on NVMe."""
    state: State | None = None
    """Of the trained elements; None where it lives on NVMe."""
    drive: OnDrive | None = None


class OnDrive:
    """A unit's state on NVMe, a region a chunk; its halves too, in one piece, if it lives there whole."""

    def __init__(self, file: NvmeFile, offset: int, layout: Layout, chunk: int, whole: bool) -> None:
        self.file, self.layout, self.chunk, self.whole = file, layout, chunk, whole
        self.weights_at = offset
        self.state_at = offset + (aligned(2 * layout.total) if whole else 0)
        self.stride = state_bytes(chunk)

    @staticmethod
    def nbytes(layout: Layout, chunk: int, whole: bool) -> int:
        """Bytes a unit takes in the file."""
        chunks = -(-layout.trained // chunk)
        return (aligned(2 * layout.total) if whole else 0) + chunks * state_bytes(chunk)

    def staged(self, slot: Tensor, number: int) -> State:
        """A staging slot (bytes) as the state of chunk `number`; with halves if they live here."""
        count = self._count(number)
        moment, half = aligned(4 * count), aligned(2 * count)
        starts = (0, moment, 2 * moment, 2 * moment + half)
        first, second, low, high = (
            slot[at : at + count * dtype.itemsize].view(dtype)
            for at, dtype in zip(starts, (torch.float32, torch.float32, torch.int16, torch.bfloat16), strict=True)
        )
        return State(high, low, first, second)

    def read_state(self, slot: Tensor, number: int) -> None:
        self._move(self.file.read, slot, number)

    def write_state(self, slot: Tensor, number: int) -> None:
        self._move(self.file.write, slot, number)

    def read_weights(self, slot: Tensor) -> None:
        """All halves into a staging slot (bytes)."""
        self.file.read(self.weights_at, slot[: aligned(2 * self.layout.total)])

    def write_weights(self, slot: Tensor) -> None:
        """All halves from a staging slot (bytes)."""
        self.file.write(self.weights_at, slot[: aligned(2 * self.layout.total)])

    def _move(self, move, slot: Tensor, number: int) -> None:
        count = self._count(number)
        size = 2 * aligned(4 * count) + aligned(2 * count)
        move(self.state_at + number * self.stride, slot[:size])
        if self.whole:
            move(self.weights_at + 2 * self.chunk * number, slot[size : size + aligned(2 * count)])

    def _count(self, number: int) -> int:
        return min(self.chunk, self.layout.trained - number * self.chunk)


def state_bytes(chunk: int) -> int:
    """Bytes of one chunk's remainder and moments in the file, each part aligned."""
    return 2 * aligned(4 * chunk) + aligned(2 * chunk)


class _Arrays:
    """A tier's four arrays, handed out unit by unit."""

    def __init__(self, high: Tensor | None, state: Tensor | None) -> None:
        self.high = high
        self.at_high = self.at_state = 0
        self.state = None
        if state is not None:
            count = state.numel() // _STATE
            self.state = (
                state[_MOMENTS * count : _STATE * count].view(torch.int16),
                state[: 4 * count].view(torch.float32),
                state[4 * count : _MOMENTS * count].view(torch.float32),
            )

    def take_high(self, count: int) -> Tensor:
        self.at_high += count
        return self.high[self.at_high - count : self.at_high]

    def take_state(self, count: int, high: Tensor) -> State:
        if not count:
            return State(high[:0], *(torch.empty(0, dtype=d) for d in (torch.int16, torch.float32, torch.float32)))
        self.at_state += count
        span = slice(self.at_state - count, self.at_state)
        return State(high[:count], *(array[span] for array in self.state))


def place_masters(
    layouts: Sequence[Layout], places: Sequence, pools: Pools, file: NvmeFile | None, chunk: int, file_offset: int = 0
) -> list[Master]:
    """A Master a unit: `layouts` of what each unit owns, `places` their `plans.Placement` (None: RAM)."""
    raw = {
        name: pools.slot(name, 0, torch.uint8) if name in pools else None
        for name in ("weights (bf16)", "optimizer state", "resident layers")
    }
    halves = raw["weights (bf16)"]
    ram = _Arrays(None if halves is None else halves.view(torch.bfloat16), raw["optimizer state"])
    device = _Arrays(None, None)
    if raw["resident layers"] is not None:
        whole = raw["resident layers"]
        pairs = [pair for pair in zip(layouts, places, strict=True) if pair[1] is not None and pair[1].resident]
        trained, total = (sum(getattr(layout, what) for layout, _ in pairs) for what in ("trained", "total"))
        high = whole[_STATE * trained : _STATE * trained + 2 * total].view(torch.bfloat16)
        device = _Arrays(high, whole[: _STATE * trained] if trained else None)
    masters = []
    for layout, place in zip(layouts, places, strict=True):
        if place is not None and place.resident:
            high = device.take_high(layout.total)
            masters.append(Master(layout=layout, tier="gpu", high=high, state=device.take_state(layout.trained, high)))
        elif place is not None and place.optimizer == "nvme":
            whole_unit = place.weights == "nvme"
            drive = OnDrive(file, file_offset, layout, chunk, whole_unit)
            file_offset += OnDrive.nbytes(layout, chunk, whole_unit)
            high = None if whole_unit else ram.take_high(layout.total)
            masters.append(Master(layout=layout, tier="nvme", high=high, drive=drive))
        else:
            high = ram.take_high(layout.total)
            masters.append(Master(layout=layout, tier="ram", high=high, state=ram.take_state(layout.trained, high)))
    return masters


def write_master(
    master: Master, parts: Iterable[tuple[Entry, Iterable[tuple[int, Tensor]]]], slot: Tensor | None
) -> None:
    """Set a unit's parameters; moments become zero.

    Args:
        parts: each entry with pieces of its values: (first element, flat tensor of any float dtype).
        slot: a staging buffer (bytes) for units on NVMe.
    """
    layout, drive = master.layout, master.drive
    high, low = master.high, None if master.state is None else master.state.low
    if drive is not None:
        high = torch.empty(layout.total, dtype=torch.bfloat16) if high is None else high
        low = torch.empty(layout.trained, dtype=torch.int16)
    downs: list[tuple[int, Tensor]] = []
    for entry, pieces in parts:
        for first, values in pieces:
            span = slice(entry.start + first, entry.start + first + values.numel())
            if values.dtype == torch.bfloat16:
                # Its own bf16 half, with nothing left over: what splitting would find, an order slower.
                high[span].copy_(values)
                if entry.hyper is not None:
                    low[span].zero_()
                continue
            upper, lower, down = split(values.to(device=high.device, dtype=torch.float32))
            high[span].copy_(upper)
            if entry.hyper is not None:
                low[span].copy_(lower)
                downs.append((span.start, down.nonzero().flatten()))
    if drive is None:
        master.state.exp_avg.zero_()
        master.state.exp_avg_sq.zero_()
        for start, places in downs:
            # Minus zero: the sign is the split master's.
            master.state.exp_avg_sq[start + places] = -0.0
        return
    for number in range(-(-layout.trained // drive.chunk)):
        span = slice(number * drive.chunk, min((number + 1) * drive.chunk, layout.trained))
        staged = drive.staged(slot, number)
        staged.exp_avg.zero_()
        staged.exp_avg_sq.zero_()
        for start, places in downs:
            here = start + places
            staged.exp_avg_sq[here[(here >= span.start) & (here < span.stop)] - span.start] = -0.0
        staged.low.copy_(low[span])
        if drive.whole:
            staged.high.copy_(high[span])
        drive.write_state(slot, number)
    if drive.whole:
        # Last: the end of the last chunk's write reaches into frozen halves behind it.
        _write_halves(drive, high)


def read_master(master: Master, slot: Tensor | None = None) -> Tensor:
    """A unit's parameters as a flat fp32 CPU tensor of all its elements (frozen ones have no remainder)."""
    layout = master.layout
    if master.drive is None:
        high, low, down = master.high.cpu(), master.state.low.cpu(), master.state.exp_avg_sq.signbit().cpu()
    else:
        drive = master.drive
        high = _read_halves(drive) if drive.whole else master.high.clone()
        low = torch.empty(layout.trained, dtype=torch.int16)
        down = torch.empty(layout.trained, dtype=torch.bool)
        for number in range(-(-layout.trained // drive.chunk)):
            drive.read_state(slot, number)
            staged = drive.staged(slot, number)
            span = slice(number * drive.chunk, number * drive.chunk + drive._count(number))
            low[span], down[span] = staged.low, staged.exp_avg_sq.signbit()
    return torch.cat((join(high[: layout.trained].contiguous(), low, down), high[layout.trained :].float()))


def unit_weights(master: Master, slot: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """A unit's parameters by name, on the host, rounded to `dtype`."""
    flat = read_master(master, slot)
    return {entry.name: entry.of(flat).to(dtype).clone() for entry in master.layout.entries}


def _aligned_bytes(nbytes: int) -> Tensor:
    whole = torch.empty(aligned(nbytes) + ALIGNMENT, dtype=torch.uint8)
    start = -whole.data_ptr() % ALIGNMENT
    return whole[start : start + aligned(nbytes)]


def _write_halves(drive: OnDrive, high: Tensor) -> None:
    buffer = _aligned_bytes(2 * high.numel())
    buffer[: 2 * high.numel()].view(torch.bfloat16).copy_(high)
    drive.write_weights(buffer)


def _read_halves(drive: OnDrive) -> Tensor:
    buffer = _aligned_bytes(2 * drive.layout.total)
    drive.read_weights(buffer)
    return buffer[: 2 * drive.layout.total].view(torch.bfloat16)
