"""A training's checkpoints: begun while it goes on, told once they are whole, and told where they fail."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from slidetune.runtime.checkpoint import CheckpointFailed, Checkpoints, Saved
from slidetune.runtime.trainer import SlidingTrainer
from slidetune.runtime.training.callbacks import Callback, CheckpointSaved, Note
from slidetune.runtime.training.setup import extra_of


class Saves:
    """Saves `trainer` to `checkpoints`. `step`: the last step that is saved already, 0 if none is."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        trainer: SlidingTrainer,
        schedule: Mapping[str, Any],
        step: int,
        watching: Callback,
    ) -> None:
        self._checkpoints, self._trainer, self._schedule = checkpoints, trainer, schedule
        self._watching = watching
        self._safe_step = step
        self._under_way: tuple[int, Saved] | None = None
        self._waited_s = 0.0
        """For the checkpoint before, when it was last settled."""

    @property
    def under_way(self) -> bool:
        """Whether a checkpoint is being written beside the training."""
        return self._under_way is not None and self._under_way[1].seconds is None

    def begin(self, step: int, position: Mapping[str, Any]) -> None:
        """Save, and let training go on as soon as it may. Failures are told: the checkpoint before is whole."""
        self._settle(step)
        try:
            self._begin(step, position)
        except CheckpointFailed as error:
            self._failed(step, error)
        self.tell()

    def last(self, step: int, position: Mapping[str, Any]) -> None:
        """Save unless this step is saved, and return once that is whole. Raises CheckpointFailed."""
        self._settle(step)
        if step != self._safe_step:
            self._begin(step, position)
            self._checkpoints.wait()
            self.tell()

    def tell(self) -> None:
        """Tell of a checkpoint that has become whole."""
        if self._under_way is None or self._under_way[1].seconds is None:
            return
        step, saved = self._under_way
        self._under_way, self._safe_step = None, step
        self._watching.on_save(
            CheckpointSaved(
                step=step,
                path=saved.path,
                nbytes=saved.nbytes,
                paused_s=self._waited_s + saved.paused_s,
                seconds=self._waited_s + saved.seconds,
            )
        )

    def _begin(self, step: int, position: Mapping[str, Any]) -> None:
        extra = extra_of(step, self._schedule, position)
        self._under_way = step, self._checkpoints.save(self._trainer, extra=extra)

    def _settle(self, step: int) -> None:
        """Wait for what is being written."""
        start = time.perf_counter()
        try:
            self._checkpoints.wait()
        except CheckpointFailed as error:
            self._failed(step, error)
        self.tell()
        self._waited_s = time.perf_counter() - start

    def _failed(self, step: int, error: CheckpointFailed) -> None:
        self._under_way = None
        text = f"{error.message} Training goes on; the next checkpoint is tried when it is due. {error.hint}".strip()
        self._watching.on_note(Note(step=step, kind="save_failed", text=text))
