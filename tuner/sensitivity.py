"""How far a prediction may be off, given how well each figure of the machine is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from slidetune import collector
from slidetune.hardware import HardwareProfile, Kind
from slidetune.schedule import Schedule
from slidetune.simulator.engine import simulate
from slidetune.simulator.pricing import PriceList

# Sizes: they decide whether a plan fits, not how long it takes.
_SIZES = {"gpu.memory_gib", "gpu.context_gib", "host.ram_gib", "host.process_gib", "nvme.size_gb"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What one figure's uncertainty does to the step."""

    figure: str
    """Such as "host.dram_efficiency"."""
    kind: Kind
    spread: float
    """How far the figure may be off, one way, as a fraction."""
    slower_s: float
    """Seconds by which the step grows at the worse end of that spread."""
    faster_s: float
    """Seconds by which it shrinks at the better end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Bounds of a step's duration. Figures err independently, so their effects add up in quadrature."""

    low_s: float
    high_s: float
    effects: tuple[Effect, ...]
    """Of the figures that matter, the one that could cost most first."""

    @property
    def guessed(self) -> tuple[Effect, ...]:
        """Effects of figures that are guesses."""
        return tuple(effect for effect in self.effects if effect.kind == "guess")


def interval(
    schedule: Schedule,
    profile: HardwareProfile,
    step_s: float,
    step_on: Callable[[list[HardwareProfile]], list[float]] | None = None,
) -> Interval:
    """The interval of a schedule's step, each uncertain figure moved to both ends of its spread in turn.

    `step_on` gives the step on each of several machines; by default they are simulated one after the other.
    """
    uncertain = [(path, figure) for path, figure in profile.figures() if figure.spread and path not in _SIZES]
    moved = [profile.scaled(path, 1.0 + sign * f.spread) for path, f in uncertain for sign in (-1, 1)]
    steps = (step_on or (lambda profiles: [step_seconds(schedule, p) for p in profiles]))(moved)
    effects = []
    for i, (path, figure) in enumerate(uncertain):
        ends = (steps[2 * i] - step_s, steps[2 * i + 1] - step_s)
        effects.append(
            Effect(
                figure=path,
                kind=figure.kind,
                spread=figure.spread,
                slower_s=max(0.0, *ends),
                faster_s=max(0.0, *(-end for end in ends)),
            )
        )
    shown = sorted((e for e in effects if e.slower_s or e.faster_s), key=lambda e: -e.slower_s)
    # A step that gets faster by more than it takes would be nonsense: a sum in quadrature stays below.
    return Interval(
        low_s=max(0.0, step_s - math.hypot(*(e.faster_s for e in effects))),
        high_s=step_s + math.hypot(*(e.slower_s for e in effects)),
        effects=tuple(shown),
    )


def step_seconds(schedule: Schedule, profile: HardwareProfile) -> float:
    """The steady step of a schedule on a machine."""
    with collector.paused():
        return simulate(schedule, PriceList(profile)).step_s
