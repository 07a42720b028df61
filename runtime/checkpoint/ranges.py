"""A unit's masters and moments as a sequence of ranges that fit into little memory, wherever they live."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from slidetune.runtime.arena import Arena
from slidetune.runtime.layout import Layout
from slidetune.runtime.masters import Master, State
from slidetune.runtime.nvme import ALIGNMENT, aligned

PARTS = {
    "exp_avg": torch.float32,
    "exp_avg_sq": torch.float32,
    "master_high": torch.bfloat16,
    "master_low": torch.int16,
}
"""What is kept of a trained parameter, by the end of its name in a checkpoint. The sign of exp_avg_sq belongs to the
master (see `split`). Four-byte types first: so they are aligned in a file."""
FROZEN_PARTS = ("master_high",)
"""What is kept of a frozen one."""

Range = tuple[int, dict[str, Tensor]]
"""First element, and a flat view of each part from there on; frozen elements have one part."""
# Elements at a time: 48 MiB of state.
_STEP = 1 << 22


def ranges(master: Master, slot: Tensor | None, *, store: bool = False) -> Iterator[Range]:
    """All of a unit's elements in order, for reading; with `store` for setting: what was put into a range is where it
    belongs once the next one is asked for.

    `slot`: the staging buffer (bytes) for units on NVMe; a range is valid until the next one.
    """
    if master.drive is None:
        for start in range(0, master.layout.trained, _STEP):
            yield start, _parts(master.state.range(start, start + _STEP))
    else:
        yield from _chunks(master, slot, store)
    yield from _frozen(master, slot, store)


def state_nbytes(layout: Layout) -> int:
    """Bytes of a unit's masters and moments."""
    return 10 * layout.trained + 2 * layout.total


def copied(master: Master, slot: Tensor | None) -> Master:
    """A copy of a unit in RAM. Raises MemoryError if there is too little."""
    layout = master.layout
    trained, total = layout.trained, layout.total
    arena = Arena(state_nbytes(layout), name="a unit's copy for the checkpoint")
    high = arena.tensor(8 * trained, total, torch.bfloat16)
    state = State(
        high[:trained],
        arena.tensor(8 * trained + 2 * total, trained, torch.int16),
        arena.tensor(0, trained, torch.float32),
        arena.tensor(4 * trained, trained, torch.float32),
    )
    # The views keep the memory.
    arena.close()
    copy = Master(layout=layout, tier="ram", high=high, state=state)
    targets = {**_parts(state), "master_high": high}
    for start, parts in ranges(master, slot):
        for name, part in parts.items():
            targets[name][start : start + part.numel()].copy_(part)
    return copy


def _parts(state: State) -> dict[str, Tensor]:
    return {
        "exp_avg": state.exp_avg,
        "exp_avg_sq": state.exp_avg_sq,
        "master_high": state.high,
        "master_low": state.low,
    }


def _chunks(master: Master, slot: Tensor, store: bool) -> Iterator[Range]:
    drive = master.drive
    for number in range(-(-master.layout.trained // drive.chunk)):
        if not store:
            drive.read_state(slot, number)
        state, start = drive.staged(slot, number), number * drive.chunk
        if not drive.whole:
            state = state._replace(high=master.high[start : start + state.low.numel()])
        yield start, _parts(state)
        if store:
            drive.write_state(slot, number)


def _frozen(master: Master, slot: Tensor | None, store: bool) -> Iterator[Range]:
    trained, total = master.layout.trained, master.layout.total
    if master.high is not None:
        for start in range(trained, total, _STEP):
            yield start, {"master_high": master.high[start : min(start + _STEP, total)]}
        return
    drive = master.drive
    step = min(_STEP, slot.numel() // 2 - ALIGNMENT)
    for start in range(trained, total, step):
        stop = min(start + step, total)
        # Whole blocks: a neighbour's elements in them come along, and stay what they are.
        first = 2 * start // ALIGNMENT * ALIGNMENT
        block = slot[: aligned(2 * stop) - first]
        drive.file.read(drive.weights_at + first, block)
        yield start, {"master_high": block[2 * start - first : 2 * stop - first].view(torch.bfloat16)}
        if store:
            drive.file.write(drive.weights_at + first, block)
