"""Memory over a step: by hand, and against the pools of any plan."""

import pytest
from hypothesis import assume, given, settings

from slidetune import buffers
from slidetune.builder import build
from slidetune.machines import machine
from slidetune.plans import Activations, Plan
from slidetune.schedule import CPU_ADAM, D2H, GPU, H2D, TIERS, Hold, Pool
from slidetune.simulator.engine import simulate
from slidetune.simulator.memory import WORKING_SET
from slidetune.simulator.predict import predict
from slidetune.simulator.pricing import PriceList
from slidetune.units import GIB

from ..strategies import machines, models_and_plans, small_model
from .by_hand import lasting, schedule_of, settled, unit_machine

POOLS = (
    Pool(name="weights", tier="gpu", slots=1, slot_bytes=100),
    Pool(name="ring", tier="ram", slots=2, slot_bytes=30, page_locked=True),
    Pool(name="state", tier="ram", slots=1, slot_bytes=500),
)
# Fetch, forward, backward, store, adam: 1 to 2, 2 to 4, 4 to 7, 7 to 8, 8 to 8.5 seconds, one after the other.
BY_HAND = schedule_of(
    (lasting(GPU, 1.0, "embed"), (), (5,)),
    (lasting(H2D, 1.0), (0,), ()),
    (lasting(GPU, 2.0, "forward", working_bytes=40), (1,), ()),
    (lasting(GPU, 3.0, "backward", working_bytes=70), (2,), ()),
    (lasting(D2H, 1.0), (3,), ()),
    (lasting(CPU_ADAM, 0.5), (4,), ()),
    pools=POOLS,
    holds=(Hold(0, 0, 1, (3,)), Hold(1, 0, 4, (5,))),
)


def by_hand(tier):
    """The tier's memory, and each moment as seconds since the embedding began: the step's 0 is the GPU's last end."""
    memory = predict(BY_HAND, unit_machine()).memory[tier]
    # The step is 8.5 s long, and begins with the store (1 s) and Adam (0.5 s) of the one before.
    return memory, [round((t - 1.5) % 8.5, 9) for t in memory.times_s]


def test_gpu_memory_over_time_by_hand():
    memory, moments = by_hand("gpu")
    in_use = dict(zip(moments, memory.in_use["weights"], strict=True))
    # Held from the fetch's start (1) to the backward pass's end (7).
    assert {t: bytes_ for t, bytes_ in in_use.items() if t in (1.0, 2.0, 4.0, 7.0)} == {1: 100, 2: 100, 4: 100, 7: 0}
    working = dict(zip(moments, memory.allocated[WORKING_SET], strict=True))
    assert {t: working[t] for t in (2.0, 4.0, 7.0)} == {2: 40, 4: 70, 7: 0}
    assert memory.allocated["weights"] == (100,) * len(moments)
    assert memory.peak_bytes == 100 + 70
    assert (memory.peak_s - 1.5) % 8.5 == pytest.approx(4.0)
    assert memory.peak_task == "backward of unit 3"
    assert memory.peak_owners == {"weights": 100, WORKING_SET: 70}


def test_ram_over_time_by_hand():
    memory, moments = by_hand("ram")
    # One slot of the ring from the store's start (7) to Adam's end (8.5, when the next step begins).
    in_use = dict(zip(moments, memory.in_use["ring"], strict=True))
    assert in_use == {7.0: 30, 0.0: 0}
    # What nobody hands out is in use all the time.
    assert set(memory.in_use["state"]) == {500}
    assert memory.peak_bytes == 500 + 60
    assert memory.peak_task == ""
    assert list(memory.peak_owners.items()) == [("state", 500), ("ring", 60)]


def test_a_tier_that_nothing_uses_is_empty():
    memory, _ = by_hand("nvme")
    assert memory.peak_bytes == 0
    assert memory.peak_owners == {}
    assert memory.capacity_bytes == 100 * 10**9


# --- any plan


def predicted(drawn, profile):
    model, plan = drawn
    schedule, prices = build(model, plan), PriceList(profile)
    # A timeline is laid around one steady step.
    assume(settled(simulate(schedule, prices, record=True)))
    return predict(schedule, profile, prices)


any_case = given(models_and_plans(max_layers=6), machines())
laws = settings(max_examples=50, deadline=None, derandomize=True)


@laws
@any_case
def test_the_peak_is_the_largest_sum_over_the_timeline(drawn, profile):
    for tier, memory in predicted(drawn, profile).memory.items():
        assert memory.tier == tier
        totals = [sum(values[i] for values in memory.allocated.values()) for i in range(len(memory.times_s))]
        assert memory.peak_bytes == max(totals)
        assert totals[memory.times_s.index(memory.peak_s)] == memory.peak_bytes
        owners = memory.peak_owners
        assert sum(owners.values()) == memory.peak_bytes
        assert list(owners.values()) == sorted(owners.values(), reverse=True)


@laws
@any_case
def test_the_peak_is_what_the_buffers_said_beforehand(drawn, profile):
    memory = predicted(drawn, profile).memory
    schedule = build(*drawn)
    found, bound = {tier: memory[tier].peak_bytes for tier in TIERS}, buffers.peak_bytes(*drawn)
    assert found == {tier: schedule.peak_bytes(tier) for tier in TIERS}
    # Kept activations are bounded as if all of them were there together.
    assert all(found[tier] <= bound[tier] for tier in TIERS)
    assert drawn[1].recompute.keep or found == bound
    assert all(memory[tier].capacity_bytes == profile.capacity_bytes(tier) for tier in TIERS)


@laws
@any_case
def test_no_owner_uses_more_than_it_has(drawn, profile):
    prediction = predicted(drawn, profile)
    for memory in prediction.memory.values():
        assert list(memory.times_s) == sorted(set(memory.times_s))
        assert memory.times_s[0] == 0.0
        assert memory.times_s[-1] < prediction.step_s
        assert memory.in_use.keys() == memory.allocated.keys()
        for owner, used in memory.in_use.items():
            allocated = memory.allocated[owner]
            assert len(used) == len(allocated) == len(memory.times_s)
            assert all(0 <= u <= a for u, a in zip(used, allocated, strict=True))


@laws
@any_case
def test_memory_in_use_over_time_is_the_sum_of_all_holds(drawn, profile):
    """The area under a pool's line: its slots' bytes times the seconds they are held."""
    prediction = predicted(drawn, profile)
    schedule, rows = prediction.schedule, {row.task: row for row in prediction.trace}
    expected = dict.fromkeys((pool.name for pool in schedule.pools), 0.0)
    for hold in schedule.holds:
        pool = schedule.pools[hold.pool]
        seconds = max(rows[task].end_s for task in hold.last) - rows[hold.first].start_s
        expected[pool.name] += pool.slot_bytes * seconds
    for index, pool in enumerate(schedule.pools):
        if index not in {hold.pool for hold in schedule.holds}:
            expected[pool.name] = pool.bytes * prediction.step_s
    for memory in prediction.memory.values():
        ends = (*memory.times_s[1:], prediction.step_s)
        for name, used in memory.in_use.items():
            if name == WORKING_SET:
                continue
            area = sum(bytes_ * (end - start) for bytes_, start, end in zip(used, memory.times_s, ends, strict=True))
            assert area == pytest.approx(expected[name], rel=1e-6)


def test_the_peaks_task_is_the_one_that_needs_most_beside_the_pools():
    model = small_model("tied", 4)
    # The head's loss has the largest working set of short sequences, the layer's backward pass of long ones.
    for micro_batch, task in ((1, "head of unit 5"), (16, "backward of unit 4")):
        plan = Plan(model=model.name, micro_batch=micro_batch, activations=Activations(gpu=1))
        memory = predict(build(model, plan), machine("rtx4090")).memory["gpu"]
        assert memory.peak_task == task
        assert memory.peak_owners[WORKING_SET] == buffers.working_bytes(model, plan)
        assert memory.capacity_bytes == machine("rtx4090").gpu.usable_bytes < 24 * GIB
