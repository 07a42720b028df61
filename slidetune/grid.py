"""Many plans validated one after the other: a grid file's cases are predicted, then run, each in a process of its own.

    cases:
    - {model: llama-3.2-1b, batch: 8}                       # the tuner's plan for 8 sequences a step
    - {model: llama-3.2-1b, batch: 8, window: 4, gpu_memory_gib: 6}
    - {plan: plans/large.yaml, kernels: eager, name: large}

Beside a plan's own knobs a case may say batch, ram_gib, gpu_memory_gib, kernels and name. All predictions are on disk
before the first run starts. A process of its own gives each run its own high-water mark of RAM, and whatever ends it
ends nothing else.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from slidetune import apart, api, files
from slidetune.errors import BadFile, SlidetuneError
from slidetune.hardware import HardwareProfile
from slidetune.machines import adapted, load_profile
from slidetune.plan_file import read_plan
from slidetune.plans import Plan
from slidetune.simulator.predict import Prediction
from slidetune.traces.recorded import SUFFIX, load_run, run_name, save_run
from slidetune.traces.validation import Validation
from slidetune.validating import DEFAULT_STEPS, EXTRA_STEPS, Progress, compare_with, run_recorded, validate_run_file

T = TypeVar("T")

PREDICTIONS, FAILURES = "predictions.json", "failures.json"
_ABOUT = ("name", "model", "plan", "batch", "ram_gib", "gpu_memory_gib", "kernels")
_KNOBS = tuple(f.name for f in dataclasses.fields(Plan) if f.name not in ("version", "model", "gpu_memory_gib"))
# A case that hangs must not hold up the grid: loading a model that swaps takes minutes, and steps of a profile that is
# wrong may be many times as long as predicted. What takes longer than both is ended.
CASE_S, MOST_TIMES_PREDICTED = 15 * 60.0, 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of a grid file."""

    name: str
    model: str = ""
    plan: Path | None = None
    """A plan's file, in place of a model."""
    batch: int | None = None
    ram_gib: float | None = None
    gpu_memory_gib: float | None = None
    kernels: str | None = None
    knobs: Mapping[str, Any] = field(default_factory=dict)
    """Of the plan, those that the case sets; the tuner finds the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """A case with its plan and its prediction."""

    case: Case
    plan: Plan
    kernels: str
    prediction: Prediction

    def as_dict(self) -> dict[str, object]:
        prediction = self.prediction
        return {
            "name": self.case.name,
            "step_s": prediction.step_s,
            "lanes_busy_s": {lane: share.busy_s for lane, share in prediction.lanes.items()},
            "peak_bytes": {tier: memory.peak_bytes for tier, memory in prediction.memory.items()},
            "kernels": self.kernels,
            "plan": files.dump(self.plan),
        }


@dataclass(frozen=True, slots=True)
class Failure:
    """A case that could not be planned, or whose run ended badly."""

    name: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GridResult:
    """What became of a grid's cases."""

    runs: Sequence[Validation]
    failures: Sequence[Failure]
    not_started: Sequence[str]
    """Names of the cases for which the budget left no time."""


Note = Callable[[str], None]
"""Called with a line on what was done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How the cases are run; see `validate`."""

    profile: str
    """A file, or a shipped profile's name."""
    directory: Path
    """Where runs are recorded."""
    steps: int
    device: str | None
    nvme_dir: str | Path | None
    seed: int

    def record(self, case: Case) -> Path:
        return self.directory / f"{case.name}{SUFFIX}"

    def run(self, one: Foreseen) -> str:
        """Run a case; what went wrong, or nothing."""
        steps_s = (self.steps + EXTRA_STEPS) * one.prediction.step_s
        return run_apart(
            one.plan,
            one.kernels,
            self.record(one.case),
            profile=self.profile,
            steps=self.steps,
            device=self.device,
            nvme_dir=self.nvme_dir,
            seed=self.seed,
            timeout_s=CASE_S + MOST_TIMES_PREDICTED * steps_s,
        )


def validate_grid(
    grid: str | Path,
    profile: str | Path,
    directory: str | Path,
    *,
    steps: int = DEFAULT_STEPS,
    device: str | None = None,
    nvme_dir: str | Path | None = None,
    seed: int = 0,
    budget_s: float | None = None,
    progress: Progress = lambda done, of, note: None,
    note: Note = lambda line: None,
) -> GridResult:
    """Plan, predict and run a grid file's cases on the machine that the profile (a file, or a shipped one's name)
    describes; record each run in a folder.

    A case whose record is there already, of the same plan, is not run again. Failures are kept, in the folder too.
    After `budget_s` seconds no further case is started.
    """
    until = time.perf_counter() + (math.inf if budget_s is None else budget_s)
    cases = read_grid(grid)
    how = How(
        profile=str(profile),
        directory=Path(directory),
        steps=steps,
        device=device,
        nvme_dir=nvme_dir,
        seed=seed,
    )
    how.directory.mkdir(parents=True, exist_ok=True)
    if time.perf_counter() <= until and not all(how.record(case).exists() for case in cases):
        # While the plans are made.
        apart.get_ready()
    foreseen, failures = _foresee_all(cases, load_profile(profile), progress)
    for failure in failures:
        note(f"{failure.name}: can't be planned. {failure.error}")
    waiting = [one for one in foreseen if not _is_recorded(how.record(one.case), one)]
    _write_predictions(how.directory, foreseen, {one.case.name for one in waiting})
    _write_failures(how.directory, failures)
    not_started, found = [], {}
    for done, one in enumerate(waiting):
        progress(done, len(waiting), f"running {one.case.name}")
        if time.perf_counter() > until:
            not_started.append(one.case.name)
        elif failed := how.run(one):
            failures.append(Failure(one.case.name, failed))
            _write_failures(how.directory, failures)
            note(f"{one.case.name}: failed. {failed}")
        else:
            # What was predicted before the run is what counts, and need not be simulated again.
            found[one.case.name] = compare_with(one.prediction, load_run(how.record(one.case)))
            note(_outcome(found[one.case.name]))
    left_out = {failure.name for failure in failures} | set(not_started)
    runs = [found.get(case.name) or validate_run_file(how.record(case)) for case in cases if case.name not in left_out]
    return GridResult(runs=runs, failures=failures, not_started=not_started)


def _outcome(found: Validation) -> str:
    step = found.step
    return f"{found.run.name}: predicted {step.predicted:.4g} s, measured {step.measured:.4g} s, {step.error:+.1%}"


# --- The file


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grid:
    cases: list[dict[str, Any]]


def read_grid(path: str | Path) -> list[Case]:
    """The cases of a grid file. Raises `BadFile`, naming the case and what is wrong with it."""
    path = Path(path)
    rows = files.read(path, _Grid).cases
    if not rows:
        raise BadFile(f"{path}: has no cases.", "cases:\n- {model: llama-3.2-1b, batch: 8}")
    cases = [_numbered_case(path, number, row) for number, row in enumerate(rows, start=1)]
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadFile(f"{path}: two cases are called {', '.join(twice)}.", "Give each a name of its own (name: ...).")
    return cases


def _numbered_case(path: Path, number: int, row: dict[str, Any]) -> Case:
    try:
        return _case(path, row)
    except SlidetuneError as error:
        raise BadFile(f"{path}: case {number}: {error.message}", error.hint) from None


def _case(path: Path, row: dict[str, Any]) -> Case:
    for key in row:
        if key not in _ABOUT and key not in _KNOBS:
            near = difflib.get_close_matches(str(key), [*_ABOUT, *_KNOBS], n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join((*_ABOUT, *_KNOBS))}."
            raise SlidetuneError(f"{key} is not a known field.", hint)
    if ("model" in row) == ("plan" in row):
        raise SlidetuneError("give either a model or a plan.")
    if "plan" in row and "batch" in row:
        raise SlidetuneError("batch goes with model; a plan has micro_batch and accumulation.")
    knobs = {key: value for key, value in row.items() if key in _KNOBS}
    _checked(Plan, {"model": "any", **knobs})
    about = {key: row[key] for key in _ABOUT if key in row} | {"name": _name(row), "knobs": knobs}
    if "plan" in row:
        about["plan"] = str(path.parent / str(row["plan"]))
        return _checked(Case, about)
    case = _checked(Case, about)
    batch, knobs = _whole_batch(case.batch, knobs)
    return dataclasses.replace(case, batch=batch, knobs=knobs)


def _checked(kind: type[T], fields: Mapping[str, Any]) -> T:
    """The dataclass with these fields. Raises SlidetuneError for values of the wrong type."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    try:
        return TypeAdapter(list[kind], config=ConfigDict(extra="forbid")).validate_python([fields])[0]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"][1:]))
        raise SlidetuneError(f"{where} is {first['input']!r}: {first['msg']}.") from None


def _name(row: Mapping[str, Any]) -> str:
    """The case's name as a file may have it: its own, or its model and what it sets."""
    if "name" in row:
        words = [str(row["name"])]
    else:
        words = [Path(row["plan"]).stem if "plan" in row else model_name(str(row["model"]))]
        words += [f"{key} {value}" for key, value in row.items() if key not in ("model", "plan")]
    return file_name(words)


def file_name(words: Iterable[str]) -> str:
    """The words as one name that a file may have."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(words)).strip("-.")


def model_name(ref: str) -> str:
    """A model's name where it is given as a catalog name, a directory or a config.json."""
    path = Path(ref)
    return path.parent.name if path.name == "config.json" else path.name


# --- Before the runs


def _foresee_all(
    cases: Sequence[Case], machine: HardwareProfile, progress: Progress
) -> tuple[list[Foreseen], list[Failure]]:
    """What is foreseen for the cases that can be planned, and why the others can't."""
    foreseen: list[Foreseen] = []
    failures: list[Failure] = []
    for done, case in enumerate(cases):
        progress(done, len(cases), f"planning {case.name}")
        try:
            foreseen.append(_foresee(case, machine))
        except SlidetuneError as error:
            failures.append(Failure(case.name, str(error)))
    return foreseen, failures


def _foresee(case: Case, machine: HardwareProfile) -> Foreseen:
    """The case's plan and prediction. Raises SlidetuneError for a plan that can't be, or doesn't fit."""
    here = adapted(machine, ram_gib=case.ram_gib, gpu_memory_gib=case.gpu_memory_gib, kernels=case.kernels)
    if case.plan is not None:
        plan = read_plan(case.plan)
        if case.gpu_memory_gib is not None:
            plan = dataclasses.replace(plan, gpu_memory_gib=case.gpu_memory_gib)
    else:
        wanted = {key: case.knobs[key] for key in ("seq_len", "clip_norm") if key in case.knobs}
        plan = api.plan(case.model, here, batch=case.batch, **wanted).plan
    plan = _with_knobs(plan, case.knobs)
    prediction = api.simulate(plan, here, more=False).prediction
    return Foreseen(case=case, plan=plan, kernels=here.gpu.kernels, prediction=prediction)


def _whole_batch(batch: int | None, knobs: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
    """The sequences of a step and the knobs that make them: two of batch, micro_batch and accumulation give the third.

    Raises SlidetuneError where they don't agree.
    """
    micro, times = knobs.get("micro_batch"), knobs.get("accumulation")
    if micro and times:
        batch = batch or micro * times
    elif batch and (micro or times):
        micro, times = micro or batch // times, times or batch // micro
    else:
        return batch, dict(knobs)
    if batch != micro * times:
        raise SlidetuneError(f"micro_batch ({micro}) times accumulation ({times}) is not the batch ({batch}).")
    return batch, {**knobs, "micro_batch": micro, "accumulation": times}


def _with_knobs(plan: Plan, knobs: Mapping[str, Any]) -> Plan:
    """The plan with some knobs exchanged; of a group such as activations, with those that are named."""
    fields = files.dump(plan)
    for key, value in knobs.items():
        fields[key] = fields[key] | value if isinstance(value, dict) else value
    if "window" in knobs and "prefetch" not in knobs:
        fields["prefetch"] = min(plan.prefetch, max(0, knobs["window"] - 1))
    return _checked(Plan, fields)


def _is_recorded(path: Path, one: Foreseen) -> bool:
    """Whether the same plan's run is there already."""
    if not path.exists():
        return False
    run = load_run(path)
    return (run.plan, run.kernels) == (one.plan, one.kernels)


def _write_predictions(directory: Path, foreseen: Sequence[Foreseen], waiting: set[str]) -> None:
    """Keep what is foreseen for the runs to come. What was foreseen for runs already made stays as it was then."""
    path = directory / PREDICTIONS
    before = {one["name"]: one for one in json.loads(path.read_text(encoding="utf-8"))} if path.exists() else {}
    now = {one.case.name: one.as_dict() for one in foreseen if one.case.name in waiting or one.case.name not in before}
    _write(path, list((before | now).values()))


def _write_failures(directory: Path, failures: Sequence[Failure]) -> None:
    _write(directory / FAILURES, [dataclasses.asdict(failure) for failure in failures])


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


# --- The runs


def run_apart(
    plan: Plan,
    kernels: str,
    record: Path,
    *,
    profile: str | Path,
    steps: int,
    device: str | None,
    nvme_dir: str | Path | None,
    seed: int,
    timeout_s: float | None = None,
) -> str:
    """Run a plan in a process of its own and record it; returns what went wrong, or nothing. See `validate`.

    After `timeout_s` the process is ended.
    """
    how = {"steps": steps, "device": device, "nvme_dir": nvme_dir, "seed": seed}
    return apart.run(_record, plan, kernels, record, profile, how, timeout_s=timeout_s).error


def _record(plan: Plan, kernels: str, record: Path, profile: str | Path, how: Mapping[str, Any]) -> None:
    run = run_recorded(plan, kernels, name=run_name(record), **how).run
    save_run(record, run, load_profile(profile), Path(profile).stem)
