"""The loss of what is held out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from slidetune.runtime.batches import IGNORED, shifted
from slidetune.runtime.training.callbacks import Evaluated

if TYPE_CHECKING:
    from slidetune.runtime.data import Batches
    from slidetune.runtime.trainer import SlidingTrainer
    from slidetune.runtime.training.stopping import Stop


def evaluate(trainer: SlidingTrainer, held_out: Batches, step: int, stop: Stop) -> Evaluated | None:
    """The mean loss of a label of one pass over `held_out`, each label counting the same; None if it was stopped."""
    start = time.perf_counter()
    total, labels = 0.0, 0
    # Its last batch is filled up with rows without labels.
    for batch in held_out.epoch():
        if stop.reason is not None:
            return None
        count = int((shifted(batch["labels"]) != IGNORED).sum())
        if count:
            total += count * trainer.evaluate(batch)
            labels += count
    return Evaluated(step=step, loss=total / labels, labels=labels, seconds=time.perf_counter() - start)
