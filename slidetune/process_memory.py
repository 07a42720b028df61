"""RAM of a run that is in no pool of its schedule: the process itself."""

from __future__ import annotations

from slidetune.schedule import Schedule
from slidetune.units import GIB

PROCESS_BYTES = 3 * GIB // 2
"""Python, torch, CUDA's host side and transformers. What is left to the operating system is not in it."""


def ram_peak_bytes(schedule: Schedule, device: str = "cuda") -> int:
    """The process's resident peak: its pools in RAM, and itself. On the CPU the device's memory is RAM too."""
    on_device = schedule.peak_bytes("gpu") if device == "cpu" else 0
    return schedule.peak_bytes("ram") + on_device + PROCESS_BYTES


def page_locked_bytes(schedule: Schedule) -> int:
    """Bytes of RAM that the device copies from and to by itself."""
    return sum(pool.bytes for pool in schedule.pools_of("ram") if pool.page_locked)
