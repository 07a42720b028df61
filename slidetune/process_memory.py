"""RAM of a run that is in no pool of its schedule."""

from __future__ import annotations

from slidetune.units import GIB

_CUDA_BYTES = 3 * GIB // 2
_CPU_BYTES = 2 * GIB // 5


def process_bytes(device: str) -> int:
    """The process itself: Python, torch, transformers and, on "cuda", CUDA's host side: eleven runs on an H200 had 1.4
    to 1.7 GiB beside their pools, small ones on the CPU 0.4. What is left to the operating system is not in it; a
    profile's host.process_gib counts both."""
    return _CPU_BYTES if device.startswith("cpu") else _CUDA_BYTES
