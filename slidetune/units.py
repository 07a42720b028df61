"""Units, and how figures are written for people."""

from __future__ import annotations

KIB, MIB, GIB = 2**10, 2**20, 2**30
GB, TB = 10**9, 10**12


def format_bytes(size: float) -> str:
    """12.3 GiB, 640 MiB, 12 B: binary units, as memory is sold and `nvidia-smi` prints it."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size) >= unit:
            return f"{_three_digits(size / unit)} {name}"
    return f"{size:.0f} B"


def format_seconds(seconds: float) -> str:
    """3.51 s, 12.4 ms, 80 µs, 2 h 10 min."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    if seconds >= 1:
        return f"{_three_digits(seconds)} s"
    if seconds >= 1e-3:
        return f"{_three_digits(seconds * 1e3)} ms"
    return f"{_three_digits(seconds * 1e6)} µs"


def format_count(count: float) -> str:
    """8.03 B, 494 M: parameters."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= unit:
            return f"{_three_digits(count / unit)} {name}"
    return f"{count:.0f}"


def _three_digits(value: float) -> str:
    """1.23, 12.3, 123, 1,234: never an exponent."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"
