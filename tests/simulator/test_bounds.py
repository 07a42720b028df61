"""The least a step can take, by hand and for any plan."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidetune.builder import build
from slidetune.hardware import Figure
from slidetune.schedule import CPU_ADAM, D2H, GPU, H2D, LANE_NAMES, LANES, NVME_READ, NVME_WRITE
from slidetune.simulator.bounds import bounds_s
from slidetune.simulator.engine import simulate
from slidetune.simulator.pricing import PriceList

from ..strategies import machines, models_and_plans
from .by_hand import lasting, schedule_of, unit_machine


def bounds(schedule, **figures):
    return bounds_s(schedule, PriceList(unit_machine(**figures)))


WORKS = tuple(lasting(lane, seconds) for lane, seconds in zip(LANES, (6.0, 5.0, 4.0, 3.0, 2.0, 1.0), strict=True))
EACH_ONCE = schedule_of(*((work, (), ()) for work in WORKS))


def test_a_lane_needs_the_sum_of_its_tasks():
    found = bounds(schedule_of(*((work, (), ()) for work in WORKS + WORKS[:1])))
    lanes = {LANE_NAMES[lane]: seconds for lane, seconds in zip(LANES, (12.0, 5.0, 4.0, 3.0, 2.0, 1.0), strict=True)}
    assert {name: found[name] for name in lanes} == pytest.approx(lanes)


def test_lanes_are_named_for_people():
    assert [LANE_NAMES[lane] for lane in (GPU, H2D, D2H, CPU_ADAM, NVME_READ, NVME_WRITE)] == [
        "GPU compute",
        "uploads",
        "downloads",
        "CPU Adam",
        "NVMe reads",
        "NVMe writes",
    ]


def test_a_shared_link_needs_time_for_the_bytes_of_both_directions():
    # 5 GB up and 4 down at 1.5 GB/s together.
    assert bounds(EACH_ONCE, duplex_gbs=1.5)["link duplex"] == pytest.approx(9.0 / 1.5)


def test_dram_needs_time_for_all_that_goes_through_it():
    # 5 GB up, 4 down, 3 of Adam, 2 read and 1 written at 1.2 GB/s.
    found = bounds(EACH_ONCE, dram_gbs=1.2)
    assert found["host DRAM"] == pytest.approx(15.0 / 1.2)
    assert next(iter(found)) == "host DRAM"


def test_the_drive_serves_reads_and_writes_in_turn():
    # The unit machine's drive does both at once: half of it for each second.
    assert bounds(EACH_ONCE)["NVMe drive"] == pytest.approx((2.0 + 1.0) / 2)


def test_twice_the_tasks_need_twice_the_time():
    once = bounds(EACH_ONCE, dram_gbs=1.2, duplex_gbs=1.5)
    twice = bounds(schedule_of(*((work, (), ()) for work in WORKS + WORKS)), dram_gbs=1.2, duplex_gbs=1.5)
    assert twice == pytest.approx({name: 2 * seconds for name, seconds in once.items()})


@settings(max_examples=80, deadline=None)
@given(models_and_plans(max_layers=6), machines())
def test_the_longest_comes_first_and_a_resource_needs_no_more_than_its_lanes_together(drawn, profile):
    schedule, prices = build(*drawn), PriceList(profile)
    found = bounds_s(schedule, prices)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    lanes = {LANE_NAMES[lane] for lane in LANES}
    used = {LANE_NAMES[task.work.lane] for task in schedule.tasks}
    assert found.keys() & lanes == used
    in_line = sum(found[name] for name in used)
    assert all(0.0 <= seconds <= in_line * (1 + 1e-9) for seconds in found.values())


@settings(max_examples=80, deadline=None)
@given(models_and_plans(max_layers=6), machines(), st.floats(1.1, 10.0))
def test_bounds_shrink_with_what_grows(drawn, profile, factor):
    schedule = build(*drawn)
    before = bounds_s(schedule, PriceList(profile))
    after = bounds_s(schedule, PriceList(profile.scaled("host.dram_gbs", factor)))
    assert after["host DRAM"] == pytest.approx(before["host DRAM"] / factor)
    assert all(after[name] <= before[name] * (1 + 1e-9) for name in before)


@settings(max_examples=40, deadline=None)
@given(models_and_plans(max_layers=4), machines(), st.tuples(*[st.floats(0, 20)] * 2), st.floats(1, 10))
def test_kernels_that_wait_for_copies_beat_no_bound(drawn, profile, gaps, factor):
    schedule = build(*drawn)
    waiting = profile.replaced("gpu.gap_adam_factor", Figure(factor))
    for path, gap in zip(("gpu.gap_uploads_us", "gpu.gap_downloads_us"), gaps, strict=True):
        waiting = waiting.replaced(path, Figure(gap))
    assert bounds_s(schedule, PriceList(waiting)) == bounds_s(schedule, PriceList(profile))
    bound = next(iter(bounds_s(schedule, PriceList(waiting)).values()))
    assert simulate(schedule, PriceList(waiting)).step_s >= bound * (1 - 5e-3)
