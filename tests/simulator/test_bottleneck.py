"""Where the time of a step goes: by hand, and as sums that must come out for any plan."""

from itertools import pairwise

import pytest
from hypothesis import assume, given, settings

from slidetune.builder import build
from slidetune.schedule import CPU_ADAM, D2H, GPU, H2D
from slidetune.simulator.bottleneck import critical_path, lane_shares, steady
from slidetune.simulator.engine import simulate
from slidetune.simulator.pricing import PriceList

from ..strategies import machines, models_and_plans
from .by_hand import last_step, lasting, schedule_of, settled, unit_machine


def recorded(schedule, profile):
    prices = PriceList(profile)
    return simulate(schedule, prices, record=True), [prices.price(task.work).alone_s for task in schedule.tasks]


def shares_of(schedule, profile):
    run, alone = recorded(schedule, profile)
    return lane_shares(schedule, run, dict(enumerate(alone)))


CHAIN = schedule_of(
    (lasting(H2D, 2.0), (), (2,)),
    (lasting(GPU, 3.0), (0,), ()),
    (lasting(D2H, 1.5), (1,), ()),
)


def test_lanes_of_a_chain():
    shares = shares_of(CHAIN, unit_machine())
    # Each waits for the one before it while that runs, and is idle while the third one does.
    assert {lane: share.busy_s for lane, share in shares.items()} == pytest.approx({GPU: 3.0, H2D: 2.0, D2H: 1.5})
    assert shares[GPU].waiting_s == pytest.approx({H2D: 2.0})
    assert shares[H2D].waiting_s == pytest.approx({D2H: 1.5})
    assert shares[D2H].waiting_s == pytest.approx({GPU: 3.0})
    assert [shares[lane].idle_s for lane in (GPU, H2D, D2H)] == pytest.approx([1.5, 3.0, 2.0])


def test_the_critical_path_of_a_chain_is_the_chain():
    run, _ = recorded(CHAIN, unit_machine())
    path = critical_path(CHAIN, run)
    assert [task for task, _ in path] == [1, 0, 2]
    assert [seconds for _, seconds in path] == pytest.approx([3.0, 2.0, 1.5])


def test_what_runs_beside_the_path_is_not_on_it():
    # Adam (5 s) is what the GPU waits for; the upload (2 s) isn't.
    schedule = schedule_of(
        (lasting(H2D, 2.0), (), (2,)),
        (lasting(CPU_ADAM, 5.0), (), (2,)),
        (lasting(GPU, 1.0), (0, 1), ()),
    )
    run, _ = recorded(schedule, unit_machine())
    path = critical_path(schedule, run)
    assert [task for task, _ in path] == [2, 1]
    assert [seconds for _, seconds in path] == pytest.approx([1.0, 5.0])


def test_tasks_back_to_back_on_one_lane_are_all_on_the_path():
    schedule = schedule_of(*((lasting(GPU, seconds), (), ()) for seconds in (1.0, 2.0, 3.0)))
    run, _ = recorded(schedule, unit_machine())
    path = critical_path(schedule, run)
    assert [task for task, _ in path] == [2, 1, 0]
    assert sum(seconds for _, seconds in path) == pytest.approx(6.0)


def test_contention_is_what_busy_time_has_beyond_time_alone():
    # Two transfers of 1 and 3 GB over a link of 1 GB/s for both: 2 and 4 s.
    schedule = schedule_of(
        (lasting(H2D, 1.0), (), (2,)),
        (lasting(D2H, 3.0), (), (2,)),
        (lasting(GPU, 1.0), (0, 1), ()),
    )
    shares = shares_of(schedule, unit_machine(duplex_gbs=1.0))
    assert (shares[H2D].busy_s, shares[H2D].alone_s) == pytest.approx((2.0, 1.0))
    assert (shares[D2H].busy_s, shares[D2H].alone_s) == pytest.approx((4.0, 3.0))


# --- any plan

any_case = given(models_and_plans(max_layers=6), machines())
laws = settings(max_examples=60, deadline=None, derandomize=True)


def simulated(drawn, profile):
    schedule = build(*drawn)
    run, alone = recorded(schedule, profile)
    assume(settled(run))
    return schedule, run, alone


@laws
@any_case
def test_the_steady_step_has_every_task_once(drawn, profile):
    schedule, run, _ = simulated(drawn, profile)
    assert sorted(done.task for done in steady(run)) == list(range(len(schedule.tasks)))


@laws
@any_case
def test_busy_waiting_and_idle_make_the_step(drawn, profile):
    schedule, run, alone = simulated(drawn, profile)
    shares = lane_shares(schedule, run, dict(enumerate(alone)))
    assert list(shares) == [lane for lane, tasks in schedule.lane_tasks().items() if tasks]
    for lane, share in shares.items():
        assert share.busy_s + sum(share.waiting_s.values()) + share.idle_s == pytest.approx(run.step_s, rel=2e-3)
        assert share.alone_s <= share.busy_s * (1 + 1e-6)
        assert share.alone_s == pytest.approx(sum(alone[task] for task in schedule.lane_tasks()[lane]))
        assert min(share.idle_s, *share.waiting_s.values(), 0.0) == 0.0
        assert lane not in share.waiting_s


@laws
@any_case
def test_the_critical_path_adds_up_to_the_step(drawn, profile):
    schedule, run, _ = simulated(drawn, profile)
    path = critical_path(schedule, run)
    assert sum(seconds for _, seconds in path) == pytest.approx(run.step_s, rel=1e-6)
    assert path[0][0] == schedule.lane_tasks()[GPU][-1]
    assert all(seconds > 0 for _, seconds in path)


@laws
@any_case
def test_the_critical_path_goes_from_each_task_to_one_it_waited_for_or_followed(drawn, profile):
    schedule, run, _ = simulated(drawn, profile)
    order, done = schedule.lane_tasks(), last_step(run)
    path = [task for task, _ in critical_path(schedule, run)]
    for task, before in pairwise(path):
        lane = order[schedule.tasks[task].work.lane]
        followed = lane[lane.index(task) - 1]
        waited_for = schedule.tasks[task].after + schedule.tasks[task].after_previous
        assert before == followed or before in waited_for
        assert before in done
