"""Why each knob of a chosen plan has its value: what a step either way would do.

Every sentence is a comparison of two simulations (or of bytes with a tier's size), never a rule of thumb.
"""

from __future__ import annotations

from slidetune.plans import Plan, knobs
from slidetune.schedule import TIERS
from slidetune.tuner.evaluate import Evaluator, Worth
from slidetune.tuner.space import Point, Space
from slidetune.units import format_bytes

_TIER_NAMES = {"gpu": "GPU memory", "ram": "RAM", "nvme": "NVMe space"}
# Below this share two plans are as fast as each other.
_SAME = 0.0005


def neighbours(space: Space, point: Point) -> dict[str, list[Plan]]:
    """Per axis, the different plans one step below and above a point."""
    chosen = space.plan(point)
    found: dict[str, list[Plan]] = {}
    for i, axis in enumerate(space.axes):
        plans = []
        for step in (-1, 1):
            if 0 <= point[i] + step < len(axis.values):
                plan = space.plan((*point[:i], point[i] + step, *point[i + 1 :]))
                if plan != chosen:
                    plans.append(plan)
        found[axis.name] = plans
    return found


def reasons(space: Space, evaluator: Evaluator, point: Point) -> dict[str, str]:
    """A sentence for every knob that was searched, by the knob's name in the plan."""
    chosen = space.plan(point)
    worth = evaluator.worth(chosen)
    texts: dict[str, str] = {}
    for axis, plans in neighbours(space, point).items():
        knob = _KNOB_OF_AXIS.get(axis, axis)
        parts = [_compare(knob, plan, chosen, worth, evaluator) for plan in plans]
        if parts:
            texts[knob] = "; ".join(parts) + "."
    return texts


# Axes that are not a knob themselves.
_KNOB_OF_AXIS = {"spare_slots": "window"}


def _compare(knob: str, other: Plan, chosen: Plan, worth: Worth, evaluator: Evaluator) -> str:
    value = _shown(knob, knobs(other)[knob])
    over = evaluator.overflow(other)
    lacking = {tier: evaluator.needs(other)[tier] - evaluator.capacity[tier] for tier in TIERS if over[tier] > 0}
    if lacking:
        tier = max(lacking, key=lambda t: over[t])
        return f"{value} would need {format_bytes(lacking[tier])} more {_TIER_NAMES[tier]} than there is"
    if chosen.tokens != other.tokens:
        rate = evaluator.worth(other).tokens_per_s / worth.tokens_per_s
        return f"{value} gives {rate - 1:+.1%} tokens/s at {other.batch} sequences a step"
    ratio = evaluator.worth(other).step_s / worth.step_s
    if ratio > 1 + _SAME:
        return f"{value} is {ratio - 1:.1%} slower"
    price = _price(other, chosen, evaluator)
    if ratio < 1 - _SAME:
        return f"{value} is {1 - ratio:.1%} faster{price and ' but' + price}"
    return f"{value} is no faster{price and ' and' + price}"


def _price(other: Plan, chosen: Plan, evaluator: Evaluator) -> str:
    """What another plan costs more than the chosen one, if anything."""
    written = evaluator.worth(other).nvme_written_bytes_per_token - evaluator.worth(chosen).nvme_written_bytes_per_token
    if written > 0:
        return f" writes {format_bytes(written * other.tokens)} more to NVMe a step"
    needs, now = evaluator.needs(other), evaluator.needs(chosen)
    for tier in ("ram", "gpu"):
        more = needs[tier] - now[tier]
        if more > 0:
            return f" takes {format_bytes(more)} more {_TIER_NAMES[tier]}"
    return ""


def _shown(knob: str, value: object) -> str:
    return format_bytes(value) if knob.endswith("_bytes") else str(value)
