"""How far a prediction may be off, given how well each figure of the machine is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slidetune import collector
from slidetune.hardware import HardwareProfile, Kind
from slidetune.plans import Plan
from slidetune.simulator.engine import simulate
from slidetune.simulator.layout import Layout
from slidetune.simulator.pricing import PriceList
from slidetune.tuner.evaluate import Evaluator
from slidetune.tuner.workers import Workers

# Sizes: they decide whether a plan fits, not how long it takes.
_SIZES = {"gpu.memory_gib", "gpu.context_gib", "host.ram_gib", "host.process_gib", "nvme.size_gb"}
# Machines simulated by one worker in one go.
_SHARE = 8


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


def interval(plan: Plan, profile: HardwareProfile, step_s: float, workers: Workers) -> Interval:
    """The interval of a plan's step on a machine: each uncertain figure moved to both ends of its spread."""
    uncertain = [(path, figure) for path, figure in profile.figures() if figure.spread and path not in _SIZES]
    moved = [profile.scaled(path, 1.0 + sign * f.spread) for path, f in uncertain for sign in (-1, 1)]
    # A few machines at a time: whoever takes a share builds the schedule once for it.
    shares = [moved[i : i + _SHARE] for i in range(0, len(moved), _SHARE)]
    steps = [step for part in workers.map(_steps_on, [(plan, share) for share in shares]) for step in part]
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


def _steps_on(evaluator: Evaluator, case: tuple[Plan, list[HardwareProfile]]) -> list[float]:
    plan, machines = case
    with collector.paused():
        schedule = evaluator.schedule(plan)
        layout = Layout(schedule)
        return [simulate(schedule, PriceList(machine), layout=layout).step_s for machine in machines]
