"""Lanes on their own: order, dependencies over steps, overlap, and the ways to an end."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings

torch = pytest.importorskip("torch")

from slidetune.builder import build
from slidetune.errors import SlidetuneError
from slidetune.models import load_model
from slidetune.plans import Plan
from slidetune.runtime.lanes import Lanes, TaskFailed
from slidetune.runtime.steps import Step
from slidetune.schedule import CPU_ADAM, GPU, H2D, Schedule, Task, Work

from ..strategies import models_and_plans

CPU = torch.device("cpu")
pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_threads_left")]


def schedule_of(*tasks):
    """(lane, after, after_previous) a task."""
    return Schedule(
        name="",
        lanes=(GPU, H2D, CPU_ADAM),
        tasks=tuple(
            Task(Work(op="op", lane=lane), i, -1, -1, after, prev) for i, (lane, after, prev) in enumerate(tasks)
        ),
        pools=(),
        holds=(),
        tokens=1,
    )


PIPELINE = schedule_of((H2D, (), (1,)), (GPU, (0,), ()), (CPU_ADAM, (1,), ()), (GPU, (), (2,)))


def run_all(schedule, operations, steps):
    lanes = Lanes(schedule, operations, CPU)
    try:
        for number in range(1, steps + 1):
            lanes.submit(Step(number=number))
        lanes.drain()
    finally:
        lanes.stop()


class Log:
    """Operations that note (step, task, start or end), with a pause between."""

    def __init__(self, schedule, pause_s=0.0):
        self.events, self.lock = [], threading.Lock()
        self.operations = [self.operation(i, pause_s) for i in range(len(schedule.tasks))]

    def operation(self, task, pause_s):
        def run(step):
            self.note(step.number, task, "start")
            time.sleep(pause_s)
            self.note(step.number, task, "end")

        return run

    def note(self, *event):
        with self.lock:
            self.events.append(event)

    def check(self, schedule, steps):
        at = {event: i for i, event in enumerate(self.events)}
        assert len(at) == 2 * steps * len(schedule.tasks)
        for step in range(1, steps + 1):
            for index, task in enumerate(schedule.tasks):
                for dep in task.after:
                    assert at[step, dep, "end"] < at[step, index, "start"]
                for dep in task.after_previous if step > 1 else ():
                    assert at[step - 1, dep, "end"] < at[step, index, "start"]
        for tasks in schedule.lane_tasks().values():
            order = [(step, task) for step in range(1, steps + 1) for task in tasks]
            assert [event[:2] for event in self.events if event[1] in tasks and event[2] == "start"] == order


def test_steps_overlap_and_keep_their_order():
    log = Log(PIPELINE, pause_s=0.02)
    run_all(PIPELINE, log.operations, 3)
    log.check(PIPELINE, 3)
    # The next step's upload goes on beside this step's Adam.
    at = {event: i for i, event in enumerate(log.events)}
    assert at[2, 0, "start"] < at[1, 2, "end"]


@given(models_and_plans(max_layers=4, max_accumulation=2))
@settings(max_examples=20, deadline=None)
def test_any_schedule_runs_in_an_order_it_allows(case):
    schedule = build(*case)
    log = Log(schedule)
    run_all(schedule, log.operations, 3)
    log.check(schedule, 3)


SHORT = schedule_of((H2D, (), (1,)), (GPU, (0,), ()))


def test_steps_of_another_course_begin_when_all_before_have_ended():
    """Also on lanes of which the other course has no tasks."""
    log, other = Log(PIPELINE, pause_s=0.005), Log(SHORT, pause_s=0.005)
    lanes = Lanes(PIPELINE, log.operations, CPU)
    short = lanes.add(SHORT, other.operations, awaited=[1])
    other.events = log.events
    turns = [None, short, short, None, None, short, None]
    for number, course in enumerate(turns, 1):
        sequence = lanes.submit(Step(number=number), course)
    lanes.wait(sequence, 3)
    lanes.drain()
    lanes.stop()
    numbers = [number for number, *_ in log.events]
    for number in range(1, len(turns)):
        if turns[number] is not turns[number - 1]:
            assert max(i for i, n in enumerate(numbers) if n <= number) < numbers.index(number + 1)
    assert [numbers.count(n + 1) for n, course in enumerate(turns)] == [4 if course else 8 for course in turns]


def test_a_course_may_not_use_other_lanes():
    lanes = Lanes(SHORT, [lambda step: None] * 2, CPU)
    with pytest.raises(ValueError, match="cpu_adam"):
        lanes.add(PIPELINE, [lambda step: None] * 4)
    lanes.stop()


def test_a_failure_in_another_course_ends_all_lanes():
    def fail(step):
        raise ValueError("no such thing")

    lanes = Lanes(PIPELINE, Log(PIPELINE).operations, CPU)
    short = lanes.add(SHORT, [lambda step: None, fail])
    lanes.submit(Step(number=1))
    lanes.submit(Step(number=2), short)
    with pytest.raises(TaskFailed, match="task op of unit 1: ValueError: no such thing"):
        lanes.drain()
    with pytest.raises(TaskFailed):
        lanes.submit(Step(number=3))
    assert not any(thread.is_alive() for thread in lanes._threads)


@pytest.mark.parametrize("task", range(4))
def test_a_failure_ends_all_lanes(task):
    operations = Log(PIPELINE).operations
    error = ValueError("no such thing")

    def fail(step):
        if step.number == 2:
            raise error

    operations[task] = fail
    lanes = Lanes(PIPELINE, operations, CPU)
    for number in (1, 2):
        lanes.submit(Step(number=number))
    with pytest.raises(TaskFailed, match="no such thing") as caught:
        lanes.drain()
    assert caught.value.__cause__ is error
    assert f"op of unit {task}" in caught.value.task
    with pytest.raises(TaskFailed):
        lanes.submit(Step(number=3))
    assert not any(thread.is_alive() for thread in lanes._threads)


def test_a_stop_lets_running_tasks_end_and_starts_no_other():
    log = Log(PIPELINE, pause_s=0.05)
    lanes = Lanes(PIPELINE, log.operations, CPU)
    for number in range(1, 50):
        lanes.submit(Step(number=number))
    time.sleep(0.12)
    lanes.stop()
    assert sum(e[2] == "start" for e in log.events) == sum(e[2] == "end" for e in log.events) < 100
    with pytest.raises(SlidetuneError, match="stopped"):
        lanes.submit(Step(number=50))
    with pytest.raises(SlidetuneError, match="stopped"):
        lanes.drain()
    lanes.stop()


def test_steps_left_behind_are_let_go_of():
    lanes = Lanes(PIPELINE, Log(PIPELINE).operations, CPU)
    for number in range(1, 40):
        lanes.wait(lanes.submit(Step(number=number)), 3)
    lanes.drain()
    lanes.submit(Step(number=40))
    lanes.drain()
    assert len(lanes._steps) <= 4
    lanes.stop()


def test_workers_compute_with_the_callers_number_of_threads():
    found = []
    lanes = Lanes(PIPELINE, [lambda step: found.append(torch.get_num_threads())] * 4, CPU)
    lanes.submit(Step(number=1))
    lanes.drain()
    lanes.stop()
    assert set(found) == {torch.get_num_threads()}


def test_the_cost_of_a_task():
    """The interpreter may take 100 microseconds a task; it takes about 6."""
    model = load_model("llama-3.1-8b")
    schedule = build(model, Plan(model=model.name, accumulation=2, optimizer_nvme=8))
    lanes = Lanes(schedule, [lambda step: None] * len(schedule.tasks), CPU)
    lanes.submit(Step(number=1))
    lanes.drain()
    began = time.process_time()
    for number in range(2, 6):
        lanes.submit(Step(number=number))
    lanes.drain()
    seconds = time.process_time() - began
    lanes.stop()
    assert seconds / (4 * len(schedule.tasks)) < 100e-6
