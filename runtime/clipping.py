"""The global gradient norm. Squares are summed in fp64, so the order in which gradients come does not show in the
fp32 factor that they lead to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slidetune.runtime.steps import Step

_EPS = 1e-6
# Elements widened at a time: 32 MiB.
_AT_ONCE = 4 * 1024**2


def add_squares(total: Tensor, values: Tensor) -> None:
    """Add the squares of a bf16 gradient to an fp64 scalar, on the gradient's device and stream."""
    # CUDA's kernel wants an fp64 copy: of a few elements at a time, not of a head's 3 GiB.
    for part in values.split(_AT_ONCE):
        total.add_(torch.linalg.vector_norm(part.detach(), dtype=torch.float64).square_())


def gradient_norm(step: Step) -> float:
    """The norm of all gradients of a step; all of them must be there. Waits for the device."""
    return math.sqrt(float(step.squares) + step.host_squares)


def applied(step: Step | None, clip_norm: float | None) -> bool:
    """Whether an update is made of a step's gradients: not of a loss that is not finite, and where gradients are
    clipped, not of a norm that is not. All of the gradients must be there."""
    if step is None or not step.good:
        return False
    if clip_norm is not None and not step.accepts_non_finite and not math.isfinite(gradient_norm(step)):
        step.refused = True
    return not step.refused


def gradient_scale(step: Step, clip_norm: float | None) -> float:
    """What the step's gradients are multiplied by: as torch's clip_grad_norm_, in fp32."""
    if clip_norm is None:
        return 1.0
    if step.scale is None:
        norm = torch.tensor(gradient_norm(step), dtype=torch.float32)
        step.scale = float(torch.clamp(clip_norm / (norm + _EPS), max=1.0))
    return step.scale
