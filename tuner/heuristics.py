"""Plans an expert would try first; the study starts from them.

Slower tiers only as far as faster ones overflow; batches from small to large; then whatever GPU memory is left
goes to residents, or to activations that need no recomputation.
"""

from __future__ import annotations

from collections.abc import Iterator

from slidetune.tuner.evaluate import Evaluator
from slidetune.tuner.space import Point, Space

_MICRO = (1, 2, 4, 8, 16, 32)
_ACCUMULATION = (1, 4, 16)
# Optimizer and weights on NVMe, from none to all.
_TIERS = ((0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (0.75, 0.0), (1.0, 0.0), (1.0, 0.5), (1.0, 1.0))
# What spare GPU memory may be given to, most useful first.
_FILLERS = ("resident_layers", "recompute.keep", "resident_weights", "activations.gpu")


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


def smallest(space: Space) -> Point:
    """The point that needs least of the GPU and of RAM: if it doesn't fit, nothing does."""
    axes = {axis.name: axis.values for axis in space.axes}
    return space.point(
        {
            "micro_batch": 1,
            "accumulation": 1,
            "prefetch": 0 if 0 in axes["prefetch"] else 1,
            "optimizer_nvme": max(axes["optimizer_nvme"]),
            "weights_nvme": max(axes["weights_nvme"]),
            "activations.nvme": 0.0,
        }
    )


def _placed(space: Space, evaluator: Evaluator, choices: dict) -> Point | None:
    """The choices on the fastest tiers that hold them."""
    axes = {axis.name: axis.values for axis in space.axes}
    for inputs in axes["activations.nvme"]:
        for optimizer, weights in _TIERS:
            if optimizer not in axes["optimizer_nvme"] or weights not in axes["weights_nvme"]:
                continue
            point = space.point(
                choices | {"optimizer_nvme": optimizer, "weights_nvme": weights, "activations.nvme": inputs}
            )
            if evaluator.fits(space.plan(point)):
                return point
    return None


def _filled(space: Space, evaluator: Evaluator, point: Point) -> Iterator[Point]:
    """The point with as much GPU memory as fits given to each use in turn."""
    names = [axis.name for axis in space.axes]
    for name in _FILLERS:
        i = names.index(name)
        best = None
        for value in range(1, len(space.axes[i].values)):
            candidate = (*point[:i], value, *point[i + 1 :])
            if not evaluator.fits(space.plan(candidate)):
                break
            best = candidate
        if best is not None:
            yield best
