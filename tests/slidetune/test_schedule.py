"""Sums and views over a schedule small enough to see."""

from slidetune.builder import build
from slidetune.models import load_model
from slidetune.plans import Plan, place_layers
from slidetune.schedule import CPU_ADAM, D2H, GPU, H2D, Hold, Pool, Schedule, Task, Work, layer_updates

FETCH = Work(op="fetch", lane=H2D, bytes=100)
FORWARD = Work(op="forward", lane=GPU, flops=7.0, working_bytes=40)
BACKWARD = Work(op="backward", lane=GPU, flops=14.0, working_bytes=90)
STORE = Work(op="store", lane=D2H, bytes=30)
ADAM = Work(op="adam", lane=CPU_ADAM, params=50)

SCHEDULE = Schedule(
    name="two layers",
    lanes=(GPU, H2D, D2H, CPU_ADAM),
    tasks=(
        Task(FETCH, 1, -1, -1, ()),
        Task(FORWARD, 1, 0, -1, (0,)),
        Task(FETCH, 2, -1, -1, ()),
        Task(BACKWARD, 1, 0, -1, (1,)),
        Task(STORE, 1, -1, 0, (3,)),
        Task(ADAM, 1, -1, 0, (4,)),
    ),
    pools=(
        Pool(name="weights", tier="gpu", slots=2, slot_bytes=100),
        Pool(name="ring", tier="ram", slots=3, slot_bytes=30, page_locked=True),
        Pool(name="state", tier="ram", slots=1, slot_bytes=500),
    ),
    holds=(Hold(0, 0, 0, (3,)), Hold(0, 1, 2, (2,)), Hold(1, 0, 4, (5,))),
    tokens=10,
)


def test_a_lane_runs_its_tasks_in_the_order_of_the_schedule():
    assert SCHEDULE.lane_tasks() == {GPU: [1, 3], H2D: [0, 2], D2H: [4], CPU_ADAM: [5]}


def test_a_lane_without_tasks_is_there_and_empty():
    assert Schedule(name="", lanes=(GPU,), tasks=(), pools=(), holds=(), tokens=0).lane_tasks() == {GPU: []}


def test_totals_are_sums_over_all_lanes_or_one():
    assert SCHEDULE.total("bytes") == 100 + 100 + 30
    assert SCHEDULE.total("bytes", H2D) == 200
    assert SCHEDULE.total("flops") == 21.0
    assert SCHEDULE.total("flops", D2H) == 0
    assert SCHEDULE.total("params", CPU_ADAM) == 50


def test_pools_have_the_bytes_of_all_their_slots_and_belong_to_a_tier():
    assert [pool.bytes for pool in SCHEDULE.pools] == [200, 90, 500]
    assert [pool.name for pool in SCHEDULE.pools_of("ram")] == ["ring", "state"]


def test_a_tier_must_hold_its_pools_and_the_gpu_the_largest_working_set():
    assert SCHEDULE.working_bytes() == 90
    assert SCHEDULE.peak_bytes("gpu") == 200 + 90
    assert SCHEDULE.peak_bytes("ram") == 90 + 500
    assert SCHEDULE.peak_bytes("nvme") == 0


def test_updates_of_layers_are_the_cpus_from_ram():
    model = load_model("llama-3.2-1b")
    plan = Plan(model=model.name, resident_layers=2, optimizer_nvme=3, late_updates=1, chunk_bytes=64 << 20)
    tasks = layer_updates(build(model, plan))
    places = place_layers(plan, 16)
    in_ram = {unit for unit, place in enumerate(places, start=1) if place.optimizer == "ram"}
    assert len(in_ram) == 11
    assert {task.unit for task in tasks} == in_ram
    assert sum(task.work.params for task in tasks) == sum(model.units[unit].params for unit in in_ram)
    assert layer_updates(build(model, Plan(model=model.name, resident_layers=16))) == []
