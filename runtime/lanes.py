"""Lanes: one worker thread each, and on CUDA one stream each for the GPU's and the link's lanes.

A lane runs its tasks in the schedule's order, step after step. Steps may overlap: a step is submitted while lanes
still work on the one before. Other schedules may be run by the same lanes, on the same threads and streams and so
within the same memory: a `Course` each. Steps of two courses never overlap.

What "finished" means depends on who asks. On a stream a task is *passed* once it has been launched and its event
recorded; another stream waits for the event, so launching never waits for the GPU. A host-side lane (Adam, NVMe)
waits for the event itself, since it touches memory the stream writes. On the CPU every lane is host-side.

Invariants: `passed` of a lane only grows while its course is followed; a task runs once all it waits for has passed;
after a failure or a stop no further task starts, and every wait ends.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from slidetune.errors import SlidetuneError
from slidetune.schedule import D2H, GPU, H2D, Schedule

if TYPE_CHECKING:
    from slidetune.runtime.steps import Step

STREAM_LANES = (GPU, H2D, D2H)


class TaskFailed(SlidetuneError):
    """A task of a step failed; `lane` and `task` (in words) say which, `__cause__` why."""

    def __init__(self, lane: str, task: str, cause: BaseException) -> None:
        reason = str(cause) or type(cause).__name__
        super().__init__(f"lane {lane}, task {task}: {type(cause).__name__}: {reason}")
        self.lane, self.task = lane, task


def _finish(event: Any) -> None:
    """Wait for an event; one that has passed is not worth the sleep that waiting is."""
    if not event.query():
        event.synchronize()


class _Stopped(Exception):
    """Ends a worker whose lane is told to stop."""


class _Lane:
    """A lane's queue and how far it has come. `passed` counts tasks since the course's first step."""

    def __init__(self, name: str, tasks: list[int], stream: Any) -> None:
        self.name, self.tasks, self.count = name, tasks, len(tasks)
        self.passed = 0
        self.moved = threading.Condition()
        self.waits: list[list[tuple[_Lane, int]]] = []
        # Farthest point of each other lane this one has waited for already: streams are ordered.
        self.seen: dict[str, int] = {}
        self.stream = stream
        # Events of the tasks that other lanes, or the caller, wait for; two sets, since an event is recorded anew only
        # two steps later.
        self.events: dict[int, Any] = {}

    def watch(self, position: int) -> None:
        """Have an event recorded after the task at a position."""
        if self.stream is not None:
            for at in (position, position + self.count):
                self.events.setdefault(at, torch.cuda.Event(blocking=True))

    def event(self, passed: int) -> Any:
        """The event of the task that made `passed` so large, None if nobody was to wait for it."""
        return self.events.get((passed - 1) % (2 * self.count))


class Course:
    """A schedule as the lanes run it: each lane's queue and what its tasks wait for."""

    def __init__(
        self,
        schedule: Schedule,
        operations: Sequence[Callable[[Step], None]],
        streams: Mapping[str, Any],
        awaited: Sequence[int],
    ) -> None:
        self.schedule, self.operations = schedule, operations
        self.lanes = {
            name: _Lane(name, tasks, streams.get(name)) for name, tasks in schedule.lane_tasks().items() if tasks
        }
        self.submitted = 0
        """Steps since the lanes turned to it."""
        self.place = {
            task: (lane, position) for lane in self.lanes.values() for position, task in enumerate(lane.tasks)
        }
        for lane in self.lanes.values():
            lane.waits = [self._waits(lane, task) for task in lane.tasks]
        for lane in self.lanes.values():
            lane.watch(lane.count - 1)
            for other, offset in (wait for waits in lane.waits for wait in waits):
                other.watch((offset - 1) % other.count)
        for task in awaited:
            lane, position = self.place[task]
            lane.watch(position)

    def begin(self) -> None:
        """Count from the start again; all that was submitted must have finished."""
        self.submitted = 0
        for lane in self.lanes.values():
            lane.passed = 0
            lane.seen.clear()

    def describe(self, task: int) -> str:
        """A task in words: "adam of unit 3, chunk 1"."""
        found = self.schedule.tasks[task]
        words = f"{found.work.op} of unit {found.unit}"
        if found.micro_batch >= 0:
            words += f", micro-batch {found.micro_batch}"
        if found.chunk >= 0:
            words += f", chunk {found.chunk}"
        return words

    def _waits(self, lane: _Lane, task: int) -> list[tuple[_Lane, int]]:
        """Per other lane, how far it must have come: the last of the tasks waited for, since lanes are in order.
        Counted from the start of the step; 0 or less is in the step before."""
        farthest: dict[str, int] = {}
        found = self.schedule.tasks[task]
        for deps, back in ((found.after, 0), (found.after_previous, 1)):
            for dep in deps:
                other, position = self.place[dep]
                if other is not lane:
                    offset = position + 1 - back * other.count
                    farthest[other.name] = max(farthest.get(other.name, offset), offset)
        return [(self.lanes[name], offset) for name, offset in farthest.items()]


class Lanes:
    """Runs `operations[i](step)` for every task i of the schedule, for every step submitted.

    `Step` objects are handed through as they are; with `step.times` set to a list, start and end of each task are
    written there.
    """

    def __init__(
        self,
        schedule: Schedule,
        operations: Sequence[Callable[[Step], None]],
        device: torch.device,
        awaited: Sequence[int] = (),
    ) -> None:
        """`awaited`: tasks that `wait` will be called for; each lane's last one always is."""
        self.device = device
        on_streams = STREAM_LANES if device.type == "cuda" else ()
        self._streams = {name: torch.cuda.Stream(device) for name in on_streams}
        self.failure: TaskFailed | None = None
        self._stopping = False
        self._courses = [Course(schedule, operations, self._streams, awaited)]
        self._course = self._courses[0]
        # Each step with its course and its number in it.
        self._steps: list[tuple[Course, int, Step]] = []
        self._clock: tuple[Any, float] = (None, 0.0)
        self._forgotten = 0
        # Per lane, how many steps it has left behind, of all courses.
        self._left = dict.fromkeys(self._course.lanes, 0)
        self._submitted = threading.Condition()
        self._intra_op_threads = torch.get_num_threads()
        self._threads = [
            threading.Thread(target=self._work, args=(name,), name=f"slidetune {name}", daemon=True)
            for name in self._course.lanes
        ]
        for thread in self._threads:
            thread.start()

    def add(
        self, schedule: Schedule, operations: Sequence[Callable[[Step], None]], awaited: Sequence[int] = ()
    ) -> Course:
        """Another schedule for steps to follow; it may use the lanes that the first one uses."""
        course = Course(schedule, operations, self._streams, awaited)
        foreign = course.lanes.keys() - self._courses[0].lanes.keys()
        if foreign:
            raise ValueError(f"no such lanes: {', '.join(sorted(foreign))}")
        self._courses.append(course)
        return course

    def submit(self, step: Step, course: Course | None = None) -> int:
        """Queue a step of a course, the first one if none is said; returns its sequence number in it.

        Waits for all steps before it where they were of another course: their tasks don't wait for each other. Raises
        TaskFailed if a task has failed before.
        """
        course = course or self._courses[0]
        self._raise_failure()
        if self._stopping:
            raise SlidetuneError("the lanes have stopped; no further step can run.")
        if course is not self._course:
            self.drain()
            course.begin()
            self._course = course
        with self._submitted:
            sequence, course.submitted = course.submitted, course.submitted + 1
            self._steps.append((course, sequence, step))
            self._forget_old()
            self._submitted.notify_all()
            return sequence

    def wait(self, sequence: int, task: int) -> None:
        """Wait until a task of a step has finished, one of the course that was last submitted to. Raises TaskFailed as
        soon as any task of any lane has failed."""
        lane, position = self._course.place[task]
        target = sequence * lane.count + position + 1
        try:
            self._await(lane, target)
        except _Stopped:
            self._raise_failure()
            raise SlidetuneError("the lanes were stopped before the step was done.") from None
        if lane.stream is not None:
            _finish(lane.event(target))

    def drain(self) -> None:
        """Wait until everything submitted has finished. Raises TaskFailed as `wait` does."""
        last = self._course.submitted - 1
        for lane in self._course.lanes.values():
            if last >= 0:
                self.wait(last, lane.tasks[-1])

    def seconds(self, times: list) -> list[tuple[float, float]]:
        """A finished step's noted times as seconds of `time.perf_counter`."""
        return [tuple(self._seconds(moment) for moment in pair) for pair in times]

    def stop(self) -> None:
        """End all workers between two tasks and join them; may be called again."""
        self._halt()
        for thread in self._threads:
            # The garbage collector may drop a trainer in any thread, one of these included.
            if thread is not threading.current_thread():
                thread.join()

    def let_go(self) -> None:
        """Stop for good, and drop the operations with all that they hold."""
        self.stop()
        for course in self._courses:
            course.operations = ()

    def _seconds(self, moment: Any) -> float:
        if isinstance(moment, float):
            return moment
        return self._clock[1] + self._clock[0].elapsed_time(moment) * 1e-3

    def set_clock(self) -> None:
        """Tie the device's clock to the host's, from time to time: events count from here in 32 bits."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            event.synchronize()
            self._clock = (event, time.perf_counter())

    # ---- workers ------------------------------------------------------------------------------------------

    def _work(self, name: str) -> None:
        with contextlib.ExitStack() as stack:
            course = self._courses[0]
            task = course.lanes[name].tasks[0]
            try:
                # A new thread has its own setting; results must not depend on which thread computes.
                torch.set_num_threads(self._intra_op_threads)
                # Backward passes run in this thread: handing each to autograd's own and back is two wake-ups, and those
                # take milliseconds where Adam keeps the cores busy.
                torch.autograd.set_multithreading_enabled(False)
                if name in self._streams:
                    stack.enter_context(torch.cuda.stream(self._streams[name]))
                while True:
                    course, sequence, step = self._next(name)
                    lane = course.lanes.get(name)
                    for position, task in enumerate(lane.tasks if lane else ()):
                        self._wait_for_others(lane, position, sequence)
                        self._run(course, lane, task, step)
                    self._left[name] += 1
            except _Stopped:
                pass
            except BaseException as error:
                self._fail(name, course.describe(task), error)

    def _run(self, course: Course, lane: _Lane, task: int, step: Step) -> None:
        times = step.times
        if lane.stream is None:
            start = time.perf_counter()
            course.operations[task](step)
            if times is not None:
                times[task] = (start, time.perf_counter())
        else:
            start = None
            if times is not None:
                start = torch.cuda.Event(enable_timing=True)
                start.record(lane.stream)
            course.operations[task](step)
            if times is not None:
                # Before the event that others wait for: an idle stream would date it when the host comes to it.
                end = torch.cuda.Event(enable_timing=True)
                end.record(lane.stream)
                times[task] = (start, end)
            event = lane.event(lane.passed + 1)
            if event is not None:
                event.record(lane.stream)
        with lane.moved:
            lane.passed += 1
            lane.moved.notify_all()

    def _next(self, name: str) -> tuple[Course, int, Step]:
        """The step that a lane has come to."""
        with self._submitted:
            while self._left[name] >= self._forgotten + len(self._steps):
                if self._stopping:
                    raise _Stopped
                self._submitted.wait()
            return self._steps[self._left[name] - self._forgotten]

    def _wait_for_others(self, lane: _Lane, position: int, sequence: int) -> None:
        for other, offset in lane.waits[position]:
            target = sequence * other.count + offset
            if target <= lane.seen.get(other.name, 0):
                continue
            self._await(other, target)
            lane.seen[other.name] = target
            if other.stream is not None:
                event = other.event(target)
                if lane.stream is not None:
                    lane.stream.wait_event(event)
                else:
                    _finish(event)
        if self._stopping:
            raise _Stopped

    def _await(self, lane: _Lane, target: int) -> None:
        with lane.moved:
            while lane.passed < target:
                if self._stopping:
                    raise _Stopped
                lane.moved.wait()

    # ---- ends ---------------------------------------------------------------------------------------------

    def _fail(self, lane: str, task: str, error: BaseException) -> None:
        if self.failure is None:
            failure = TaskFailed(lane, task, error)
            failure.__cause__ = error
            self.failure = failure
        self._halt()

    def _halt(self) -> None:
        self._stopping = True
        lanes = [lane for course in self._courses for lane in course.lanes.values()]
        for condition in (self._submitted, *(lane.moved for lane in lanes)):
            with condition:
                condition.notify_all()

    def _raise_failure(self) -> None:
        if self.failure is not None:
            self.stop()
            raise self.failure

    def _forget_old(self) -> None:
        """Let go of steps that every lane has left behind, but for two: their GPU work may still be under way."""
        done = min(self._left.values())
        while self._forgotten < done and len(self._steps) > 2:
            _, _, step = self._steps.pop(0)
            # Each step knows the one before: the chain of all of them would stay alive.
            step.owed = None
            self._forgotten += 1
