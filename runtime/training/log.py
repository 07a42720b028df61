"""The log of every step: `log.jsonl`, one JSON object a line, appended to by every run that goes on.

Its `event` says what a line is: start, step, evaluation, checkpoint, note, end. A run that was killed and went on makes
the steps since its checkpoint again: of two lines of one step the later one counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from slidetune import files
from slidetune.errors import SlidetuneError
from slidetune.recipe import Recipe
from slidetune.runtime.training.callbacks import (
    Callback,
    CheckpointSaved,
    Evaluated,
    Note,
    Started,
    StepDone,
    Trained,
)

NAME = "log.jsonl"
_log = logging.getLogger(__name__)


def log_folder(recipe: Recipe) -> Path:
    """Where the log goes, and what reporters write."""
    return Path(recipe.output if recipe.log is None else recipe.log).expanduser()


class JsonLog(Callback):
    """Writes `log.jsonl`; a line is in the file as soon as it is written, whatever ends the process.

    Lines that a full disk has no room for are left out, which is no reason to end a training.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._file: IO[bytes] | None = None
        self._failing = False

    def on_start(self, started: Started) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut_half_line(self.path)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            reason = f"{self.path}: the log can't be written ({error.strerror})."
            raise SlidetuneError(reason, "Give another directory: log, or --log.") from None
        predicted = started.predicted
        self._write(
            "start",
            recipe=files.dump(started.recipe),
            plan=files.dump(started.plan),
            first_step=started.first_step,
            total_steps=started.total_steps,
            epoch_steps=started.epoch_steps,
            resumed_from=None if started.resumed_from is None else str(started.resumed_from),
            device=started.device,
            kernels=started.kernels,
            predicted_step_s=None if predicted is None else predicted.step_s,
            predicted_from=None if predicted is None else predicted.machine,
            nvme_step_bytes=started.nvme_step_bytes,
            checkpoint_bytes=started.checkpoint_bytes,
            data=list(started.data),
            slidetune=version("slidetune"),
        )

    def on_step(self, done: StepDone) -> None:
        self._write("step", **_plain(done), tokens_per_s=done.tokens_per_s)

    def on_evaluate(self, found: Evaluated) -> None:
        self._write("evaluation", **_plain(found), tokens_per_s=found.tokens_per_s)

    def on_save(self, saved: CheckpointSaved) -> None:
        self._write("checkpoint", **_plain(saved))

    def on_note(self, note: Note) -> None:
        self._write("note", step=note.step, kind=note.kind, text=note.text, **note.fields)

    def on_end(self, trained: Trained) -> None:
        told = trained.as_dict()
        # Every one of them has a line.
        del told["losses"], told["evaluations"], told["log"]
        self._write("end", **told)
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, event: str, **values: Any) -> None:
        if self._file is None:
            return
        line = {"event": event, "time_s": round(time.time(), 3), **values}
        data = json.dumps(_finite(line), default=str, allow_nan=False).encode() + b"\n"
        before = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._failing = False
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(before)
            if not self._failing:
                _log.warning("%s: lines of the log are lost (%s).", self.path, error.strerror)
            self._failing = True


def _cut_half_line(path: Path) -> None:
    """Take away what a run that was killed, or a disk that was full, left of a line."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        file.truncate(_whole_lines_bytes(file))


def _whole_lines_bytes(file: IO[bytes]) -> int:
    """The length of a file without what stands behind its last line end."""
    at = file.seek(0, os.SEEK_END)
    while at:
        start = max(0, at - 65536)
        file.seek(start)
        found = file.read(at - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        at = start
    return 0


def _plain(event: Any) -> dict[str, Any]:
    return {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}


def _finite(value: Any) -> Any:
    """JSON has no word for NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
