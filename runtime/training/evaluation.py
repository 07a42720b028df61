"""The loss of what is held out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from slidetune.runtime.batches import IGNORED, shifted
from slidetune.runtime.training.callbacks import Evaluated

if TYPE_CHECKING:
    from torch import Tensor

    from slidetune.runtime.data import Batches
    from slidetune.runtime.trainer import SlidingTrainer
    from slidetune.runtime.training.stopping import Stop


def evaluate(trainer: SlidingTrainer, held_out: Batches, step: int, stop: Stop) -> Evaluated | None:
    """The mean loss of a label of one pass over `held_out`, each label counting the same; None if it was stopped."""
    start = time.perf_counter()
    counts: list[int] = []
    tokens, whole = 0, True

    def with_labels() -> Iterator[dict[str, Tensor]]:
        nonlocal tokens, whole
        for batch in held_out.epoch():
            if stop.reason is not None:
                whole = False
                return
            # The last batch is filled up with rows without labels.
            count = int((shifted(batch["labels"]) != IGNORED).sum())
            if count:
                counts.append(count)
                tokens += batch["labels"].numel()
                yield batch

    losses = trainer.evaluate_all(with_labels())
    if not whole:
        return None
    labels = sum(counts)
    loss = sum(count * loss for count, loss in zip(counts, losses, strict=True)) / labels
    return Evaluated(step=step, loss=loss, labels=labels, tokens=tokens, seconds=time.perf_counter() - start)
