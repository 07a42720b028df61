"""RAM of a run that is in no pool of its schedule."""

from __future__ import annotations

from slidetune.units import GIB

PROCESS_BYTES = 3 * GIB // 2
"""The process itself: Python, torch, CUDA's host side, transformers. What is left to the operating system is not in
it; a profile's host.process_gib counts both."""
