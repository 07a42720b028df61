"""Plans an expert would try first; the study starts from them.

Slower tiers only as far as faster ones overflow; batches from small to large; then whatever GPU memory is left
goes to residents, or to activations that need no recomputation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from slidetune.tuner.evaluate import Evaluator
from slidetune.tuner.space import Point, Space

_MICRO = (1, 2, 4, 8, 16, 32)
_ACCUMULATION = (1, 4, 16)
# Optimizer and weights on NVMe, from none to all.
_TIERS = ((0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (0.75, 0.0), (1.0, 0.0), (1.0, 0.5), (1.0, 1.0))
# What a byte more of a tier costs, roughly, against one of RAM.
_PRICES = {"gpu": 10.0, "ram": 1.0, "nvme": 0.1}
# What spare memory may be given to, most useful first. Sums in the middle take RAM alone.
_FILLERS = (
    ("resident_layers",),
    ("recompute.keep",),
    ("recompute.middle", "recompute.keep"),
    ("recompute.middle", "recompute.products"),
    ("resident_weights",),
    ("activations.gpu",),
)


def starting_points(space: Space, evaluator: Evaluator) -> Iterator[Point]:
    """Feasible points, the plainest first; none if nothing an expert would try fits."""
    axes = {axis.name: axis.values for axis in space.axes}
    micro_batches = [m for m in axes["micro_batch"] if m in _MICRO] or list(axes["micro_batch"][:4])
    accumulations = [a for a in axes.get("accumulation", (0,)) if a in (*_ACCUMULATION, 0)]
    seen: set[Point] = set()
    for update in axes["update"]:
        for accumulation in accumulations:
            for micro_batch in micro_batches:
                choices = {
                    "micro_batch": micro_batch,
                    "update": update,
                    "chunk_bytes": axes["chunk_bytes"][-1],
                }
                if accumulation:
                    choices["accumulation"] = accumulation
                placed = _placed(space, evaluator, choices)
                if placed is None:
                    continue
                for point in (placed, *_filled(space, evaluator, placed)):
                    if point not in seen:
                        seen.add(point)
                        yield point
    if not seen:
        least = smallest(space, evaluator)
        if evaluator.fits(space.plan(least)):
            yield least


def smallest(space: Space, evaluator: Evaluator) -> Point:
    """A point that fits if one does; otherwise the one whose overflow would be the cheapest to mend.

    No point needs least of every tier: layers and inputs on the GPU or the drive spare RAM, and a fixed batch takes
    other buffers cut in few micro-batches than in many. So those choices are tried in turn, each with the least of
    everything else, beginning with what spares the GPU; inputs go all to one tier.
    """
    axes = {axis.name: axis.values for axis in space.axes}
    ends = [(min(axes[name]), max(axes[name])) for name in ("activations.gpu", "activations.nvme")]
    tried = itertools.product(
        sorted(axes["micro_batch"]) if "batch" in axes else (1,),
        axes["update"],
        ((ends[0][0], ends[1][0]), (ends[0][0], ends[1][1]), (ends[0][1], ends[1][0])),
        sorted(axes["resident_layers"]),
        sorted(axes["optimizer_nvme"], reverse=True),
        sorted(axes["weights_nvme"], reverse=True),
    )
    best, least = None, math.inf
    for micro_batch, update, (inputs_gpu, inputs_nvme), resident, optimizer, weights in tried:
        point = space.point(
            {
                "micro_batch": micro_batch,
                "accumulation": 1,
                "prefetch": min(axes["prefetch"]),
                "update": update,
                "resident_layers": resident,
                "optimizer_nvme": optimizer,
                "weights_nvme": weights,
                "activations.gpu": inputs_gpu,
                "activations.nvme": inputs_nvme,
            }
        )
        needs = evaluator.needs(space.plan(point))
        lack = sum(max(0, needs[tier] - size) * _PRICES[tier] for tier, size in evaluator.capacity.items())
        if lack < least:
            best, least = point, lack
        if not lack:
            break
    return best


def _placed(space: Space, evaluator: Evaluator, choices: dict) -> Point | None:
    """The choices on the fastest tiers that hold them."""
    axes = {axis.name: axis.values for axis in space.axes}
    for inputs in axes["activations.nvme"]:
        for optimizer, weights in _TIERS:
            if optimizer not in axes["optimizer_nvme"] or weights not in axes["weights_nvme"]:
                continue
            # Layers that live on the GPU take nothing of RAM.
            for resident in axes["resident_layers"]:
                point = space.point(
                    choices
                    | {
                        "resident_layers": resident,
                        "optimizer_nvme": optimizer,
                        "weights_nvme": weights,
                        "activations.nvme": inputs,
                    }
                )
                overflow = evaluator.overflow(space.plan(point))
                if max(overflow.values()) <= 0:
                    return point
                if overflow["gpu"] > 0:
                    break
    return None


def _filled(space: Space, evaluator: Evaluator, point: Point) -> Iterator[Point]:
    """The point with as much memory as fits given to each use, or to one after the other, in turn."""
    names = [axis.name for axis in space.axes]
    for uses in _FILLERS:
        filled = point
        for i in map(names.index, uses):
            for value in range(point[i] + 1, len(space.axes[i].values)):
                candidate = (*filled[:i], value, *filled[i + 1 :])
                if not evaluator.fits(space.plan(candidate)):
                    break
                filled = candidate
        if filled != point:
            yield filled
