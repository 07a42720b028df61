"""Who gets how much of what: weighted max-min fair sharing of several resources at once.

Every running task asks for shares of resources (link directions, host DRAM, drive, cores) in fixed proportion
to its own speed. All speeds grow together, each at its weight, until a task reaches its top speed or a resource
it uses is full; those stop, the others grow on. This is the fluid model of SimGrid (Casanova et al., 2014)
with a task's speed counted as a fraction of its top speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

UPLOAD, DOWNLOAD, ADAM = "upload", "download", "adam"
"""Roles that others' say, or speed, depends on."""

# Below this a resource counts as full and a speed as reached.
_EPSILON = 1e-12


@dataclass(frozen=True, slots=True)
class Demand:
    """What a task asks for at its top speed."""

    shares: tuple[tuple[str, float], ...]
    """(resource, fraction of its capacity), for every resource it uses."""
    weight: float = 1.0
    """Its say where a resource is short."""
    role: str = ""
    """UPLOAD, DOWNLOAD or ADAM; empty if it doesn't matter."""
    duplex_weight: float | None = None
    """Of a copy: its say where copies run the other way too; None if it is `weight`."""
    kernels_per_s: float = 0.0
    """Of a GPU task alone: kernels that the GPU fetches from host memory a second. No share depends on it."""


def fair_speeds(demands: Sequence[Demand], capacity: Mapping[str, float] | None = None) -> list[float]:
    """The speed of each task as a fraction of its top speed, 0 < speed <= 1.

    `capacity` gives resources another capacity than 1. Speeds are weighted max-min fair: no task can go
    faster without slowing one whose speed over weight is no higher.
    """
    left = {resource: 1.0 for demand in demands for resource, _ in demand.shares}
    left.update({k: v for k, v in (capacity or {}).items() if k in left})
    weights = _weights(demands)
    speeds = [0.0] * len(demands)
    growing = set(range(len(demands)))
    while growing:
        use = dict.fromkeys(left, 0.0)
        for i in growing:
            for resource, share in demands[i].shares:
                use[resource] += share * weights[i]
        # How much further the common level can rise: to the first top speed, or the first full resource.
        rise = min((1.0 - speeds[i]) / weights[i] for i in growing)
        rise = min([rise, *(left[r] / u for r, u in use.items() if u > _EPSILON)])
        for i in growing:
            speeds[i] += rise * weights[i]
        for resource, used in use.items():
            left[resource] -= rise * used
        full = {r for r, u in use.items() if u > _EPSILON and left[r] <= _EPSILON}
        growing = {
            i
            for i in growing
            if speeds[i] < 1.0 - _EPSILON and not any(r in full and s > 0 for r, s in demands[i].shares)
        }
    return [min(1.0, speed) for speed in speeds]


def _weights(demands: Sequence[Demand]) -> list[float]:
    """Each task's say in this mix."""
    roles = {demand.role for demand in demands}
    if not {UPLOAD, DOWNLOAD} <= roles:
        return [demand.weight for demand in demands]
    weights = [demand.weight if demand.duplex_weight is None else demand.duplex_weight for demand in demands]
    if ADAM in roles:
        return weights
    # Whatever each way's say against Adam, between the two the link itself favours neither.
    copies = [demand.role in (UPLOAD, DOWNLOAD) for demand in demands]
    least = min(weight for weight, copy in zip(weights, copies, strict=True) if copy)
    return [least if copy else weight for weight, copy in zip(weights, copies, strict=True)]
