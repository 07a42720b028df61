"""Plan, run a few steps, refit the profile to what was measured, and plan again, until the plan stops changing.

    tuned = tune_loop("llama-3.1-8b", load_profile("profile.yaml"), batch=32)
    print(tuned.best.plan, tuned.best.found.step.error)

A plan is worth what its prediction is worth, and a run shows where that was wrong. What is kept is the best plan
measured, not the best predicted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slidetune import api, files
from slidetune.errors import SlidetuneError
from slidetune.grid import run_apart
from slidetune.hardware import HardwareProfile
from slidetune.model import ModelSpec
from slidetune.models import load_model
from slidetune.plans import Plan
from slidetune.traces.recorded import load_run
from slidetune.traces.validation import Validation
from slidetune.tuner.refit import Lesson, refit
from slidetune.tuner.search import BATCH_TOLERANCE, KEPT_THROUGHPUT, Objective
from slidetune.validating import compare_with

DEFAULT_ROUNDS = 4
DEFAULT_STEPS = 4
# Times that a run already made is asked what else it teaches, before the loop ends.
_LOOKS = 5

Progress = Callable[[str], None]
"""Called with what is being done."""
Run = Callable[[Plan, str, Path, Path], str]
"""Runs a plan with these kernels, predicted from a profile's file, into a record; what went wrong, or nothing."""


@dataclass(frozen=True, slots=True)
class Round:
    """One plan, predicted, run, and what its run taught."""

    number: int
    planned: api.Planned
    found: Validation
    lessons: Sequence[Lesson]

    @property
    def plan(self) -> Plan:
        return self.planned.plan

    @property
    def tokens_per_s(self) -> float:
        """Measured."""
        return self.plan.tokens / self.found.step.measured

    def as_dict(self) -> dict[str, object]:
        return {
            "round": self.number,
            "plan": files.dump(self.plan),
            "predicted_s": self.found.step.predicted,
            "measured_s": self.found.step.measured,
            "error": self.found.step.error,
            "tokens_per_s": self.tokens_per_s,
            "learned": [
                {
                    "text": lesson.text,
                    "measured_over_profiled": lesson.ratio,
                    "seconds": lesson.seconds,
                    "figure": lesson.change.figure,
                    "before": lesson.change.before,
                    "after": lesson.change.after,
                }
                for lesson in self.lessons
            ],
        }


@dataclass(slots=True)
class TuningLoop:
    """A tuning loop, round by round; `tune_loop` goes through all of them."""

    model: ModelSpec
    profile: HardwareProfile
    """As refitted so far."""
    run: Run
    request: dict[str, Any]
    """What `slidetune.plan` is asked for beside model and profile."""
    rounds: list[Round] = field(default_factory=list)
    stopped: str = ""
    """Why there is no further round, once there is none."""

    def next_round(self, progress: Progress = lambda note: None) -> Round | None:
        """Plan, run, refit; None when there is nothing left to do. Raises SlidetuneError if no plan could be run."""
        if self.stopped:
            return None
        planned = self._plan_anew(progress)
        if planned is None:
            return None
        progress(f"running, predicted {planned.prediction.step_s:.3g} s a step")
        found, failed = self._run(planned)
        if found is None:
            if not self.rounds:
                raise SlidetuneError(f"the plan could not be run. {failed}")
            self.stopped = f"the plan of round {len(self.rounds) + 1} could not be run. {failed}"
            return None
        progress("refitting")
        self.profile, lessons = refit(self.profile, found)
        self.rounds.append(Round(len(self.rounds) + 1, planned, found, lessons))
        if not lessons:
            self.stopped = "the profile was right: the same plan would come again"
        return self.rounds[-1]

    def result(self) -> Tuned:
        """What has come of it so far."""
        return Tuned(self.rounds, self.profile, self.stopped, self.request.get("objective", "throughput"))

    def _plan_anew(self, progress: Progress) -> api.Planned | None:
        """The next plan to run; None if the best one was measured already, and taught all it can."""
        for _ in range(_LOOKS):
            progress("planning")
            planned = api.plan(
                self.model,
                self.profile,
                progress=lambda done, of, best: progress(f"{done} of {of} plans, best {best:,.0f} tokens/s"),
                **self.request,
            )
            before = next((one for one in self.rounds if one.plan == planned.plan), None)
            if before is None:
                return planned
            # A figure moves by a limited factor at a time: the run known already may say more.
            self.profile, lessons = refit(self.profile, before.found)
            if not lessons:
                break
        self.stopped = f"the plan is that of round {before.number} again"
        return None

    def _run(self, planned: api.Planned) -> tuple[Validation | None, str]:
        with tempfile.TemporaryDirectory() as folder:
            profile, record = Path(folder) / "profile.yaml", Path(folder) / "run.json.gz"
            files.write(profile, self.profile)
            if failed := self.run(planned.plan, self.profile.gpu.kernels, profile, record):
                return None, failed
            return compare_with(planned.prediction, load_run(record)), ""


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a tuning loop found."""

    rounds: Sequence[Round]
    profile: HardwareProfile
    """Refitted to all rounds, the last one last."""
    stopped: str
    """Why it ended; empty if its rounds were used up."""
    objective: Objective

    @property
    def best(self) -> Round:
        """The round whose plan, as measured, serves the objective best: by the search's own rules."""
        most = max(one.tokens_per_s for one in self.rounds)
        if self.objective == "ram":
            fast = [one for one in self.rounds if one.tokens_per_s >= KEPT_THROUGHPUT * most]
            return min(fast, key=lambda one: one.planned.prediction.memory["ram"].peak_bytes)
        if self.objective == "nvme-writes":
            fast = [one for one in self.rounds if one.tokens_per_s >= KEPT_THROUGHPUT * most]
            return min(fast, key=lambda one: one.planned.prediction.nvme_written_bytes / one.plan.tokens)
        near = [one for one in self.rounds if one.tokens_per_s >= (1.0 - BATCH_TOLERANCE) * most]
        return min(near, key=lambda one: (one.plan.batch, -one.tokens_per_s))

    def as_dict(self) -> dict[str, object]:
        """Everything a program may want, in plain values. Times in seconds."""
        return {
            "rounds": [one.as_dict() for one in self.rounds],
            "best_round": self.best.number,
            "best_tokens_per_s": self.best.tokens_per_s,
            "plan": files.dump(self.best.plan),
            "stopped": self.stopped,
        }


def tuning_loop(
    model: str | ModelSpec,
    profile: HardwareProfile,
    *,
    steps: int = DEFAULT_STEPS,
    device: str | None = None,
    nvme_dir: str | Path | None = None,
    run_seed: int = 0,
    **request: Any,
) -> TuningLoop:
    """A loop to go through round by round, each plan run in a process of its own; see `tune_loop`."""

    def run(plan: Plan, kernels: str, profile: Path, record: Path) -> str:
        return run_apart(
            plan, kernels, record, profile=profile, steps=steps, device=device, nvme_dir=nvme_dir, seed=run_seed
        )

    return TuningLoop(load_model(model) if isinstance(model, str) else model, profile, run, request)


def tune_loop(
    model: str | ModelSpec,
    profile: HardwareProfile,
    *,
    rounds: int = DEFAULT_ROUNDS,
    steps: int = DEFAULT_STEPS,
    device: str | None = None,
    nvme_dir: str | Path | None = None,
    progress: Progress = lambda note: None,
    **request: Any,
) -> Tuned:
    """Plan for a model on the machine at hand, run, refit, and plan again, for at most `rounds` rounds.

    `steps` of each plan are measured, after a warm-up; `device` and `nvme_dir` as for `validate`; `request` is what
    `slidetune.plan` may be asked for: seq_len, batch, clip_norm, objective, trials, seed. Random weights and tokens
    do. Raises what `slidetune.plan` raises, and SlidetuneError if the first plan can't be run.
    """
    loop = tuning_loop(model, profile, steps=steps, device=device, nvme_dir=nvme_dir, **request)
    while len(loop.rounds) < rounds and loop.next_round(progress) is not None:
        pass
    return loop.result()
