"""Some steps of training with their times, losses and memory: what `slidetune run` and validation report."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from slidetune.errors import SlidetuneError
from slidetune.runtime.trainer import SlidingTrainer

# Steps before the steady state: allocators fill up, kernels are chosen, nothing overlaps the first one.
WARM_UP = 2


@dataclass(slots=True, kw_only=True)
class Measured:
    """What a run measured. Times in seconds, sizes in bytes."""

    tokens: int
    """Tokens a step."""
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    """From one step's loss to the next one's; the first from its start."""
    nvme_written_bytes: int = 0
    """By the steps; what loading wrote is not in it."""
    peaks: dict[str, int] = field(default_factory=dict)
    """gpu (allocated by torch), page_locked (arenas registered with CUDA) and ram (the process's resident peak)."""

    @property
    def steady_step_s(self) -> float:
        """Median of the steps after the warm-up, of all where there are no more."""
        return statistics.median(self.step_s[WARM_UP:] or self.step_s)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.steady_step_s


def run(
    trainer: SlidingTrainer,
    batches: Iterable[Mapping[str, Any]],
    steps: int,
    *,
    lr_scale: Callable[[int], float] = lambda step: 1.0,
    on_step: Callable[[int, Measured], None] = lambda step, measured: None,
) -> Measured:
    """Train for `steps` steps. `on_step` is called after each with its number, from 1, and what is known so far.

    Raises SlidetuneError if the batches run out, and what `SlidingTrainer.step` raises.
    """
    measured = Measured(tokens=trainer.plan.tokens)
    batches = iter(batches)
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    written_before = trainer.nvme_written_bytes
    before = time.perf_counter()
    for number in range(1, steps + 1):
        batch = next(batches, None)
        if batch is None:
            raise SlidetuneError(f"the data ends after {number - 1} of {steps} steps.")
        measured.losses.append(trainer.step(batch, lr_scale=lr_scale(number)))
        now = time.perf_counter()
        measured.step_s.append(now - before)
        before = now
        on_step(number, measured)
    trainer.finish()
    measured.nvme_written_bytes = trainer.nvme_written_bytes - written_before
    measured.peaks = peaks(trainer)
    return measured


def peaks(trainer: SlidingTrainer) -> dict[str, int]:
    """Memory peaks so far, in bytes; see `Measured.peaks`."""
    gpu = torch.cuda.max_memory_allocated(trainer.device) if trainer.device.type == "cuda" else 0
    return {
        "gpu": gpu,
        "page_locked": trainer.page_locked_bytes,
        # Linux counts in KiB.
        "ram": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
