"""From measurements to a profile's figures: arithmetic alone, no clock and no torch.

**Contention.** The simulator shares host DRAM by weighted max-min fairness: beside Adam, whose weight is 1, a copy of
priority p runs p times as fast as Adam, each as a fraction of its speed alone, until one of the two is at full speed or
DRAM is full; a copied byte takes w bytes of Adam's traffic. A copy has another priority where copies run the other way
too. So the ratios of speeds in a mix are the priorities there, and each mix in which DRAM is full is an equation of the
two weights. Of three mixes (Adam and uploads, Adam and downloads, all three) the weights are those that come closest.

**Kernels** take a time longer beside copies that doesn't depend on their length, so kernels of one length tell it.
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
# Say of an assumption beside measurements: only what these leave open.
_ASSUMED_ROW = 0.01
# Two shares settle long before.
_MOVES = 100
# A gap of almost nothing may seem to grow by any factor.
_MOST_BY_ADAM = 10.0


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
class Kept:
    """Speeds side by side, each as a fraction of that alone. Where there are two, uploads and downloads."""

    pairs: tuple[Beside, Beside]
    """Adam beside uploads, and Adam beside downloads."""
    adam: float
    """Adam's beside uploads and downloads."""
    copies: tuple[float, float]
    """The copies' beside each other and Adam."""
    both_ways: tuple[float, float]
    """The copies' beside each other, without Adam."""


@dataclass(frozen=True, slots=True)
class Assumed:
    """What is assumed of copies one way where a measurement can't say; and what they ask of DRAM."""

    copy_share: float
    """Share of DRAM that the copies take alone if a copied byte takes as much as a byte of Adam's."""
    weight: float
    priority: float
    duplex_priority: float


class Found(NamedTuple):
    """A figure from a measurement, or as assumed."""

    value: float
    known: bool
    """False: what was assumed, since the measurement only bounds it and the bound is farther off."""


@dataclass(frozen=True, slots=True)
class Contention:
    """What the simulator needs to know of copies one way beside Adam."""

    weight: Found
    """DRAM capacity that a copied byte takes, in bytes of Adam's traffic."""
    priority: Found
    """Weight of the copy against Adam where both are held back by DRAM."""
    duplex_priority: Found
    """The same where copies run the other way too."""


def fit_contention(kept: Kept, *, adam_share: float, assumed: tuple[Assumed, Assumed]) -> tuple[Contention, Contention]:
    """The figures of uploads and of downloads that come closest to giving `kept`.

    `adam_share` is the share of DRAM that Adam takes alone; `assumed` is of uploads and downloads.
    """
    pairs = [Beside(_possible(pair.adam), _possible(pair.copy)) for pair in kept.pairs]
    adam, copies = _possible(kept.adam), [_possible(speed) for speed in kept.copies]
    weights = _fit_weights(pairs, adam, copies, kept.both_ways, adam_share, assumed)
    contentions = []
    for weight, pair, copy, both, side in zip(weights, pairs, copies, kept.both_ways, assumed, strict=True):
        duplex = _priority(Beside(adam, copy), min(1.0, both), side.duplex_priority)
        contentions.append(Contention(weight, _priority(pair, 1.0, side.priority), duplex))
    uploads, downloads = contentions
    return uploads, downloads


def _possible(speed: float) -> float:
    return min(1.0, max(_LEAST_SPEED, speed))


def _priority(beside: Beside, without_adam: float, assumed: float) -> Found:
    """The ratio of the speeds; at least that, if Adam didn't slow the copy down from its speed `without_adam`."""
    ratio = beside.copy / beside.adam
    held_back = beside.copy < FULL_SPEED * without_adam
    return Found(ratio if held_back else max(ratio, assumed), held_back or ratio >= assumed)


def _fit_weights(
    pairs: Sequence[Beside],
    adam: float,
    copies: Sequence[float],
    both_ways: Sequence[float],
    adam_share: float,
    assumed: Sequence[Assumed],
) -> list[Found]:
    """The DRAM weights: each mix that is held back fills DRAM, which is an equation of the shares of DRAM that the
    copies take at full speed. A mix that isn't is a bound on them, and leaves them as near as may be to what is
    assumed."""
    rows, left, most, known = [], [], [], []
    for side, pair in enumerate(pairs):
        bound = (1.0 - adam_share * pair.adam) / pair.copy
        guess = assumed[side].weight * assumed[side].copy_share
        held_back = min(pair.adam, pair.copy) < FULL_SPEED
        row_weight = pair.copy if held_back else _ASSUMED_ROW
        rows.append([row_weight if number == side else 0.0 for number in range(2)])
        left.append(row_weight * (bound if held_back else min(bound, guess)))
        most.append(1.0 if held_back else min(1.0, bound))
        known.append(held_back or bound <= guess)
    shares = _bounded_least_squares(np.array(rows), np.array(left), np.array(most))
    bound = 1.0 - adam_share * adam
    held_back = adam < FULL_SPEED or any(
        copy < FULL_SPEED * min(1.0, both) for copy, both in zip(copies, both_ways, strict=True)
    )
    if held_back or shares @ copies > bound:
        shares = _bounded_least_squares(np.array([*rows, copies]), np.array([*left, bound]), np.array(most))
        known = [True, True]
    return [
        Found(float(share) / side.copy_share if sure else side.weight, sure)
        for share, side, sure in zip(shares, assumed, known, strict=True)
    ]


def _bounded_least_squares(rows: np.ndarray, left: np.ndarray, most: np.ndarray) -> np.ndarray:
    """The shares, at least `_LEAST_SHARE` and at most `most`, whose products with the rows come closest to what is
    `left`: one after the other moved to its best place until none moves."""
    most = np.maximum(most, _LEAST_SHARE)
    shares = np.clip(np.linalg.lstsq(rows, left, rcond=None)[0], _LEAST_SHARE, most)
    for _ in range(_MOVES):
        before = shares.copy()
        for side, column in enumerate(rows.T):
            missing = left - rows @ shares + column * shares[side]
            shares[side] = np.clip(column @ missing / (column @ column), _LEAST_SHARE, most[side])
        if np.allclose(shares, before, rtol=1e-12, atol=0.0):
            break
    return shares


class CallFit(NamedTuple):
    """Seconds of a call as a fixed cost and an amount at a rate."""

    call_s: float
    per_s: float


def fit_call(small: tuple[float, float], large: tuple[float, float]) -> CallFit:
    """The fixed cost and the rate that give the seconds of a small and a large call, each an amount and its seconds;
    always those of the large one, whatever noise makes of the small one."""
    (few, few_s), (many, many_s) = small, large
    call_s = (few_s * many - many_s * few) / (many - few)
    call_s = min(max(0.0, call_s), few_s, many_s / 2.0)
    return CallFit(call_s, many / (many_s - call_s))


def fit_serial_share(one_per_s: float, threads: int, all_per_s: float) -> float:
    """Amdahl's serial share, by which so many threads give what they give together, and one alone what it does; 0 where
    they don't hold each other up."""
    if threads < 2:
        return 0.0
    return max(0.0, (threads * one_per_s / all_per_s - 1.0) / (threads - 1))


class GapFit(NamedTuple):
    """Seconds by which a kernel takes longer while copies go up, and down; and by what factor more beside Adam too."""

    uploads_s: float
    downloads_s: float
    adam_factor: float


def fit_gaps(uploads_s: float, downloads_s: float, both_s: float, with_adam_s: float) -> GapFit:
    """What gives the seconds by which kernels took longer beside uploads, downloads, both, and both and Adam.

    Copies mostly go both ways, so the two add up to what they cost together, shared out as they cost alone.
    """
    up, down, both, all_of_them = (max(0.0, gap) for gap in (uploads_s, downloads_s, both_s, with_adam_s))
    up_share = up / (up + down) if up + down > 0 else 0.5
    factor = min(max(1.0, all_of_them / both), _MOST_BY_ADAM) if both > 0 else 1.0
    return GapFit(up_share * both, (1.0 - up_share) * both, factor)


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
