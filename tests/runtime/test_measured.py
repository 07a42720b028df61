"""The measured trace: every task of every recorded step once, in an order that the schedule allows."""

from __future__ import annotations

from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")

from slidetune.errors import SlidetuneError
from slidetune.plans import Plan
from slidetune.runtime.measured import Recorded, trace_rows
from slidetune.runtime.run import adam_alone_s
from slidetune.runtime.trainer import SlidingTrainer
from slidetune.schedule import GPU, H2D, Schedule, Task, Work
from slidetune.trace import to_frame

from ..slidetune.reference import SMALL_CONFIGS
from .reference import DEVICE, make_model, random_batches

SIZES = {"seq_len": 16, "micro_batch": 1, "chunk_bytes": 1 << 16, "adam_threads": 1}
CONFIG = SMALL_CONFIGS["llama"]


def traced(plan, steps, recorded, folder=None):
    with SlidingTrainer(make_model(CONFIG), plan, device=DEVICE, nvme_folder=folder, trace=recorded) as trainer:
        for batch in random_batches(CONFIG, plan, steps):
            trainer.step(batch)
        return trainer.schedule, trainer.trace


@pytest.mark.parametrize("update", ["backward", "forward"])
def test_every_task_after_what_it_waits_for(update, tmp_path):
    plan = Plan(model="llama", update=update, optimizer_nvme=2, accumulation=2, **SIZES)
    schedule, rows = traced(plan, 5, 4, tmp_path)
    assert sorted({row.step for row in rows}) == [2, 3, 4, 5]
    assert len(rows) == 4 * len(schedule.tasks)
    for step in (2, 3, 4, 5):
        of_step = {row.task: row for row in rows if row.step == step}
        assert len(of_step) == len(schedule.tasks)
        for index, row in of_step.items():
            task = schedule.tasks[index]
            assert (row.op, row.unit, row.lane) == (task.work.op, task.unit, task.work.lane)
            assert row.ready_s <= row.start_s <= row.end_s
            for dep in task.after:
                # CUDA's events are dated to half a microsecond, in 32 bits.
                assert of_step[dep].end_s <= row.start_s + (1e-5 if DEVICE != "cpu" else 0.0)
        for tasks in schedule.lane_tasks().values():
            ends = [of_step[index].end_s for index in tasks]
            assert all(later >= earlier - 1e-5 for earlier, later in pairwise(ends))
    assert list(to_frame(rows).columns)[:3] == ["step", "op", "unit"]


def test_fewer_steps_than_wanted_are_all_there():
    _, rows = traced(Plan(model="llama", **SIZES), 2, 8)
    assert sorted({row.step for row in rows}) == [1, 2]


def test_no_trace():
    trainer = SlidingTrainer(make_model(CONFIG), Plan(model="llama", **SIZES), device=DEVICE)
    with trainer, pytest.raises(SlidetuneError, match="trace=8"):
        _ = trainer.trace


def test_blame_and_time_zero():
    fetch, forward = Work(op="fetch", lane=H2D), Work(op="forward", lane=GPU)
    tasks = (Task(fetch, 1, -1, -1, (), (1,)), Task(forward, 1, 0, -1, (0,)))
    schedule = Schedule(name="", lanes=(GPU, H2D), tasks=tasks, pools=(), holds=(), tokens=1)
    first = [(10.0, 11.0), (11.0, 13.0)]
    second = [(13.0, 14.5), (14.5, 16.0)]
    rows = trace_rows(schedule, [Recorded(1, first), Recorded(2, second)])
    by_task = {(row.step, row.task): row for row in rows}
    assert by_task[1, 0].start_s == 0.0
    assert by_task[1, 1].blocked_by == 0
    # The second step counts from the GPU's end of the first.
    assert by_task[2, 0].start_s == 0.0
    assert by_task[2, 0].ready_s == -2.0
    assert by_task[2, 0].blocked_by == 1
    assert by_task[2, 1].end_s == 3.0


@pytest.mark.parametrize("update", ["backward", "forward"])
def test_adam_alone_is_timed_where_training_was_and_changes_no_weight(update):
    plan = Plan(model="llama", update=update, resident_layers=1, **SIZES)
    with SlidingTrainer(make_model(CONFIG), plan, device=DEVICE) as trainer:
        for batch in random_batches(CONFIG, plan, 2):
            trainer.step(batch)
        before = trainer.state_dict()
        assert adam_alone_s(trainer) > 0
        after = trainer.state_dict()
    assert all(torch.equal(after[name], weights) for name, weights in before.items())


def test_there_is_no_adam_alone_where_the_gpu_updates_all_layers():
    plan = Plan(model="llama", resident_layers=CONFIG["num_hidden_layers"], **SIZES)
    with SlidingTrainer(make_model(CONFIG), plan, device=DEVICE) as trainer:
        assert adam_alone_s(trainer) is None
