"""The schedule's pools, allocated: on the device, in page-locked or plain RAM, and in one file on NVMe.

Inner activations on the device, kept or in transit, are the exception: autograd makes those tensors, so torch's
allocator holds them and their pools are figures in the plan, not arenas. So are the workspaces of matrix kernels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slidetune.buffers import KEPT, PRODUCTS, WORKSPACES
from slidetune.runtime.arena import Arena
from slidetune.runtime.nvme import ALIGNMENT
from slidetune.schedule import Schedule

# Slots start at multiples of this many bytes: what vector loads and matrix kernels want.
GPU_ALIGNMENT = 512
# Pools whose tensors autograd makes.
AUTOGRADS = (KEPT, PRODUCTS, "activations in transit")
# Slots that O_DIRECT reads and writes, with room for the pieces in one slot to be aligned each.
_DIRECT = ("state staging", "weight staging", "input staging")
_DIRECT_PIECES = 4


class Pools:
    """Slots by pool name and number, as raw bytes. Close to give all memory back.

    Raises MemoryError or torch.OutOfMemoryError if a tier does not have what the schedule asks for.
    """

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        self._slots: dict[str, list[Tensor]] = {}
        self._arenas: list[Arena] = []
        self.device = device
        self.names = {pool.name for pool in schedule.pools}
        try:
            for pool in schedule.pools:
                if pool.name in (*AUTOGRADS, WORKSPACES) or pool.tier == "nvme":
                    continue
                size, align = pool.slot_bytes, GPU_ALIGNMENT
                if pool.name in _DIRECT:
                    size, align = size + _DIRECT_PIECES * ALIGNMENT, ALIGNMENT
                stride = -(-size // align) * align
                if pool.tier == "gpu":
                    whole = torch.empty(stride * pool.slots, dtype=torch.uint8, device=device)
                else:
                    arena = Arena(stride * pool.slots, pin=pool.page_locked and device.type == "cuda", name=pool.name)
                    self._arenas.append(arena)
                    whole = arena.tensor(0, stride * pool.slots, torch.uint8)
                self._slots[pool.name] = [whole[n * stride : n * stride + size] for n in range(pool.slots)]
        except BaseException:
            self.close()
            raise

    def __contains__(self, name: str) -> bool:
        return name in self._slots

    def slot(self, name: str, number: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """A slot as a flat tensor of `dtype`, with its own version counter: autograd must not take a write to one
        slot for a write to another."""
        whole = self._slots[name][number]
        return whole[: whole.numel() // dtype.itemsize * dtype.itemsize].view(dtype).data

    def close(self) -> None:
        """Give up all memory; slots handed out before stay valid until they are dropped."""
        self._slots.clear()
        while self._arenas:
            self._arenas.pop().close()

    @property
    def page_locked_bytes(self) -> int:
        return sum(arena.nbytes for arena in self._arenas if arena.pinned)

    def sizes(self) -> Mapping[str, int]:
        """Bytes allocated a pool."""
        return {name: sum(slot.numel() for slot in slots) for name, slots in self._slots.items()}
