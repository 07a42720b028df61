"""From a measured step back to the profile: which figures were wrong, and by how much.

Each figure has tasks that speak for it: uploads with the machine to themselves for the upload rate, Adam beside
downloads for what a download takes of DRAM. It is moved until the profile gives those tasks the time they took, beside
what really ran beside them (`replay`). A figure for which nothing speaks stays.

    profile, lessons = refit(profile, validate(plan, profile))
    for lesson in lessons:
        print(lesson.text)
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slidetune.builder import EMBEDDING
from slidetune.gpu_time import gpu_seconds
from slidetune.hardware import Figure, HardwareProfile, KernelTime
from slidetune.schedule import CPU_ADAM, D2H, GPU, H2D, NVME_READ, NVME_WRITE
from slidetune.tuner.replay import Group, Judge, Ran, Replay
from slidetune.units import GB

if TYPE_CHECKING:
    from slidetune.traces.validation import Validation

LARGEST_MOVE = 2.0
"""Factor by which a figure may change at once: one run may be odd."""
# Deviations below this are no reason to change anything, nor is anything within two standard errors.
_TOLERANCE = 0.005
_STANDARD_ERRORS = 2.0
# Tasks that take less of the step than this say nothing about it, and less of their lane's time, nothing about that.
_LEAST_OF_STEP, _LEAST_OF_LANE = 0.001, 0.05
_MOVES = 16
_HALVINGS = 11
# An end of a figure's range is taken if it explains at least this share of a deviation.
_EXPLAINED = 0.2

_GPU_KINDS = {
    "forward": "GPU forward passes",
    "recompute": "GPU recomputation",
    "backward": "GPU backward passes",
    "head": "GPU head and loss",
}
_LANES = {H2D: "uploads", D2H: "downloads", CPU_ADAM: "CPU Adam", NVME_READ: "NVMe reads", NVME_WRITE: "NVMe writes"}
# Rows of the embedding are gathered, summed and updated here and there: their time is not the link's, nor DRAM's.
_HOST, _DRIVE = frozenset({H2D, D2H, CPU_ADAM}), frozenset({NVME_READ, NVME_WRITE})
_SCATTERED = frozenset({"adam rows", "adam other rows", "adam rest", "gather", "store rows"})


@dataclass(frozen=True, slots=True)
class Change:
    """A figure that was moved, by its path in the profile; `gpu.times` for measured GPU tasks, in seconds."""

    figure: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a run taught about one kind of task."""

    what: str
    """Such as "CPU Adam beside downloads"."""
    ratio: float
    """Measured over profiled seconds, given what ran beside these tasks."""
    seconds: float
    """Of these tasks, a step."""
    change: Change

    @property
    def text(self) -> str:
        """In words."""
        share = abs(self.ratio - 1.0)
        if share < _TOLERANCE:
            return f"{self.what} took as long as profiled, once the rest is right"
        return f"{self.what} took {share:.0%} {'longer' if self.ratio > 1 else 'less time'} than profiled"

    @property
    def effect_s(self) -> float:
        """Seconds a step by which the profile was off."""
        return abs(self.seconds - self.seconds / self.ratio)


def refit(profile: HardwareProfile, found: Validation) -> tuple[HardwareProfile, tuple[Lesson, ...]]:
    """The profile with the figures that a run shows to be wrong, and what it showed, the weightiest first.

    The same profile and no lessons if it was right, or if the run's tasks are not known.
    """
    if not found.rows:
        return profile, ()
    replay = Replay(found.prediction.schedule, found.rows, found.typical_step_s)
    # What ran decides which kernels' times count, whatever the profile's own choice.
    ran_with = dataclasses.replace(profile, gpu=dataclasses.replace(profile.gpu, kernels=found.run.kernels))
    figures = _Figures(ran_with, replay)
    figures.move()
    gpu_times, gpu_lessons = _gpu_times(ran_with, found, replay)
    lessons = sorted([*figures.lessons(), *gpu_lessons], key=lambda lesson: -lesson.effect_s)
    if not lessons:
        return profile, ()
    fitted = figures.named(_source(found))
    gpu = dataclasses.replace(fitted.gpu, times=gpu_times, kernels=profile.gpu.kernels)
    return dataclasses.replace(fitted, gpu=gpu), tuple(lessons)


def carried_over(before: HardwareProfile, after: HardwareProfile, onto: HardwareProfile) -> HardwareProfile:
    """What was learned between `before` and `after`, put into another description of the same machine: the whole one,
    where `before` was it with less memory to use."""
    for path, figure in after.figures():
        if figure != before.figure(path) and any(path == there for there, _ in onto.figures()):
            onto = onto.replaced(path, figure)
    return dataclasses.replace(onto, gpu=dataclasses.replace(onto.gpu, times=after.gpu.times))


# --- Figures of link, host and drive


@dataclass(frozen=True, slots=True)
class _Clue:
    """Tasks that speak for a figure."""

    figure: str
    what: str
    groups: Sequence[Group]
    """By lane."""

    @property
    def seconds(self) -> float:
        return sum(group.seconds for group in self.groups)


class _Figures:
    """A profile being moved towards a measured step, one figure at a time: the one that explains most of what the
    profile gets wrong, until none explains any more."""

    def __init__(self, profile: HardwareProfile, replay: Replay) -> None:
        self.before = self.profile = profile
        self.replay = replay
        self.judge_before = Judge(replay, profile)
        self.moved: dict[str, _Clue] = {}
        streamed = [
            task
            for task in replay.tasks
            if task.unit != EMBEDDING and task.work.op not in _SCATTERED and task.seconds > 0
        ]
        self._by_lane = {lane: [task for task in streamed if task.work.lane == lane] for lane in _LANES}
        self._all = self._kinds_of(streamed)
        self._clues = [clue for clue in self._find_clues() if self._counts(clue)]
        self._noise = {id(clue): _noise(clue.groups, self.judge_before) for clue in self._clues}

    def move(self) -> None:
        """Move what the step says should move, until it says no more."""
        for _ in range(_MOVES):
            now = self._misfit_s(self.profile)
            tried = [(clue, moved) for clue in self._clues if (moved := self._followed(clue)) is not None]
            if not tried:
                break
            clue, moved = min(tried, key=lambda pair: self._misfit_s(pair[1]))
            if now - self._misfit_s(moved) < _LEAST_OF_STEP * self.replay.step_s:
                break
            self.profile = moved
            self.moved[clue.figure] = clue

    def lessons(self) -> list[Lesson]:
        return [
            Lesson(
                clue.what,
                math.exp(_deviation(clue.groups, self.judge_before)),
                clue.seconds,
                Change(path, _value(self.before, path), _value(self.profile, path)),
            )
            for path, clue in self.moved.items()
        ]

    def named(self, source: str) -> HardwareProfile:
        """The profile with the source of each moved figure."""
        profile = self.profile
        for path in self.moved:
            old = self.before.figure(path)
            value = float(f"{_value(profile, path):.5g}")
            profile = profile.replaced(path, Figure(value, "measured", f"{source}; was {old.value:.4g} ({old.kind})"))
        return profile

    def _find_clues(self) -> Iterator[_Clue]:
        link = {H2D: "link.h2d_gbs", D2H: "link.d2h_gbs"}
        small, large = {}, {}
        for lane in link:
            small[lane] = [task for task in self._by_lane[lane] if self._is_small(task)]
            large[lane] = [task for task in self._by_lane[lane] if not self._is_small(task)]
        yield _clue("link.latency_us", "small transfers", small.values())
        yield from self._two_ways(large, link, "link.duplex_gbs", "transfers both ways")
        drive = {NVME_READ: "nvme.read_gbs", NVME_WRITE: "nvme.write_gbs"}
        tasks = {lane: self._by_lane[lane] for lane in drive}
        yield from self._two_ways(tasks, drive, "nvme.mixed_share", "NVMe reads and writes together")
        yield from self._adam()

    def _two_ways(self, tasks: dict[str, list[Ran]], rates: dict[str, str], figure: str, what: str) -> Iterator[_Clue]:
        """Two lanes with a rate each, and what they reach together."""
        for lane, path in rates.items():
            yield self._rate(path, tasks[lane])
        yield _clue(figure, what, [_beside(tasks[lane], set(tasks) - {lane}) for lane in tasks])

    def _adam(self) -> Iterator[_Clue]:
        tasks = self._by_lane[CPU_ADAM]
        # Which of the two binds need not be what the profile says.
        for path in ("host.dram_gbs", "host.adam_gparams_per_core"):
            yield self._rate(path, tasks)
        for lane, path in ((H2D, "host.upload_dram_weight"), (D2H, "host.download_dram_weight")):
            beside = _beside(tasks, {lane}) or _beside(tasks, {H2D, D2H})
            yield _clue(path, f"CPU Adam beside {_LANES[lane]}", [beside])
        # DRAM that is short is shared out: who loses more than the profile says has less of a say.
        for lane, path in ((H2D, "host.upload_priority"), (D2H, "host.download_priority")):
            yield _clue(path, f"{_LANES[lane]} beside CPU Adam", [_beside(self._by_lane[lane], {CPU_ADAM})])

    def _rate(self, path: str, tasks: list[Ran]) -> _Clue:
        """A lane's own rate: its tasks with the machine to themselves tell, or all where none ever has it."""
        alone = _beside(tasks, set())
        if sum(task.seconds for task in alone) > _LEAST_OF_LANE * sum(task.seconds for task in tasks):
            return _clue(path, f"{_LANES[alone[0].work.lane]} alone", [alone])
        return _clue(path, _LANES[tasks[0].work.lane] if tasks else "", [tasks])

    def _is_small(self, task: Ran) -> bool:
        """Whether a transfer's fixed cost is most of its time."""
        link = self.before.link
        rate = link.h2d_gbs if task.work.lane == H2D else link.d2h_gbs
        return task.work.bytes / (rate.value * GB) < link.latency_us.value * 1e-6

    def _kinds_of(self, tasks: Iterable[Ran]) -> list[Group]:
        kinds: dict[tuple, list[Ran]] = {}
        for task in tasks:
            if task.work.lane in _LANES:
                small = task.work.lane in (H2D, D2H) and self._is_small(task)
                kinds.setdefault((task.work.lane, small, _company(task)), []).append(task)
        return [Group(kind) for kind in kinds.values()]

    def _counts(self, clue: _Clue) -> bool:
        return clue.seconds > _LEAST_OF_STEP * self.replay.step_s

    def _misfit_s(self, profile: HardwareProfile) -> float:
        """Seconds by which a profile is off, kind of task by kind of task."""
        judge = Judge(self.replay, profile)
        return sum(group.seconds * abs(math.log(judge.excess(group))) for group in self._all)

    def _followed(self, clue: _Clue) -> HardwareProfile | None:
        """The profile with a figure moved until its tasks took the time it gives them; None if they did already."""

        def off(factor: float) -> float:
            return _deviation(clue.groups, Judge(self.replay, self.profile.scaled(clue.figure, factor)))

        now = off(1.0)
        if abs(now) <= max(_TOLERANCE, self._noise[id(clue)]):
            return None
        so_far = _value(self.profile, clue.figure) / _value(self.before, clue.figure)
        factor = _balanced(off, now, (1.0 / LARGEST_MOVE / so_far, LARGEST_MOVE / so_far))
        return None if factor == 1.0 else self.profile.scaled(clue.figure, factor)


def _clue(figure: str, what: str, groups: Iterable[Sequence[Ran]]) -> _Clue:
    return _Clue(figure, what, [Group(group) for group in groups if group])


def _beside(tasks: Iterable[Ran], lanes: set[str]) -> list[Ran]:
    """Of these tasks, those that ran beside these lanes and no others that may hold them back."""
    return [task for task in tasks if _company(task) == lanes]


def _company(task: Ran) -> frozenset[str]:
    """The lanes beside a task that may hold it back: the GPU's does not, and a drive holds back only itself."""
    return task.beside & (_DRIVE if task.work.lane in _DRIVE else _HOST)


def _deviation(groups: Sequence[Group], judge: Judge) -> float:
    """Logarithm of measured over profiled seconds, of all groups together."""
    seconds = sum(group.seconds for group in groups)
    return math.log(seconds / sum(group.seconds / judge.excess(group) for group in groups))


def _noise(groups: Sequence[Group], judge: Judge) -> float:
    """By how much chance alone may make the tasks deviate."""
    ratios = [judge.excess(Group([task])) for group in groups for task in group.tasks]
    return _STANDARD_ERRORS * _spread(ratios) / math.sqrt(len(ratios))


def _balanced(off: Callable[[float], float], now: float, ends: Iterable[float]) -> float:
    """The factor nearest to 1 that takes the deviation away, or as much of it as any in the range can."""
    left, end = min((max(off(end) * math.copysign(1.0, now), 0.0), end) for end in ends)
    if left > 0:
        return end if left < (1.0 - _EXPLAINED) * abs(now) else 1.0
    near, far = 0.0, math.log(end)
    for _ in range(_HALVINGS):
        middle = (near + far) / 2
        if off(math.exp(middle)) * now > 0:
            near = middle
        else:
            far = middle
    return math.exp(far)


def _spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles over the median; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / middle if middle > 0 else 0.0


def _value(profile: HardwareProfile, path: str) -> float:
    return profile.figure(path).value


# --- GPU tasks


def _gpu_times(
    profile: HardwareProfile, found: Validation, replay: Replay
) -> tuple[tuple[KernelTime, ...], list[Lesson]]:
    """The profile's measured GPU tasks with those of this run in their places, and what was learned by kind."""
    judge = Judge(replay, profile)
    times = list(profile.gpu.times)
    lessons = []
    for op, what in _GPU_KINDS.items():
        tasks = [task for task in replay.tasks if task.work.lane == GPU and task.work.op == op and task.seconds > 0]
        new = []
        for number in {task.number: None for task in tasks}:
            group = Group([task for task in tasks if task.number == number])
            excess = judge.excess(group)
            if abs(math.log(excess)) > max(_TOLERANCE, _noise([group], judge)):
                seconds = judge.alone_s(number) * min(max(excess, 1.0 / LARGEST_MOVE), LARGEST_MOVE)
                new.append(_kernel_time(group, seconds, profile, found))
        if not new:
            continue
        places = {_place(time) for time in new}
        times = [time for time in times if _place(time) not in places] + new
        together = Group(tasks)
        ratio = judge.excess(together)
        change = Change("gpu.times", together.seconds / ratio, together.seconds)
        lessons.append(Lesson(what, ratio, together.seconds, change))
    return tuple(times), lessons


def _kernel_time(group: Group, seconds: float, profile: HardwareProfile, found: Validation) -> KernelTime:
    work, plan = group.tasks[0].work, found.run.plan
    return KernelTime(
        model=plan.model,
        kernels=found.run.kernels,
        op=work.op,
        micro_batch=plan.micro_batch,
        seq_len=plan.seq_len,
        flops=work.flops,
        traffic_bytes=work.traffic_bytes,
        launches=work.launches,
        seconds=float(f"{seconds:.5g}"),
        spread=round(_spread([task.seconds for task in group.tasks]), 4),
        model_s=float(f"{gpu_seconds(work, profile.gpu):.5g}"),
    )


def _place(time: KernelTime) -> tuple:
    """What tells a measured task from others."""
    return time.kernels, time.op, time.flops, time.traffic_bytes, time.launches


def _source(found: Validation) -> str:
    run, plan = found.run, found.run.plan
    return (
        f"refitted to a measured step of {plan.model}, {plan.micro_batch} x {plan.accumulation} sequences of "
        f"{plan.seq_len}, window {plan.window}, update {plan.update}; {run.date}"
    )
