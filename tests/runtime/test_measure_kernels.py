"""Times of a model's GPU tasks: which are taken, and that they are taken warm."""

from __future__ import annotations

import itertools
import math

import pytest

torch = pytest.importorskip("torch")

from transformers import AutoConfig

from slidetune.builder import build
from slidetune.machines import load_gpu
from slidetune.models import load_model
from slidetune.plans import Plan
from slidetune.runtime.measure_kernels import OPS, Point, from_both_ends, measure_kernels, warm_up
from slidetune.schedule import GPU
from slidetune.simulator.kernel_times import KernelTimes

from ..slidetune.reference import SMALL_CONFIGS
from .reference import DEVICE

GRID = (Point(2, 16, 2), Point(1, 16), Point(1, 10**9))


def warmed(rounds):
    """Rounds that a warm-up takes, and the seconds it hands on, where the rounds take so long."""
    taken = []
    endless = itertools.chain(rounds, itertools.repeat(rounds[-1]))

    def one_round():
        taken.append(next(endless))
        return taken[-1]

    seconds = warm_up(one_round)
    return len(taken), seconds


@pytest.mark.parametrize(
    ("rounds", "taken"),
    [
        (([0.010, 0.020],), 2),
        (([0.010, 0.020], [0.0102, 0.0195]), 2),
        # As Liger's kernels once did: 2.5 ms at first, 1.45 in the end.
        (([0.5], [0.0025], [0.0025 * 0.9], [0.00145], [0.00145]), 5),
        # One action settles later than the other.
        (([0.010, 0.040], [0.010, 0.020], [0.010, 0.020]), 3),
        # Never: no more than eight.
        (([0.01], [0.02], [0.01], [0.02], [0.01], [0.02], [0.01], [0.02], [0.01]), 8),
        # Long ones: two at least, and no more than a second.
        (([30.0], [10.0], [5.0]), 2),
        (([0.45], [0.3], [0.275], [0.2]), 3),
    ],
)
def test_warming_up_ends_when_two_rounds_agree(rounds, taken):
    count, seconds = warmed(rounds)
    assert count == taken
    assert seconds == pytest.approx(sum([*rounds, *[rounds[-1]] * 8][taken - 1]))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    AutoConfig.for_model(**SMALL_CONFIGS["llama"]).save_pretrained(folder)
    return str(folder)


def test_from_both_ends():
    points = [Point(n, 1024) for n in (64, 32, 16, 8, 4)]
    assert [point.micro_batch for point in from_both_ends(points)] == [64, 4, 32, 8, 16]
    assert from_both_ends([]) == []


def test_every_kind_of_task_of_every_point_is_measured(model):
    told = []
    times = measure_kernels(
        model,
        load_gpu("rtx4090"),
        torch.device(DEVICE),
        kernels="eager",
        grid=GRID,
        progress=lambda *now: told.append(now),
    )
    # Lengths the model can't have are left out; on a GPU many tokens come first.
    assert told == [(0, 2)] * (DEVICE != "cpu") + [(0, 2), (1, 2), (2, 2)]
    sizes = [(time.micro_batch, time.seq_len) for time in times]
    assert sizes == sorted(sizes, reverse=DEVICE == "cuda")
    assert set(sizes) == {(1, 16), (2, 16)}
    for time in times:
        assert time.model == model
        assert time.op in OPS
        assert time.seconds > 0.0
        assert time.spread >= 0.0
        assert time.model_s > 0.0
    assert {time.op for time in times} >= {"forward", "backward", "head"}
    # The simulator finds each of them again by the task it belongs to.
    schedule = build(load_model(model), Plan(model="llama", seq_len=16, micro_batch=1), "eager")
    lookup = KernelTimes(times, "eager")
    for work in {task.work for task in schedule.tasks if task.work.lane == GPU and task.work.op in OPS}:
        assert any(
            math.isclose(lookup.ratio(work), time.seconds / time.model_s, rel_tol=1e-6)
            for time in times
            if time.op == work.op
        )


def test_no_more_points_than_there_is_time_for(model):
    assert measure_kernels(model, load_gpu("rtx4090"), torch.device(DEVICE), grid=GRID, seconds=-1.0) == ()
