"""The loop: step, tell who watches, save and evaluate when it is time, end when it is done or asked to."""

from __future__ import annotations

import contextlib
import math
import shutil
import statistics
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

from slidetune.errors import SlidetuneError
from slidetune.plans import Plan
from slidetune.recipe import Recipe, lr_factor
from slidetune.runtime.checkpoint import CheckpointFailed, Checkpoints, checkpoints, export, latest
from slidetune.runtime.checkpoint.ranges import state_nbytes
from slidetune.runtime.data import Prepared
from slidetune.runtime.run import WARM_UP, peaks
from slidetune.runtime.trainer import NonFiniteLoss, SlidingTrainer
from slidetune.runtime.training.callbacks import (
    FINISHED,
    Callback,
    Evaluated,
    Note,
    Predicted,
    Started,
    StepDone,
    Trained,
)
from slidetune.runtime.training.evaluation import evaluate
from slidetune.runtime.training.log import NAME, log_folder
from slidetune.runtime.training.saves import Saves
from slidetune.runtime.training.setup import MODEL, Resumed, schedule_note, schedule_of
from slidetune.runtime.training.slow_steps import SlowSteps
from slidetune.runtime.training.stopping import Stop, signals_ask
from slidetune.runtime.training.waiting import Ahead
from slidetune.schedule import NVME_WRITE
from slidetune.units import format_bytes

# The time left follows the speed of so many steps.
_RECENT = 20


@dataclass(slots=True, kw_only=True)
class Job:
    """All that a training needs, ready."""

    recipe: Recipe
    plan: Plan
    data: Prepared
    total_steps: int
    trainer: SlidingTrainer
    checkpoints: Checkpoints
    resumed: Resumed | None
    predicted: Predicted | None
    notes: list[Note]
    """To be told once it has started."""


def train(job: Job, watching: Callback) -> Trained:
    """Train to the last step, or until a signal or a callback asks for the end; either way all is saved.

    Raises:
        NonFiniteLoss: with what to do next; nothing is saved then.
        CheckpointFailed: the last checkpoint could not be saved. (One on the way that can't is noted.)
        and what `SlidingTrainer.step`, batches and callbacks raise.
    """
    return _Run(job, watching).all()


class _Run:
    def __init__(self, job: Job, watching: Callback) -> None:
        self.job, self.watching, self.stop = job, watching, Stop()
        self.step = 0 if job.resumed is None else job.resumed.step
        """The last one made."""
        self.first_step = self.step + 1
        self.losses: list[float] = []
        self.evaluations: list[Evaluated] = []
        self._step_s: list[float] = []
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._slow = SlowSteps(job.predicted)
        self._schedule = schedule_of(job.recipe, job.total_steps)
        self._saves = Saves(job.checkpoints, job.trainer, self._schedule, self.step, watching)
        self._paused = True
        """Whether training stood still since the last step."""
        self._nvme_bytes = sum(pool.bytes for pool in job.trainer.schedule.pools_of("nvme"))
        self._written_before = job.trainer.nvme_written_bytes
        self._ahead: Ahead | None = None

    def all(self) -> Trained:
        job = self.job
        if job.resumed is not None:
            job.data.train.restore(job.resumed.position)
        if job.trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(job.trainer.device)
        started = self._started()
        try:
            self.watching.on_start(started)
            other = None if job.resumed is None else schedule_note(job.resumed, self._schedule)
            for note in (*job.notes, *([other] if other else [])):
                self.watching.on_note(note)
            self._check_room(started.checkpoint_bytes if started.checkpoints else 0)
            with signals_ask(self.stop):
                if self.step < job.total_steps:
                    with Ahead(job.data.train) as self._ahead:
                        self._steps()
                        self._saves.last(self.step, self._ahead.position)
                model = None
                if self.step >= job.total_steps:
                    self._evaluate_at_the_end()
                    model = self._write_model()
        except BaseException as error:
            with contextlib.suppress(Exception):
                self.watching.on_end(self._trained(_reason(error), None))
            if isinstance(error, SlidetuneError):
                self._say_how_to_go_on(error)
            raise
        trained = self._trained(FINISHED if model is not None else self.stop.reason, model)
        self.watching.on_end(trained)
        return trained

    # ---- steps --------------------------------------------------------------------------------------------

    def _steps(self) -> None:
        recipe, trainer, total = self.job.recipe, self.job.trainer, self.job.total_steps
        before = time.perf_counter()
        while self.step < total and self.stop.reason is None:
            batch = self._ahead.next()
            step = self.step + 1
            factor = lr_factor(recipe, step, total)
            loss = trainer.step(batch, lr_scale=factor)
            self.step = step
            saves = recipe.save_every is not None and step % recipe.save_every == 0 and step < total
            evaluates = recipe.evaluate_every is not None and step % recipe.evaluate_every == 0 and step < total
            if saves or evaluates:
                # Its backward pass belongs to the step, not to the pause.
                trainer.finish()
            norm = trainer.grad_norm()
            now = time.perf_counter()
            self._tell(loss, factor * recipe.lr, norm, now - before, batch["input_ids"].numel(), saves or evaluates)
            before = now
            # Killed between the two, the run that goes on evaluates again; the other way round it never would.
            if evaluates:
                self._evaluate()
            if saves:
                self._saves.begin(step, self._ahead.position)
            if saves or evaluates:
                before = time.perf_counter()
            self._paused = saves or evaluates

    def _tell(self, loss: float, lr: float, norm: float | None, step_s: float, tokens: int, pauses: bool) -> None:
        job = self.job
        self.losses.append(loss)
        self._step_s.append(step_s)
        self._recent.append(step_s)
        predicted = job.predicted
        done = StepDone(
            step=self.step,
            total_steps=job.total_steps,
            epoch=self.step / len(job.data.train),
            loss=loss,
            lr=lr,
            grad_norm=norm,
            step_s=step_s,
            waited_s=self._ahead.waited_s,
            tokens=tokens,
            left_s=statistics.fmean(self._recent) * (job.total_steps - self.step),
            predicted_tokens_per_s=None if predicted is None else job.plan.tokens / predicted.step_s,
            nvme_written_bytes=job.trainer.nvme_written_bytes - self._written_before,
            peak_bytes=self._peaks(),
        )
        self.watching.on_step(done)
        self._saves.tell()
        if norm is not None and not math.isfinite(norm):
            self._note("gradients_refused", f"Step {self.step:,}: its gradients are not finite; its update is refused.")
        slow = self._slow.look(job.trainer, done, paused=self._paused or pauses, saving=self._saves.under_way)
        if slow is not None:
            self.watching.on_note(slow)

    def _evaluate(self) -> None:
        found = evaluate(self.job.trainer, self.job.data.held_out, self.step, self.stop)
        if found is not None:
            self.evaluations.append(found)
            self.watching.on_evaluate(found)

    def _evaluate_at_the_end(self) -> None:
        if self.job.data.held_out is not None and self.stop.reason is None:
            self._evaluate()

    # ---- the end ------------------------------------------------------------------------------------------

    def _write_model(self) -> Path:
        """The trained model, from the last checkpoint."""
        folder = self.job.checkpoints.directory / MODEL
        checkpoint = latest(self.job.checkpoints.directory)
        try:
            export(checkpoint, folder)
        except SlidetuneError as error:
            raise SlidetuneError(
                error.message,
                f"All steps are made, and {checkpoint} is whole: `slidetune export {checkpoint} -o DIR` writes the "
                "model from it.",
            ) from error
        return folder

    # ---- telling ------------------------------------------------------------------------------------------

    def _started(self) -> Started:
        job = self.job
        left = job.total_steps - self.step
        every = job.recipe.save_every
        masters, _ = job.trainer.settled()
        return Started(
            recipe=job.recipe,
            plan=job.plan,
            first_step=self.first_step,
            total_steps=job.total_steps,
            epoch_steps=len(job.data.train),
            device=str(job.trainer.device),
            kernels=job.trainer.kernels,
            data=job.data.report.lines(),
            resumed_from=None if job.resumed is None else job.resumed.checkpoint,
            predicted=job.predicted,
            nvme_step_bytes=int(job.trainer.schedule.total("bytes", NVME_WRITE)),
            checkpoint_bytes=sum(state_nbytes(master.layout) for master in masters),
            checkpoints=0 if left < 1 else 1 + ((job.total_steps - 1) // every - self.step // every if every else 0),
            output=job.checkpoints.directory,
            log=log_folder(job.recipe) / NAME,
            stop=self.stop.ask,
        )

    def _trained(self, ended: str, model: Path | None) -> Trained:
        steady = self._step_s[WARM_UP:] or self._step_s
        tokens = self.job.plan.tokens
        return Trained(
            ended=ended,
            first_step=self.first_step,
            step=self.step,
            total_steps=self.job.total_steps,
            losses=self.losses,
            evaluations=self.evaluations,
            checkpoint=latest(self.job.checkpoints.directory),
            model=model,
            tokens_per_s=tokens * len(steady) / sum(steady) if steady else None,
            peak_bytes=self._peaks(),
            log=log_folder(self.job.recipe) / NAME,
        )

    def _peaks(self) -> dict[str, int]:
        return {**peaks(self.job.trainer), "nvme": self._nvme_bytes}

    def _check_room(self, checkpoint_bytes: int) -> None:
        """Say at the start if the disk is too small for what will be kept: the last checkpoint comes hours later."""
        directory, keep = self.job.checkpoints.directory, self.job.recipe.keep
        # One is deleted once the next is whole.
        needed = checkpoint_bytes * max(1, keep + 1 - len(checkpoints(directory)))
        free = shutil.disk_usage(directory).free
        if checkpoint_bytes and needed > free:
            self._note(
                "little_room",
                f"{directory} has {format_bytes(free)} free; the checkpoints to come need {format_bytes(needed)}. Make "
                f"room, keep fewer than {keep}, or give another --output: what doesn't fit is not saved.",
            )

    def _note(self, kind: str, text: str) -> None:
        self.watching.on_note(Note(step=self.step, kind=kind, text=text))

    def _say_how_to_go_on(self, error: SlidetuneError) -> None:
        with contextlib.suppress(CheckpointFailed):
            self.job.checkpoints.wait()
        found = checkpoints(self.job.checkpoints.directory)
        way = f"{found[-1]} is whole: go on from it with --resume" if found else "Nothing was saved before: begin anew"
        if isinstance(error, NonFiniteLoss):
            way += f", with a lower learning rate (--lr {self.job.recipe.lr / 2:g}) or more warm_up_steps"
            if len(found) > 1:
                # The weights may have gone astray before the loss showed it.
                way += f". {found[-2].name} is older: without the folder {found[-1].name} it is gone on from"
        error.hint = f"{error.hint}\n{way}.".strip()


def _reason(error: BaseException) -> str:
    return error.message if isinstance(error, SlidetuneError) else f"{type(error).__name__}: {error}".rstrip(": ")
