"""Some steps of training with their times, losses and memory: what `slidetune run` and validation report."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from slidetune.buffers import chunk_params
from slidetune.errors import SlidetuneError
from slidetune.runtime.adam import AdamW, adam_step
from slidetune.runtime.trainer import SlidingTrainer
from slidetune.schedule import layer_updates

# Steps before the steady state: allocators fill up, kernels are chosen, nothing overlaps the first one.
WARM_UP = 2
_ALONE_ROUNDS = 2


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


def adam_alone_s(trainer: SlidingTrainer) -> float | None:
    """Seconds that a step's CPU Adam on the layers in RAM takes with nothing beside, in the memory that training has:
    the mean of some rounds. None if there are no such layers. The moments mean nothing after it."""
    tasks = layer_updates(trainer.schedule)
    if not tasks:
        return None
    masters, _ = trainer.settled()
    threads, size = trainer.plan.adam_threads, chunk_params(trainer.plan)
    gradients = torch.zeros(2, min(size, max(task.work.params for task in tasks)), dtype=torch.bfloat16)
    still = AdamW(lr=0.0, weight_decay=0.0)
    began = time.perf_counter()
    for _ in range(_ALONE_ROUNDS):
        for number, task in enumerate(tasks):
            start, count = task.chunk * size, task.work.params
            state = masters[task.unit].state.range(start, start + count)
            adam_step(*state, gradients[number % 2, :count], hyper=still, step=1, threads=threads)
    return (time.perf_counter() - began) / _ALONE_ROUNDS


def peaks(trainer: SlidingTrainer) -> dict[str, int]:
    """Memory peaks so far, in bytes; see `Measured.peaks`."""
    gpu = torch.cuda.max_memory_allocated(trainer.device) if trainer.device.type == "cuda" else 0
    return {
        "gpu": gpu,
        "page_locked": trainer.page_locked_bytes,
        # Linux counts in KiB.
        "ram": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
