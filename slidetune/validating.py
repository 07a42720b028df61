"""Predict a plan, run it, and compare: how far predictions can be trusted on the machine at hand.

    found = validate("plan.yaml", load_profile("profile.yaml"))
    print(found.step.error, found.lanes)
    again = validate_recorded("runs")       # from files: needs neither the machine nor torch
    print(again.step_time.median)

The prediction is always made before the run, from the profile and the plan alone.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slidetune import api, provenance
from slidetune.hardware import HardwareProfile
from slidetune.machines import adapted, load_profile
from slidetune.model import recomputed_whole
from slidetune.models import load_model
from slidetune.plan_file import read_plan
from slidetune.plans import Plan
from slidetune.schedule import Schedule
from slidetune.simulator.predict import Prediction, predict
from slidetune.trace import TraceRow
from slidetune.traces.recorded import (
    MeasuredSteps,
    RecordedRun,
    digest,
    load_run,
    recorded_runs,
    typical_step,
)
from slidetune.traces.validation import Summary, Validation, compare_run
from slidetune.tuner.evaluate import Evaluator

if TYPE_CHECKING:
    from slidetune.runtime.run import Measured
    from slidetune.runtime.trainer import SlidingTrainer

DEFAULT_STEPS = 6
# Beside the steps measured: two to warm up, and one more at the end, since the last one's late tasks have no next step
# beside them.
EXTRA_STEPS = 3

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps to do, and what to say about them."""
Batches = Callable[[int], Iterator[Any]]
"""Batches without end of a model with this size of vocabulary."""


def validate(
    plan: Plan | str | Path,
    profile: HardwareProfile,
    *,
    model: str | None = None,
    batches: Batches | None = None,
    device: str | None = None,
    nvme_dir: str | Path | None = None,
    seed: int = 0,
    steps: int = DEFAULT_STEPS,
    name: str = "",
    progress: Progress = lambda done, of, note: None,
) -> Validation:
    """Predict a plan on the machine that `profile` describes, run it here for some steps, and compare.

    `model` is a directory with weights, else the plan's own model with random ones; `batches` are random tokens
    unless given. `steps` are measured, after a warm-up. Raises `DoesNotFit` before anything runs if the plan is
    too large for the profile, and what `SlidingTrainer` raises.
    """
    chosen = plan if isinstance(plan, Plan) else read_plan(plan)
    prediction = api.simulate(plan, profile, more=False).prediction
    progress(0, steps, f"predicted {prediction.step_s:.3g} s a step")
    ran = run_recorded(
        chosen,
        profile.gpu.kernels,
        model=model,
        batches=batches,
        device=device,
        nvme_dir=nvme_dir,
        seed=seed,
        steps=steps,
        name=name,
        progress=progress,
    )
    return compare_with(prediction, ran.run)


def validate_recorded(directory: str | Path) -> Summary:
    """Predict every run recorded in a folder again, from its plan and its machine's profile alone, and compare."""
    return Summary([validate_run_file(path) for path in recorded_runs(directory)])


def validate_run_file(path: str | Path) -> Validation:
    """The same for one run's file."""
    run = load_run(path)
    return compare_with(predict_again(run, load_profile(Path(path).parent / run.profile)), run)


def predict_again(run: RecordedRun, profile: HardwareProfile) -> Prediction:
    """What the simulator says today about a run."""
    plan = run.plan
    here = api.within_cap(adapted(profile, kernels=run.kernels), plan)
    model = load_model(plan.model)
    evaluator = Evaluator(recomputed_whole(model) if run.recomputes_whole else model, here)
    return predict(evaluator.schedule(plan), here, evaluator.prices)


def compare_with(prediction: Prediction, run: RecordedRun) -> Validation:
    """A prediction beside a run; lanes are left out, with a note, where the schedule's tasks have changed."""
    schedule, measured = prediction.schedule, run.measured
    if digest(schedule) == measured.tasks and len(schedule.tasks) == len(measured.start_us):
        return compare_run(prediction, run, measured_rows(schedule, measured))
    note = (
        f"the schedule is not the one that ran ({len(measured.start_us)} tasks then, {len(schedule.tasks)} now): "
        "lanes are not compared."
    )
    return compare_run(prediction, run, (), [note])


def measured_rows(schedule: Schedule, measured: MeasuredSteps) -> list[TraceRow]:
    """The typical step's rows, as the runtime traces them; the step before it is taken to have been the same."""
    from slidetune.runtime.measured import Recorded, trace_rows

    times = measured.times()
    gpu = [times[index][1] for index, task in enumerate(schedule.tasks) if task.work.lane == "gpu"]
    before = [(start - max(gpu), end - max(gpu)) for start, end in times]
    return [row for row in trace_rows(schedule, [Recorded(0, before), Recorded(1, times)]) if row.step == 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A run, its record, and what the record leaves out."""

    run: RecordedRun
    measured: Measured
    """All steps: those that warm up, and the one after the steps that count."""
    loading_s: float
    """Until the first step could begin."""
    working_bytes: int
    """What the schedule lets the device compute with."""


def run_recorded(
    plan: Plan,
    kernels: str,
    *,
    model: str | None = None,
    batches: Batches | None = None,
    device: str | None = None,
    nvme_dir: str | Path | None = None,
    seed: int = 0,
    steps: int = DEFAULT_STEPS,
    name: str = "",
    progress: Progress = lambda done, of, note: None,
) -> Ran:
    """Run a plan as `validate` does, which says what its arguments are, without predicting it."""
    from slidetune.runtime.data import synthetic
    from slidetune.runtime.run import WARM_UP, adam_alone_s, run
    from slidetune.runtime.trainer import SlidingTrainer

    every = steps + EXTRA_STEPS
    model = model or plan.model
    began = time.perf_counter()
    with SlidingTrainer(
        model,
        plan,
        random_weights=not _has_weights(model),
        device=device,
        nvme_folder=nvme_dir,
        seed=seed,
        trace=steps + 1,
        kernels=kernels,
    ) as trainer:
        loading_s = time.perf_counter() - began
        vocabulary = trainer.spec.vocab_size
        measured = run(
            trainer,
            batches(vocabulary) if batches else synthetic(vocabulary, plan, seed),
            every,
            on_step=lambda number, so_far: progress(number, every, f"{so_far.step_s[-1]:.3g} s a step"),
        )
        return Ran(
            run=_recorded(plan, trainer, measured, WARM_UP, name or plan.model, adam_alone_s(trainer)),
            measured=measured,
            loading_s=loading_s,
            working_bytes=trainer.schedule.working_bytes(),
        )


def _recorded(
    plan: Plan, trainer: SlidingTrainer, measured: Measured, warm_up: int, name: str, alone_s: float | None
) -> RecordedRun:
    device = trainer.device.type
    last = len(measured.losses)
    step_s = tuple(round(seconds, 6) for seconds in measured.step_s[warm_up:-1])
    steady = [row for row in trainer.trace if warm_up < row.step < last]
    starts, ends = typical_step(trainer.schedule, steady, statistics.median(step_s))
    peaks = measured.peaks if device == "cuda" else {"ram": measured.peaks["ram"]}
    return RecordedRun(
        name=name,
        date=provenance.today(),
        machine=provenance.machine(str(trainer.device)),
        versions=provenance.versions(),
        device=device,
        kernels=trainer.kernels,
        recomputes_whole=False,
        plan=plan,
        measured=MeasuredSteps(
            step_s=step_s,
            losses=tuple(_rounded(measured.losses)),
            peak_bytes=dict(peaks),
            # Late updates of the first step are made at the end.
            nvme_written_bytes=round(measured.nvme_written_bytes / last),
            tasks=digest(trainer.schedule),
            adam_alone_s=None if alone_s is None else round(alone_s, 6),
            start_us=tuple(starts),
            end_us=tuple(ends),
        ),
    )


def _rounded(losses: Sequence[float]) -> list[float]:
    return [float(f"{loss:.6g}") for loss in losses if math.isfinite(loss)]


def _has_weights(model: str) -> bool:
    return Path(model).is_dir() and any(Path(model).glob("*.safetensors"))
