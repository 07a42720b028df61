"""The engine: by hand on tiny schedules; as laws on any plan; against a recurrence where nothing is shared."""

import dataclasses
from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slidetune.builder import build
from slidetune.hardware import Figure
from slidetune.machines import load_profile, machine
from slidetune.models import load_model
from slidetune.plans import Activations, Plan, Recompute
from slidetune.schedule import CPU_ADAM, D2H, GPU, H2D, NVME_READ, NVME_WRITE
from slidetune.simulator.bounds import bounds_s
from slidetune.simulator.engine import simulate
from slidetune.simulator.pricing import PriceList

from ..strategies import RATES, machines, models_and_plans, plans, small_model
from .by_hand import keeps_pace, last_step, lasting, schedule_of, unit_machine


def laws(examples):
    """Derandomized: the engine's steady state has rare cases (see the end), which must not come and go."""
    return settings(max_examples=examples, deadline=None, derandomize=True)


def run(schedule, profile, *, record=True):
    return simulate(schedule, PriceList(profile), record=record)


# --- by hand


def test_a_chain_that_waits_for_the_step_before_takes_the_sum():
    schedule = schedule_of(
        (lasting(H2D, 2.0), (), (2,)),
        (lasting(GPU, 3.0), (0,), ()),
        (lasting(D2H, 1.5), (1,), ()),
    )
    outcome = run(schedule, unit_machine())
    assert outcome.step_s == pytest.approx(6.5)
    fetch, forward, store = (last_step(outcome)[task] for task in (0, 1, 2))
    assert forward.start_s == fetch.end_s
    assert store.start_s == forward.end_s
    assert (fetch.end_s - fetch.start_s, store.end_s - store.start_s) == pytest.approx((2.0, 1.5))
    assert (forward.blocked_by, store.blocked_by) == (0, 1)


def test_the_next_step_overlaps_what_it_does_not_wait_for():
    # The store runs beside the next upload: 2 + 3 a step.
    schedule = schedule_of(
        (lasting(H2D, 2.0), (), (1,)),
        (lasting(GPU, 3.0), (0,), ()),
        (lasting(D2H, 1.5), (1,), ()),
    )
    assert run(schedule, unit_machine()).step_s == pytest.approx(5.0)


def test_lanes_without_dependencies_run_at_once():
    works = [lasting(GPU, 4.0), *(lasting(lane, 3.0) for lane in (H2D, D2H, CPU_ADAM, NVME_READ, NVME_WRITE))]
    outcome = run(schedule_of(*((work, (), ()) for work in works)), unit_machine())
    assert outcome.step_s == pytest.approx(4.0)
    for done in outcome.executed:
        alone = 4.0 if done.task == 0 else 3.0
        assert done.end_s - done.start_s == pytest.approx(alone)
        assert done.blocked_by == -1


def test_a_lane_runs_one_task_after_the_other():
    schedule = schedule_of(*((lasting(GPU, seconds), (), ()) for seconds in (1.0, 2.0, 3.0)))
    outcome = run(schedule, unit_machine())
    assert outcome.step_s == pytest.approx(6.0)
    first, second, third = (last_step(outcome)[task] for task in (0, 1, 2))
    assert (second.start_s, third.start_s) == (first.end_s, second.end_s)


def test_a_task_waits_for_the_last_of_what_it_needs():
    schedule = schedule_of(
        (lasting(H2D, 2.0), (), (2,)),
        (lasting(CPU_ADAM, 5.0), (), (2,)),
        (lasting(GPU, 1.0), (0, 1), ()),
    )
    outcome = run(schedule, unit_machine())
    assert outcome.step_s == pytest.approx(6.0)
    assert last_step(outcome)[2].blocked_by == 1


def test_a_wait_that_is_over_when_the_lane_gets_there_is_none():
    schedule = schedule_of(
        (lasting(H2D, 1.0), (), (2,)),
        (lasting(GPU, 3.0), (), ()),
        (lasting(GPU, 1.0), (0,), ()),
    )
    outcome = run(schedule, unit_machine())
    assert outcome.step_s == pytest.approx(4.0)
    assert last_step(outcome)[2].blocked_by == -1


def both_ways(up, down):
    return schedule_of(
        (lasting(H2D, up), (), (2,)),
        (lasting(D2H, down), (), (2,)),
        (lasting(GPU, 1.0), (0, 1), ()),
    )


def test_two_transfers_share_a_link_until_one_ends():
    # At half speed each until the short one is through after 2 s; the 2 GB left then go at 1 GB/s.
    outcome = run(both_ways(1.0, 3.0), unit_machine(duplex_gbs=1.0))
    assert outcome.step_s == pytest.approx(4.0 + 1.0)
    up, down, forward = (last_step(outcome)[task] for task in (0, 1, 2))
    assert up.end_s - up.start_s == pytest.approx(2.0)
    assert down.end_s - down.start_s == pytest.approx(4.0)
    assert forward.start_s == pytest.approx(down.end_s)


def test_a_task_that_starts_later_shares_from_then_on():
    # The upload is alone for 1 s of its 3, then shares with a download of 1 s: 1 + 2 + 1.
    schedule = schedule_of(
        (lasting(GPU, 1.0), (), (3,)),
        (lasting(H2D, 3.0), (), (3,)),
        (lasting(D2H, 1.0), (0,), ()),
        (lasting(GPU, 1.0), (1, 2), ()),
    )
    outcome = run(schedule, unit_machine(duplex_gbs=1.0))
    assert outcome.step_s == pytest.approx(1.0 + 2.0 + 1.0 + 1.0)
    down = last_step(outcome)[2]
    assert down.end_s - down.start_s == pytest.approx(2.0)


def test_three_tasks_share_dram():
    # 1 GB/s of DRAM for three lanes that ask for 1 each: at thirds until 0.5 G are through (1.5 s), at halves until
    # the next has its other 0.5 (1 s), then alone for the last 1 s.
    schedule = schedule_of(
        (lasting(H2D, 0.5), (), (3,)),
        (lasting(D2H, 1.0), (), (3,)),
        (lasting(CPU_ADAM, 2.0), (), (3,)),
        (lasting(GPU, 1.0), (0, 1, 2), ()),
    )
    outcome = run(schedule, unit_machine(dram_gbs=1.0))
    ends = [last_step(outcome)[task].end_s - last_step(outcome)[task].start_s for task in (0, 1, 2)]
    assert ends == pytest.approx([1.5, 2.5, 3.5])
    assert outcome.step_s == pytest.approx(4.5)


def test_without_a_gpu_task_of_any_length_time_still_passes():
    schedule = schedule_of((lasting(H2D, 1.0), (), (1,)), (lasting(GPU, 0.0), (0,), ()))
    assert run(schedule, unit_machine()).step_s == pytest.approx(1.0)


def test_a_faster_link_can_slow_what_waits_for_adam():
    """Sharing has anomalies: a download that nobody waits for takes, at twice the speed, twice the DRAM from Adam,
    which the GPU waits for. With shares of a half and of one: 1 + 1/2 and 1 + 1 seconds."""
    schedule = schedule_of(
        (lasting(GPU, 1.0), (), (1,)),
        (lasting(CPU_ADAM, 1.0), (0,), ()),
        (lasting(D2H, 4.0), (0,), ()),
        (lasting(GPU, 1.0), (1,), ()),
        (lasting(GPU, 9.0), (), ()),
    )
    slow, fast = (unit_machine(dram_gbs=1.0, d2h_gbs=gbs) for gbs in (0.5, 1.0))
    assert run(schedule, slow).step_s == pytest.approx(1 + 1.5 + 1 + 9)
    assert run(schedule, fast).step_s == pytest.approx(1 + 2.0 + 1 + 9)


@pytest.mark.parametrize("record", [False, True])
def test_only_a_recorded_run_keeps_its_tasks(record):
    outcome = run(both_ways(1.0, 3.0), unit_machine(), record=record)
    assert bool(outcome.executed) == record
    assert outcome.step_s == pytest.approx(outcome.boundaries[-1] - outcome.boundaries[-2])


# --- laws of any plan on any machine

any_case = given(models_and_plans(max_layers=6), machines())


@laws(80)
@any_case
def test_every_task_starts_after_all_it_waits_for(drawn, profile):
    schedule = build(*drawn)
    outcome = run(schedule, profile)
    at = {(done.step, done.task): done for done in outcome.executed}
    assert len(at) == len(outcome.executed)
    assert len(last_step(outcome)) == len(schedule.tasks)
    first = min(done.step for done in outcome.executed)
    checked = 0
    for done in outcome.executed:
        task = schedule.tasks[done.task]
        awaited = [(done.step, dep) for dep in task.after] + [(done.step - 1, dep) for dep in task.after_previous]
        for key in awaited:
            # What lies before the first recorded task was done before the run began.
            assert key in at or key[0] <= first
            if key in at:
                assert at[key].end_s <= done.start_s + 1e-9
                checked += 1
        assert done.ready_s <= done.start_s <= done.end_s
        if done.blocked_by >= 0:
            assert done.blocked_by in task.after + task.after_previous
    assert checked >= sum(len(task.after) for task in schedule.tasks)


@laws(80)
@any_case
def test_lanes_run_their_tasks_in_order_one_at_a_time(drawn, profile):
    schedule = build(*drawn)
    outcome = run(schedule, profile)
    lanes = defaultdict(list)
    for done in outcome.executed:
        lanes[schedule.tasks[done.task].work.lane].append(done)
    for lane, ran in lanes.items():
        ran.sort(key=lambda done: (done.start_s, done.end_s))
        assert all(a.end_s <= b.start_s + 1e-9 for a, b in pairwise(ran))
        order = schedule.lane_tasks()[lane]
        keys = [(done.step, done.task) for done in ran]
        assert keys == sorted(keys)
        # None left out between the first and the last.
        start = order.index(ran[0].task)
        assert [done.task for done in ran] == [order[(start + i) % len(order)] for i in range(len(ran))]


@laws(80)
@any_case
def test_nothing_waits_without_reason(drawn, profile):
    """A task starts when its lane has come to it and the last of what it waits for has ended."""
    schedule = build(*drawn)
    outcome = run(schedule, profile)
    at = {(done.step, done.task): done for done in outcome.executed}
    for done in last_step(outcome).values():
        task = schedule.tasks[done.task]
        awaited = [(done.step, dep) for dep in task.after] + [(done.step - 1, dep) for dep in task.after_previous]
        ends = [at[key].end_s for key in awaited if key in at]
        assert done.start_s == pytest.approx(max([done.ready_s, *ends]), abs=1e-9)


@laws(80)
@any_case
def test_a_slot_is_never_held_by_two_tasks(drawn, profile):
    schedule = build(*drawn)
    outcome = run(schedule, profile)
    at = {(done.step, done.task): done for done in outcome.executed}
    held = defaultdict(list)
    for step in {done.step for done in outcome.executed}:
        for hold in schedule.holds:
            keys = [(step, hold.first), *((step, task) for task in hold.last)]
            if all(key in at for key in keys):
                held[hold.pool, hold.slot].append((at[keys[0]].start_s, max(at[key].end_s for key in keys)))
    assert sum(map(len, held.values())) >= len(schedule.holds)
    for spans in held.values():
        spans.sort()
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(spans))


@laws(80)
@any_case
def test_no_task_is_faster_than_alone(drawn, profile):
    schedule, prices = build(*drawn), PriceList(profile)
    for done in simulate(schedule, prices, record=True).executed:
        alone = prices.price(schedule.tasks[done.task].work).alone_s
        assert done.end_s - done.start_s >= alone * (1 - 1e-6)


@laws(150)
@any_case
def test_no_step_beats_its_busiest_resource(drawn, profile):
    schedule = build(*drawn)
    bound = max(bounds_s(schedule, PriceList(profile)).values())
    full, extrapolated = (run(schedule, profile, record=record) for record in (True, False))
    assume(keeps_pace(full))
    assert full.step_s >= bound * (1 - 1e-4)
    assert extrapolated.step_s >= bound * (1 - 0.005)


@laws(60)
@any_case
def test_rates_and_times_scale_together(drawn, profile):
    """A machine that does everything three times as fast takes a third of the time."""
    faster = profile
    for path in RATES:
        # Cores count, and set what share of them a launching thread takes: not a rate.
        faster = faster if path == "host.cores" else faster.scaled(path, 3.0)
    for path in ("gpu.launch_us", "link.latency_us"):
        faster = faster.scaled(path, 1 / 3.0)
    schedule = build(*drawn)
    slow, fast = run(schedule, profile), run(schedule, faster)
    assert fast.step_s == pytest.approx(slow.step_s / 3.0, rel=1e-6)


# --- leaving out what repeats


def assert_extrapolated_well(schedule, profile):
    full, extrapolated = (run(schedule, profile, record=record) for record in (True, False))
    assert extrapolated.step_s == pytest.approx(full.step_s, rel=0.005)


@laws(100)
@given(models_and_plans(max_layers=24), machines())
def test_the_extrapolated_step_is_within_half_a_percent(drawn, profile):
    assert_extrapolated_well(build(*drawn), profile)


CATALOG = ("llama-3.1-8b", "mistral-large-123b", "gemma-3-12b", "qwen3-30b-a3b")


@pytest.mark.parametrize("name", CATALOG)
@laws(20)
@given(data=st.data(), profile=machines())
def test_the_extrapolated_step_of_real_models_is_within_half_a_percent(name, data, profile):
    model = load_model(name)
    assert_extrapolated_well(build(model, data.draw(plans(model))), profile)


# What a tuner likes to try, a knob or two off the plain plan.
TYPICAL = {
    "plain": {"micro_batch": 4},
    "deep prefetch": {"micro_batch": 2, "window": 5, "prefetch": 4},
    "accumulation": {"micro_batch": 2, "accumulation": 8, "window": 3, "prefetch": 2},
    "forward update": {"micro_batch": 8, "update": "forward", "clip_norm": 1.0},
    "residents": {"micro_batch": 8, "resident_layers": 4, "resident_weights": 3},
    "optimizer on NVMe": {"micro_batch": 16, "optimizer_nvme": 17},
    "all on NVMe": {"micro_batch": 16, "optimizer_nvme": 26, "weights_nvme": 26, "chunk_bytes": 2**28},
    "NVMe, forward update": {"micro_batch": 16, "optimizer_nvme": 13, "weights_nvme": 9, "update": "forward"},
    "inputs everywhere": {"micro_batch": 8, "accumulation": 2, "activations": Activations(gpu=5, nvme=9)},
    "offloaded activations": {"micro_batch": 8, "recompute": Recompute(keep=3, offload=11)},
}


@pytest.mark.parametrize("name", CATALOG)
@pytest.mark.parametrize("kind", TYPICAL)
def test_the_extrapolated_step_of_typical_plans_is_within_half_a_percent(name, kind):
    schedule = build(load_model(name), Plan(model=name, **TYPICAL[kind]))
    for profile in (machine("rtx4090"), load_profile("h200-16c")):
        assert_extrapolated_well(schedule, profile)


# --- where nothing is shared, a step is a recurrence: ends = latest of what is awaited + duration


def without_sharing(profile):
    for path in ("host.dram_gbs", "link.duplex_gbs", "host.cores"):
        profile = profile.scaled(path, 1e6)
    return profile.replaced("nvme.mixed_share", Figure(2.0))


def recurrence_step_s(schedule, prices, steps=60):
    """The mean of the last steps, worked out task by task."""
    alone = [prices.price(task.work).alone_s for task in schedule.tasks]
    previous, free, boundaries = [0.0] * len(alone), defaultdict(float), []
    for _ in range(steps):
        ends = []
        for seconds, task in zip(alone, schedule.tasks, strict=True):
            lane = task.work.lane
            ready = [free[lane], *(ends[dep] for dep in task.after), *(previous[dep] for dep in task.after_previous)]
            free[lane] = max(ready) + seconds
            ends.append(free[lane])
        previous = ends
        boundaries.append(free[GPU])
    # Twelve: steps may alternate in twos, threes or fours.
    return (boundaries[-1] - boundaries[-13]) / 12


@laws(60)
@any_case
def test_without_sharing_the_step_is_that_of_the_recurrence(drawn, profile):
    schedule, prices = build(*drawn), PriceList(without_sharing(profile))
    outcome = simulate(schedule, prices, record=True)
    assume(keeps_pace(outcome))
    assert outcome.step_s == pytest.approx(recurrence_step_s(schedule, prices), rel=0.001)


# --- more of anything


@laws(60)
@given(models_and_plans(max_layers=6), machines(), st.sampled_from(RATES), st.sampled_from((1.1, 2.0, 5.0)))
def test_without_sharing_more_of_anything_never_makes_a_step_slower(drawn, profile, path, factor):
    schedule, profile = build(*drawn), without_sharing(profile)
    before, after = run(schedule, profile), run(schedule, profile.scaled(path, factor))
    assume(keeps_pace(before) and keeps_pace(after))
    assert after.step_s <= before.step_s * (1 + 1e-4)


@laws(60)
@given(models_and_plans(max_layers=6), machines(), st.sampled_from((1.1, 2.0, 5.0)))
def test_more_of_everything_makes_a_step_faster(drawn, profile, factor):
    schedule, better = build(*drawn), profile
    for path in RATES:
        better = better.scaled(path, factor)
    before, after = run(schedule, profile), run(schedule, better)
    assume(keeps_pace(before) and keeps_pace(after))
    assert after.step_s < before.step_s


@laws(150)
@given(models_and_plans(max_layers=6), machines(), st.sampled_from(RATES), st.sampled_from((1.1, 2.0, 5.0)))
def test_with_sharing_more_of_one_thing_costs_a_tenth_at_most(drawn, profile, path, factor):
    """It should cost nothing, but where lanes share, a faster one takes more from the others while it runs (by hand
    above). Among 3,500 cases a rate, with factors up to 4, the worst were: DRAM 0.4 %, GPU 0.4 %, cores 1.8 %,
    uploads 7 %, downloads 5 %, both at once 1 to 4 %, Adam a core 5.5 %, NVMe 4 %; one case in a hundred lost over 1 %
    to a faster download, one in a thousand to any other."""
    schedule = build(*drawn)
    before, after = run(schedule, profile), run(schedule, profile.scaled(path, factor))
    assume(keeps_pace(before) and keeps_pace(after))
    assert after.step_s <= before.step_s * 1.10


# --- steps that alternate, or settle late, without sharing: the recurrence is then exact


def desktop(**factors):
    profile = machine("rtx4090", "desktop", nvme="2TB:7/5")
    for path, factor in factors.items():
        profile = profile.scaled(path.replace("__", "."), factor)
    return PriceList(without_sharing(profile))


@pytest.mark.parametrize("record", [False, True])
def test_of_steps_that_alternate_the_mean_counts(record):
    """Every other step finds the drive busy with the one layer's state."""
    model = small_model("tied", 3)
    plan = Plan(
        model=model.name,
        seq_len=96,
        micro_batch=8,
        accumulation=3,
        window=1,
        prefetch=0,
        resident_layers=1,
        optimizer_nvme=1,
        activations=Activations(gpu=3),
        recompute=Recompute(keep=1, offload=1),
        chunk_bytes=18353835,
        adam_threads=4,
    )
    schedule, prices = build(model, plan), desktop()
    mean = recurrence_step_s(schedule, prices)
    assert simulate(schedule, prices, record=record).step_s == pytest.approx(mean, rel=0.005)


@pytest.mark.parametrize("record", [False, True])
def test_a_step_is_not_steady_while_a_lane_falls_behind(record):
    """The first steps are as long as the GPU alone makes them; a lane that needs longer has yet to hold it up."""
    model = small_model("learned positions", 1)
    plan = Plan(
        model=model.name,
        micro_batch=2,
        accumulation=3,
        window=1,
        prefetch=0,
        optimizer_nvme=1,
        activations=Activations(gpu=1),
        chunk_bytes=39354880,
        adam_threads=64,
        update="forward",
    )
    schedule = build(model, plan)
    prices = desktop(gpu__bf16_tflops=2.0, link__h2d_gbs=0.2)
    steady = recurrence_step_s(schedule, prices)
    assert simulate(schedule, prices, record=record).step_s == pytest.approx(steady, rel=0.005)


@pytest.mark.parametrize("record", [False, True])
def test_a_lane_that_falls_behind_bounds_the_step_all_the_same(record):
    model = small_model("layers of two sizes", 4)
    plan = Plan(
        model=model.name,
        seq_len=96,
        window=1,
        prefetch=0,
        resident_layers=4,
        recompute=Recompute(keep=1, offload=3),
        chunk_bytes=29370539,
        adam_threads=4,
    )
    schedule, prices = build(model, plan), PriceList(machine("l4", "desktop"))
    bound = bounds_s(schedule, prices)["CPU Adam"]
    assert simulate(schedule, prices, record=record).step_s >= bound * (1 - 1e-4)


def test_a_schedule_without_visits_is_simulated_whole():
    schedule = dataclasses.replace(both_ways(1.0, 3.0), visits=())
    assert run(schedule, unit_machine(), record=False).step_s == pytest.approx(4.0)
