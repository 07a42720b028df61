"""Exact-size host memory in 2 MiB pages, page-locked where there is a CUDA device.

torch's pinned allocator rounds a request up to a power of two; an arena takes what is asked for, to the page. Large
pages make the Adam kernel 16 to 45 % faster on a 16-core host, and page-locking memory that was already touched is
nine times as fast as having CUDA allocate it.
"""

from __future__ import annotations

import math
import mmap
import weakref
from pathlib import Path

import psutil
import torch
from torch import Tensor

from slidetune.units import format_bytes

HUGE_PAGE = 2 << 20
_REGISTER_PORTABLE = 1


class Arena:
    """`nbytes` of host memory, zeroed, 2 MiB aligned, present from the start; a context manager.

    Every page is touched at once: a step never pays for a first touch, and memory that is not there shows now.
    `pin` page-locks it when torch sees a CUDA device and does nothing otherwise; `pinned` says which.

    The memory is unmapped when the arena is closed *and* its last view is gone: a view never dangles. Copies from or
    to a pinned arena must have ended before `close`.

    Raises:
        ValueError: if `nbytes` is not positive.
        MemoryError: if the machine, or the control group the process is in, does not have that much left.
        RuntimeError: if CUDA refuses to lock the pages.
    """

    def __init__(self, nbytes: int, *, pin: bool = False, name: str = "arena") -> None:
        if nbytes <= 0:
            raise ValueError(f"{name} of {nbytes} bytes: must be positive")
        self.name = name
        self.nbytes = nbytes
        self.pinned = False
        self._map, self._start = _map(nbytes, name)
        self._alive = weakref.ref(self._map)
        whole = self.tensor(0, (nbytes,), torch.uint8)
        whole[:: mmap.PAGESIZE].zero_()
        if pin and torch.cuda.is_available():
            self._lock_pages(whole)

    def tensor(self, offset_bytes: int, shape: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous CPU tensor over the arena's bytes from `offset_bytes` on; shares memory, copies nothing.

        Raises:
            ValueError: if it does not fit, `offset_bytes` is no multiple of the element size, or the arena is closed.
        """
        if self._map is None:
            raise ValueError(f"{self.name} is closed")
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        count = math.prod(shape)
        if offset_bytes % dtype.itemsize:
            raise ValueError(f"{self.name}: offset {offset_bytes} is no multiple of {dtype.itemsize} bytes ({dtype})")
        end = offset_bytes + count * dtype.itemsize
        if offset_bytes < 0 or end > self.nbytes:
            raise ValueError(f"{self.name} has {self.nbytes} bytes; {dtype} {shape} would take {offset_bytes} to {end}")
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._start + offset_bytes).view(shape)

    @property
    def mapped(self) -> bool:
        """Whether the memory is still there: until the arena is closed and no view is left."""
        return self._alive() is not None

    def close(self) -> None:
        """Unlock and give up the memory; may be called again."""
        if self._map is None:
            return
        if self.pinned:
            whole = self.tensor(0, (self.nbytes,), torch.uint8)
            self.pinned = False
            # An error here would hide the one that led to closing; the pages go with the mapping in any case.
            torch.cuda.cudart().cudaHostUnregister(whole.data_ptr())
        self._map = None

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock_pages(self, whole: Tensor) -> None:
        size = -(-self.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        code = int(torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), size, _REGISTER_PORTABLE))
        if code:
            self._map = None
            raise RuntimeError(
                f"{self.name}: CUDA refused to page-lock {format_bytes(size)} (cudaHostRegister returned {code}); "
                "the limit on locked memory (ulimit -l) or the RAM may be too small"
            )
        self.pinned = True


def available_bytes() -> int:
    """Host memory this process can still take, in bytes: what the machine has or its control group leaves."""
    left = [psutil.virtual_memory().available]
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        for folder in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")):
            try:
                most, now = (int((folder / file).read_text()) for file in (limit, used))
                # Clean file pages count as used but make way.
                cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            left.append(most - now + int(cache.get("inactive_file", 0)))
    return max(0, min(left))


def _map(nbytes: int, name: str) -> tuple[mmap.mmap, int]:
    """A mapping and the offset in it of the first 2 MiB boundary, with at least `nbytes` from there."""
    left = available_bytes()
    if nbytes > left:
        raise MemoryError(f"{name} needs {format_bytes(nbytes)} of host memory; {format_bytes(left)} is available")
    try:
        mapping = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{name} needs {format_bytes(nbytes)} of host memory; the system refused: {error}") from error
    start = -torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr() % HUGE_PAGE
    # Cut the end off: where it went on, the last partial 2 MiB would be backed by a whole large page.
    mapping.resize(start + nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping, start
