"""RAM of a run that is in no pool of its schedule."""

from __future__ import annotations

from slidetune.units import GIB

_CUDA_BYTES = 11 * GIB // 8
_CPU_BYTES = 2 * GIB // 5


def process_bytes(device: str) -> int:
    """The process itself: Python, torch, transformers and, on "cuda", CUDA's host side: 57 runs on two H200 machines
    had 1.1 to 1.65 GiB beside their pools, half of them less than 1.37; small ones on the CPU 0.4. What is left to the
    operating system is not in it; a profile's host.process_gib counts both."""
    return _CPU_BYTES if device.startswith("cpu") else _CUDA_BYTES
