"""Adam for layers that live on the device whole."""

from __future__ import annotations

from torch import Tensor

from slidetune.runtime.gpu_adam import adam_step_gpu
from slidetune.runtime.masters import Master
from slidetune.runtime.steps import Step


def update_resident(master: Master, gradient: Tensor, source: Step, scale: float, threads: int) -> None:
    """One AdamW step of a unit whose master is on the device, with the step's number and learning rate.

    `gradient`: flat, bf16 or the fp32 sum of several micro-batches. `threads` count where the device is the CPU.
    """
    for start, stop, hyper in master.layout.runs:
        adam_step_gpu(
            *master.state.range(start, stop),
            gradient[start:stop],
            hyper=source.scaled(hyper),
            step=source.update,
            grad_scale=scale,
            threads=threads,
        )
