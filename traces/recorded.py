"""Recorded runs: what a plan did on a machine, small enough to keep in git, complete enough to predict it again.

A run is one `<name>.json.gz`; the profile of its machine lies beside it, once for all runs that share it. Of the
tasks, one typical step is kept: the one nearest to the median step. Their names are not in the file, since the
schedule that the plan makes has them; a digest of it tells whether the schedule is still the same.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from slidetune import files
from slidetune.errors import BadFile
from slidetune.hardware import HardwareProfile
from slidetune.plans import Plan
from slidetune.schedule import GPU, Schedule
from slidetune.trace import TraceRow

RECORD_VERSION = 1
SUFFIX = ".json.gz"

_MICROSECONDS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSteps:
    """The steady steps of a run. Times in seconds where not named otherwise, sizes in bytes."""

    step_s: tuple[float, ...]
    """From one step's loss to the next one's; warm-up steps are left out."""
    losses: tuple[float, ...]
    """Of all steps, the warm-up's too."""
    peak_bytes: dict[str, int]
    """ram: the process's resident peak; on a GPU also gpu and page_locked."""
    nvme_written_bytes: int
    """A step."""
    tasks: str
    """Digest of the schedule whose tasks were timed."""
    adam_alone_s: float | None = None
    """Seconds that CPU Adam takes for a step's layers with nothing beside, right after the run and in its memory; None
    where it updates none from RAM, and in older records."""
    start_us: tuple[int, ...]
    """When each task of the typical step began, in the schedule's order; 0 is the GPU's end of the step before."""
    end_us: tuple[int, ...]

    @property
    def median_step_s(self) -> float:
        return statistics.median(self.step_s)

    def times(self) -> list[tuple[float, float]]:
        """Start and end of each task of the typical step, in seconds."""
        pairs = zip(self.start_us, self.end_us, strict=True)
        return [(start / _MICROSECONDS, end / _MICROSECONDS) for start, end in pairs]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """One run of a plan: what was run where, and what it measured."""

    name: str
    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    device: str
    """cuda or cpu."""
    kernels: Literal["eager", "liger"]
    plan: Plan
    measured: MeasuredSteps
    recomputes_whole: bool = True
    """Layers were recomputed with their last product, as all were before 26 November 2026."""
    profile: str = ""
    """File of the machine's profile, in the record's folder; empty before the run is saved."""
    version: Literal[1] = RECORD_VERSION


def digest(schedule: Schedule) -> str:
    """The same for schedules whose tasks have the same names in the same order."""
    names = ((t.work.op, t.work.lane, t.unit, t.micro_batch, t.chunk) for t in schedule.tasks)
    return hashlib.sha256(repr(list(names)).encode()).hexdigest()[:16]


def typical_step(schedule: Schedule, rows: Sequence[TraceRow], step_s: float) -> tuple[list[int], list[int]]:
    """Starts and ends, in microseconds by task, of one step of those that `rows` trace: the one whose length is
    nearest to `step_s`."""
    steps: dict[int, list[TraceRow]] = {}
    for row in rows:
        steps.setdefault(row.step, []).append(row)
    # Counted from the GPU's end of the step before, a step is as long as its own GPU's end is late.
    length_s = {step: max(row.end_s for row in of if row.lane == GPU) for step, of in steps.items()}
    chosen = min(steps, key=lambda step: abs(length_s[step] - step_s))
    by_task = {row.task: row for row in steps[chosen]}
    times = [(by_task[task].start_s, by_task[task].end_s) for task in range(len(schedule.tasks))]
    return [round(s * _MICROSECONDS) for s, _ in times], [round(e * _MICROSECONDS) for _, e in times]


def save_run(path: str | Path, run: RecordedRun, profile: HardwareProfile, profile_name: str) -> RecordedRun:
    """Write a run, and its machine's profile beside it; returns the run as written.

    The profile's file is `profile_name`.yaml, shared with other runs on the same machine as it is; where that name
    is taken by another profile, a digest of this one is added.
    """
    path = Path(path)
    run = dataclasses.replace(run, profile=_save_profile(path.parent, profile, profile_name))
    text = json.dumps(files.dump(run), separators=(",", ":"), allow_nan=False)
    unfinished = path.with_name(f"{path.name}.part")
    try:
        # No time stamp in the archive: the same run gives the same file. And never half a file.
        unfinished.write_bytes(gzip.compress(text.encode(), mtime=0))
        unfinished.replace(path)
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}.") from None
    return run


def load_run(path: str | Path) -> RecordedRun:
    """Read a run back. Raises `BadFile` for a file that holds none, or one of another version."""
    from pydantic import ValidationError

    path = Path(path)
    try:
        data = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError) as error:
        raise BadFile(f"{path}: no recorded run: {error}") from None
    version = data.get("version") if isinstance(data, Mapping) else None
    if version != RECORD_VERSION:
        raise BadFile(f"{path}: no recorded run of version {RECORD_VERSION}, which this slidetune reads.")
    try:
        return _adapter().validate_python([data])[0]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"][1:]))
        raise BadFile(f"{path}: {where}: {first['msg']}.") from None


def recorded_runs(directory: str | Path) -> list[Path]:
    """The files of the runs recorded in a folder, by name. Raises `BadFile` where there are none."""
    directory = Path(directory)
    found = sorted(directory.glob(f"*{SUFFIX}"))
    if not found:
        what = "no recorded runs (*.json.gz) in this folder" if directory.is_dir() else "no such folder"
        raise BadFile(f"{directory}: {what}.", "`slidetune validate PLAN --record DIR/NAME.json.gz` records one.")
    return found


def run_name(path: str | Path) -> str:
    """The name of the run that a file holds, or is to hold."""
    return Path(path).name.removesuffix(SUFFIX)


@cache
def _adapter() -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(list[RecordedRun], config=ConfigDict(extra="forbid", allow_inf_nan=False))


def _save_profile(directory: Path, profile: HardwareProfile, name: str) -> str:
    file = f"{name}.yaml"
    if (directory / file).exists() and files.read(directory / file, HardwareProfile) != profile:
        text = json.dumps(files.dump(profile), sort_keys=True)
        file = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
    if not (directory / file).exists():
        files.write(directory / file, profile)
    return file
