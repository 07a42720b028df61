"""`Callback`, and what it is told. Times in seconds, sizes in bytes; steps are optimizer steps, the first being 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slidetune.plans import Plan
from slidetune.recipe import Recipe, batch_text
from slidetune.units import TB, format_bytes, format_seconds

FINISHED = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What the simulator foresees of a step."""

    step_s: float
    work_s: Mapping[tuple[str, str], float]
    """Busy seconds by lane and operation."""
    machine: str
    """What the prediction rests on, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A training that is about to make its first step."""

    recipe: Recipe
    plan: Plan
    first_step: int
    total_steps: int
    epoch_steps: int
    device: str
    kernels: str
    data: Sequence[str]
    """What was read, a sentence a line."""
    resumed_from: Path | None
    predicted: Predicted | None
    """None where no profile of the machine is known."""
    nvme_step_bytes: int
    """Written to the NVMe tier a step."""
    checkpoint_bytes: int
    checkpoints: int
    """To be saved from here to the end."""
    output: Path
    log: Path
    """The log of every step."""
    stop: Callable[[str], None]
    """Asks the training to save and end after the step under way; called with why."""

    @property
    def steps_left(self) -> int:
        return self.total_steps - self.first_step + 1

    def lines(self) -> list[str]:
        """What a training says at its start, a sentence a line."""
        found = [*self.data, f"{batch_text(self.recipe, self.plan, self.epoch_steps)}."]
        if self.resumed_from is not None:
            found.append(f"Goes on from {self.resumed_from}: {self.first_step - 1:,} steps are done.")
        if self.steps_left < 1:
            return found
        if self.predicted is not None:
            speed, all_s = self.plan.tokens / self.predicted.step_s, self.predicted.step_s * self.steps_left
            found.append(
                f"Predicted from {self.predicted.machine}: {format_seconds(self.predicted.step_s)} a step, "
                f"{speed:,.0f} tokens/s, {_hours(all_s)} for {self.steps_left:,} steps."
            )
        tier, saved = self.nvme_step_bytes * self.steps_left, self.checkpoint_bytes * self.checkpoints
        of_it = f"{_terabytes(tier + saved)}, {_terabytes(tier)} of it to the NVMe tier and " if tier else ""
        found.append(
            f"To be written: {of_it}{_terabytes(saved)} in {self.checkpoints:,} "
            f"checkpoint{'s' * (self.checkpoints != 1)} of {format_bytes(self.checkpoint_bytes)}."
        )
        if self.recipe.save_every is None:
            found.append("Nothing is saved before the last step (save_every, --save-every), but by SIGTERM and Ctrl-C.")
        return found


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.3g} h" if 3600 <= seconds < 3.6e6 else format_seconds(seconds)


def _terabytes(size: float) -> str:
    """As the wear of drives is counted."""
    return f"{size / TB:.3g} TB" if not size or size >= TB / 1000 else format_bytes(size)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """One step, as soon as its loss is known; what is left of it goes on meanwhile."""

    step: int
    total_steps: int
    epoch: float
    """Passes over the data so far."""
    loss: float
    lr: float
    grad_norm: float | None
    """Before clipping; None where the plan doesn't clip."""
    step_s: float
    """From the loss before to this one; saving and evaluating between them are not in it."""
    waited_s: float
    """The part of it in which the step waited for its batch."""
    tokens: int
    """Padding included."""
    left_s: float
    """Until the last step, at the speed of the last ones."""
    predicted_tokens_per_s: float | None
    nvme_written_bytes: int
    """To the NVMe tier by the steps of this run."""
    peak_bytes: Mapping[str, int]
    """gpu, page_locked and ram, as `slidetune.runtime.run.peaks` has them; and nvme, the tier's size."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The mean loss of a label of all that is held out."""

    step: int
    loss: float
    labels: int
    tokens: int
    """Padding included."""
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint that is complete."""

    step: int
    path: Path
    nbytes: int
    paused_s: float
    """For which training paused, for a checkpoint before it that was still being written too."""
    seconds: float
    """From the begin of that pause until it was complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something that whoever watches should read."""

    step: int
    """After which it happened; 0 before the first."""
    kind: str
    """slow_step, save_failed, gradients_refused, resumed, stopping, ..."""
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The same as plain values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What came of a training."""

    ended: str
    """finished; SIGTERM or SIGINT; what `Started.stop` was called with; or the error that ended it."""
    first_step: int
    step: int
    """The last one made, by this run or by one before it."""
    total_steps: int
    losses: Sequence[float]
    """Of the steps of this run."""
    evaluations: Sequence[Evaluated]
    """Of this run."""
    checkpoint: Path | None
    """The last whole one."""
    model: Path | None
    """The trained model as transformers reads it; None where training did not finish."""
    tokens_per_s: float | None
    """Of this run's steps, the first two left out where there are more; None if it made none."""
    peak_bytes: Mapping[str, int]
    log: Path
    """The log of every step."""

    @property
    def finished(self) -> bool:
        return self.ended == FINISHED

    def as_dict(self) -> dict[str, object]:
        """Everything a program may want, in plain values."""
        return {
            "ended": self.ended,
            "first_step": self.first_step,
            "step": self.step,
            "total_steps": self.total_steps,
            "losses": list(self.losses),
            "evaluations": [{"step": one.step, "loss": one.loss, "labels": one.labels} for one in self.evaluations],
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "model": None if self.model is None else str(self.model),
            "tokens_per_s": self.tokens_per_s,
            "peak_bytes": dict(self.peak_bytes),
            "log": str(self.log),
        }


class Callback:
    """Watches a training; override what you need. What a callback raises ends the training, its checkpoints intact."""

    def on_prepare(self, doing: str) -> None:
        """Something that may take a while begins, before the first step: reading data, loading the model, ..."""

    def on_start(self, started: Started) -> None:
        """All is ready for the first step."""

    def on_step(self, done: StepDone) -> None:
        """A step is done."""

    def on_evaluate(self, found: Evaluated) -> None:
        """What is held out was evaluated."""

    def on_save(self, saved: CheckpointSaved) -> None:
        """A checkpoint is complete."""

    def on_note(self, note: Note) -> None:
        """Something that should be read: a slow step and why, a checkpoint that could not be saved."""

    def on_end(self, trained: Trained) -> None:
        """The training has ended, well or not. Only after `on_start`."""


class Callbacks(Callback):
    """Several as one, told in order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._all = list(callbacks)

    def on_prepare(self, doing: str) -> None:
        for one in self._all:
            one.on_prepare(doing)

    def on_start(self, started: Started) -> None:
        for one in self._all:
            one.on_start(started)

    def on_step(self, done: StepDone) -> None:
        for one in self._all:
            one.on_step(done)

    def on_evaluate(self, found: Evaluated) -> None:
        for one in self._all:
            one.on_evaluate(found)

    def on_save(self, saved: CheckpointSaved) -> None:
        for one in self._all:
            one.on_save(saved)

    def on_note(self, note: Note) -> None:
        for one in self._all:
            one.on_note(note)

    def on_end(self, trained: Trained) -> None:
        for one in self._all:
            one.on_end(trained)
