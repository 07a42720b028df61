"""From measurements to a profile's figures: arithmetic alone, no clock and no torch.

**Contention.** The simulator shares host DRAM by weighted max-min fairness: beside Adam, whose weight is 1, a copy of
priority p runs p times as fast as Adam, each as a fraction of its speed alone, until one of the two is at full speed or
DRAM is full; a copied byte takes w bytes of Adam's traffic. So two fractions, measured with both running, give the two
figures, and pricing the same mix with these figures gives the fractions back.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# From here on a task runs at its own speed: what is missing is noise.
FULL_SPEED = 0.98
# A busy system may keep one side from running at all: no figure follows from that.
_LEAST_SPEED = 1e-3
# Least share of DRAM that a copy takes at full speed: every byte comes from there or goes there.
_LEAST_SHARE = 0.02


class Repeated(NamedTuple):
    """What repeated measurements of one thing say."""

    value: float
    """Their median."""
    spread: float
    """Half the distance between their quartiles over the median."""


def repeated(values: Sequence[float]) -> Repeated:
    """The median of several measurements and their spread."""
    middle = statistics.median(values)
    if len(values) < 2 or middle == 0.0:
        return Repeated(middle, 0.0)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Repeated(middle, abs(high - low) / 2.0 / abs(middle))


def rates_together(ends: Sequence[Sequence[float]], windows: int = 1) -> list[list[float]]:
    """Calls a second of several actions that ran side by side, in each of `windows` equal parts of the time in which
    all of them ran.

    `ends` has for each action the time it began and the time each of its calls ended; a call proceeds evenly.
    """
    edges = np.linspace(max(times[0] for times in ends), min(times[-1] for times in ends), windows + 1)
    width = (edges[-1] - edges[0]) / windows
    return [(np.diff(np.interp(edges, times, np.arange(len(times)))) / width).tolist() for times in ends]


@dataclass(frozen=True, slots=True)
class Beside:
    """Adam and copies one way, side by side: each as a fraction of its speed alone."""

    adam: float
    copy: float


@dataclass(frozen=True, slots=True)
class Contention:
    """What the simulator needs to know of copies one way beside Adam."""

    weight: float
    """DRAM capacity that a copied byte takes, in bytes of Adam's traffic."""
    priority: float
    """Weight of the copy against Adam where both are held back by DRAM."""
    weight_known: bool
    """False: `weight` is what was assumed, since neither held the other back and more would have."""
    priority_known: bool
    """False: `priority` is what was assumed, since copies were not held back; they may have any from there on."""


def fit_contention(
    beside: Beside, *, adam_share: float, copy_share: float, weight: float, priority: float
) -> Contention:
    """The figures of copies one way that give `beside`.

    `adam_share` is the share of DRAM that Adam takes alone, `copy_share` that of copies alone if a copied byte took as
    much as a byte of Adam's; `weight` and `priority` are what is assumed of them where the measurement can't say.
    """
    adam, copy = (min(1.0, max(_LEAST_SPEED, speed)) for speed in (beside.adam, beside.copy))
    # DRAM is full, unless both are at full speed: then this is the most it can be. No more than all of it: alone the
    # copy has its full speed.
    share = min(1.0, max(_LEAST_SHARE, (1.0 - adam_share * adam) / copy))
    fitted = share / copy_share
    bound_only = adam >= FULL_SPEED and copy >= FULL_SPEED
    ratio = copy / adam
    held_back = copy < FULL_SPEED
    return Contention(
        weight=min(fitted, weight) if bound_only else fitted,
        priority=ratio if held_back else max(ratio, priority),
        weight_known=not bound_only or fitted <= weight,
        priority_known=held_back or ratio >= priority,
    )


class LinkFit(NamedTuple):
    """Seconds of a copy as latency + bytes/rate, each way."""

    latency_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float
    worst: float
    """Largest deviation of the fit from a measured time, as a fraction of that."""
    worst_bytes: int
    """Size of the copy that deviates most."""


def fit_link(sizes: Sequence[int], up_s: Sequence[float], down_s: Sequence[float]) -> LinkFit:
    """The largest copy each way as it was measured, since most bytes travel in such; the latency by least squares of
    the relative deviations of the others, so that small ones count as much as large ones.

    `sizes` in bytes, ascending, with the seconds of a copy of each up and down.
    """
    share = np.array([*sizes, *sizes], dtype=float) / sizes[-1]
    seconds = np.array([*up_s, *down_s])
    largest = np.repeat([up_s[-1], down_s[-1]], len(sizes))
    # seconds = latency + (largest - latency) * share, over what was measured: latency * slope + start.
    slope, start = (1.0 - share) / seconds, largest * share / seconds
    latency = float((slope * (1.0 - start)).sum() / max((slope**2).sum(), 1e-300))
    # Where caches make small copies fast, on a CPU as device, there is none.
    latency = max(0.0, min(latency, 0.99 * up_s[-1], 0.99 * down_s[-1]))
    deviations = np.abs(latency * slope + start - 1.0)
    worst = int(np.argmax(deviations))
    return LinkFit(
        latency,
        sizes[-1] / (up_s[-1] - latency),
        sizes[-1] / (down_s[-1] - latency),
        float(deviations[worst]),
        sizes[worst % len(sizes)],
    )
