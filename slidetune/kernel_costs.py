"""Bytes and launches of a unit's kernels, in closed form from its structure."""

from __future__ import annotations

from slidetune.layer_shape import LayerShape, NormKind
from slidetune.model import KernelCosts

BOUNDARY_TENSORS = 5


def layer_costs(shape: LayerShape, *, fused: bool) -> KernelCosts:
    h, q, k, i = shape.hidden, shape.query, shape.key, shape.inner * max(1, shape.active)
    return KernelCosts(
        saved_bytes=(6 if fused else 10) * h + 6 * (q + k) + (6 if fused else 8) * i,
        forward_bytes=4 * h + 6 * i,
        backward_bytes=2 * i + 2 * BOUNDARY_TENSORS * h,
        traffic_bytes=46 * h if fused else 144 * h,
        launches=20 if fused else 38,
    )


def embedding_costs(hidden: int, *, learned_positions: bool) -> KernelCosts:
    return KernelCosts(saved_bytes=0, forward_bytes=0, backward_bytes=0, traffic_bytes=4 * hidden, launches=1)


def head_costs(norm: NormKind, hidden: int, *, fused: bool) -> KernelCosts:
    return KernelCosts(
        saved_bytes=4 * hidden,
        forward_bytes=2 * hidden,
        backward_bytes=2 * hidden,
        traffic_bytes=4 * hidden if fused else 36 * hidden,
        launches=2 if fused else 9,
    )
