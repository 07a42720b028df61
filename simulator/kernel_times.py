"""From measured GPU tasks to others: how much longer than the GPU's figures say a task like this one takes.

The figures (matrix rate, bandwidth, launch time) give a task's time in closed form; a measured task gives the ratio
to it. A task that was measured has its own ratio; any other the mean of the logarithms of all of its kind's, weighted
by the inverse fourth power of their distance (Shepard, 1968) in the logarithms of matrix work, traffic and launches.
So predictions are exact where measured, never leave the range of what was measured, and without measurements are
those of the figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from slidetune.hardware import KernelTime
from slidetune.schedule import Work

_POWER = 2.0
# Squared distance below which two tasks are the same.
_SAME = 1e-12


class KernelTimes:
    """Measured tasks of one implementation of the kernels, by kind."""

    def __init__(self, times: Sequence[KernelTime], kernels: str) -> None:
        self._points: dict[str, list[tuple[tuple[float, ...], float]]] = {}
        for time in times:
            if time.kernels == kernels:
                place = _place(time.flops, time.traffic_bytes, time.launches)
                self._points.setdefault(time.op, []).append((place, math.log(time.seconds / time.model_s)))

    def ratio(self, work: Work) -> float:
        """Time of a GPU task over what the GPU's figures alone say."""
        points = self._points.get(work.op)
        if not points:
            return 1.0
        place = _place(work.flops, work.traffic_bytes, work.launches)
        total = weights = 0.0
        for point, ratio in points:
            square = sum((a - b) ** 2 for a, b in zip(place, point, strict=True))
            if square < _SAME:
                return math.exp(ratio)
            weight = square**-_POWER
            total += weight * ratio
            weights += weight
        return math.exp(total / weights)


def _place(flops: float, traffic_bytes: float, launches: float) -> tuple[float, ...]:
    return tuple(math.log(max(amount, 1.0)) for amount in (flops, traffic_bytes, launches))
