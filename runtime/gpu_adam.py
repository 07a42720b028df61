"""AdamW on the device over a split master, for the layers that live there whole: the arithmetic of `adam`, bit for bit
but for subnormal numbers, in one pass over device memory. Without a GPU the CPU's own kernel does it."""

from __future__ import annotations

import torch
from torch import Tensor

from slidetune.errors import SlidetuneError
from slidetune.runtime.adam import AdamW, Coefficients, adam_step


def check_gpu_adam(device: torch.device) -> None:
    """Raise SlidetuneError where the kernel can't run on the device."""
    if device.type == "cpu":
        return
    try:
        import triton  # noqa: F401
    except ImportError:
        raise SlidetuneError(
            "updating resident layers on the GPU needs Triton, which is not installed.",
            "pip install triton, or set resident_layers: 0 in the plan.",
        ) from None


def adam_step_gpu(
    high: Tensor,
    low: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    hyper: AdamW,
    step: int,
    grad_scale: float = 1.0,
    threads: int = 1,
) -> None:
    """One AdamW step, in place, over contiguous 1-D tensors of one length on one device; asynchronous on CUDA.

    Args and errors as for `adam.adam_step`, except: `grad` may be the fp32 sum of several micro-batches, which is
    rounded to bf16 first, as it is for layers whose gradient crosses the link; `threads` count on the CPU only.
    """
    tensors = (high, low, exp_avg, exp_avg_sq, grad)
    if any(tensor.dim() != 1 or not tensor.is_contiguous() or tensor.shape != high.shape for tensor in tensors):
        raise ValueError(f"contiguous 1-D tensors of one length needed, not {[tuple(t.shape) for t in tensors]}")
    if high.device.type == "cpu":
        rounded = grad.to(torch.bfloat16)
        adam_step(
            high, low, exp_avg, exp_avg_sq, rounded, hyper=hyper, step=step, grad_scale=grad_scale, threads=threads
        )
        return
    from slidetune.runtime.gpu_adam_triton import launch

    launch(high, low, exp_avg, exp_avg_sq, grad, Coefficients.of(hyper, step, grad_scale))
