"""AdamW on the device, for the layers that stay there whole.

torch's fused kernel over an fp32 master. It agrees with `adam.adam_step` to the rounding of a few fp32 operations,
not bit for bit: on CUDA torch contracts other products into fused multiply-adds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slidetune.runtime.adam import AdamW

# Elements at once: bounds the fp32 copy of the gradient to 64 MiB. A multiple of every vector length.
_PIECE = 1 << 24


def adam_step_gpu(
    weights: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    hyper: AdamW,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """One AdamW step, in place, over contiguous 1-D tensors of one length on one device; asynchronous on CUDA.

    Args:
        weights: receives the new parameters, rounded to its dtype (bf16).
        master: fp32 parameters.
        exp_avg: fp32 first moment.
        exp_avg_sq: fp32 second moment.
        grad: bf16 or fp32 gradient; read only.
        hyper: hyper-parameters of this call.
        step: number of this optimizer step, the first being 1.
        grad_scale: the gradient is multiplied by it first.

    Raises:
        ValueError: if a tensor is not contiguous and 1-D, or the lengths differ.
    """
    tensors = (weights, master, exp_avg, exp_avg_sq, grad)
    if any(tensor.dim() != 1 or not tensor.is_contiguous() or tensor.shape != master.shape for tensor in tensors):
        raise ValueError(f"contiguous 1-D tensors of one length needed, not {[tuple(t.shape) for t in tensors]}")
    steps = torch.full((), float(step), dtype=torch.float32, device=master.device)
    with torch.no_grad():
        for w, p, m, v, g in zip(*(tensor.split(_PIECE) for tensor in tensors), strict=True):
            scaled = g.float() if grad_scale == 1 else g.float() * grad_scale
            torch._fused_adamw_(
                [p],
                [scaled],
                [m],
                [v],
                [],
                [steps],
                lr=hyper.lr,
                beta1=hyper.beta1,
                beta2=hyper.beta2,
                weight_decay=hyper.weight_decay,
                eps=hyper.eps,
                amsgrad=False,
                maximize=False,
            )
            w.copy_(p)
