"""Where each parameter of a unit lies in the unit's flat arrays: weights, gradient, remainder and moments alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from slidetune.runtime.adam import AdamW

# Tensors come by how large a power of two, up to this, divides their size: then each starts at a multiple of its own.
_ALIGNED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One parameter in a flat array."""

    name: str
    shape: tuple[int, ...]
    hyper: AdamW | None
    """Its hyper-parameters; None if it is frozen."""
    start: int = 0
    """First element."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.numel

    def of(self, flat: Tensor) -> Tensor:
        """This parameter's part of a flat array, in its shape."""
        return flat[self.start : self.stop].view(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """The parameters of one unit: trained ones first, well aligned, frozen ones last."""

    entries: tuple[Entry, ...]
    runs: tuple[tuple[int, int, AdamW], ...] = field(init=False)
    """(start, stop, hyper-parameters) of trained elements, in order and without gaps."""

    def __post_init__(self) -> None:
        runs: list[tuple[int, int, AdamW]] = []
        for entry in self.entries:
            if entry.hyper is None:
                continue
            if runs and runs[-1][2] == entry.hyper:
                runs[-1] = (runs[-1][0], entry.stop, entry.hyper)
            else:
                runs.append((entry.start, entry.stop, entry.hyper))
        object.__setattr__(self, "runs", tuple(runs))

    @classmethod
    def packed(cls, entries: Iterable[Entry]) -> Layout:
        """Entries given their places, in the order that suits the update best."""
        kinds: list[AdamW | None] = []
        entries = list(entries)
        for entry in entries:
            if entry.hyper is not None and entry.hyper not in kinds:
                kinds.append(entry.hyper)
        kinds.append(None)

        def place(entry: Entry) -> tuple[bool, int, int]:
            return entry.hyper is None, -math.gcd(entry.numel, _ALIGNED), kinds.index(entry.hyper)

        return cls.in_order(sorted(entries, key=place))

    @classmethod
    def in_order(cls, entries: Iterable[Entry]) -> Layout:
        """Entries given their places in the order in which they come; frozen ones must come last."""
        placed, start = [], 0
        for entry in entries:
            placed.append(Entry(name=entry.name, shape=entry.shape, hyper=entry.hyper, start=start))
            start += entry.numel
        return cls(tuple(placed))

    @property
    def total(self) -> int:
        """Elements."""
        return self.entries[-1].stop if self.entries else 0

    @property
    def trained(self) -> int:
        """Trained elements; they come first."""
        return self.runs[-1][1] if self.runs else 0

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, AdamW]]:
        """The part of each run inside [start, stop)."""
        for first, last, hyper in self.runs:
            low, high = max(first, start), min(last, stop)
            if low < high:
                yield low, high, hyper
