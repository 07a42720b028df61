"""Adam on the device for layers that live there whole: the split master is joined and split again piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor

from slidetune.runtime.gpu_adam import adam_step_gpu
from slidetune.runtime.masters import Master
from slidetune.runtime.split import join, split
from slidetune.runtime.steps import Step

# Elements at once: bounds the fp32 copy of the master to 64 MiB.
_PIECE = 1 << 24


def update_resident(master: Master, gradient: Tensor, source: Step, scale: float) -> None:
    """One AdamW step of a unit whose master is on the device, with the step's number and learning rate.

    `gradient`: flat, bf16 or the fp32 sum of several micro-batches, which is rounded to bf16 first as it is for
    layers whose gradient crosses the link.
    """
    for start, stop, hyper in master.layout.runs:
        for low in range(start, stop, _PIECE):
            span = slice(low, min(low + _PIECE, stop))
            state = master.state.range(span.start, span.stop)
            whole = join(state.high, state.low)
            adam_step_gpu(
                state.high,
                whole,
                state.exp_avg,
                state.exp_avg_sq,
                gradient[span].to(torch.bfloat16),
                hyper=source.scaled(hyper),
                step=source.update,
                grad_scale=scale,
            )
            split(whole, out=(state.high, state.low))
