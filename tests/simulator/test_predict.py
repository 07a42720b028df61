"""A prediction as a whole: its figures fit together, and it names what limits the step."""

import dataclasses

import pytest
from hypothesis import assume, given, settings

from slidetune.builder import build, build_forward
from slidetune.machines import machine
from slidetune.models import load_model
from slidetune.plans import Activations, Plan
from slidetune.schedule import CPU_ADAM, D2H, GPU, H2D, LANE_NAMES, NVME_READ, NVME_WRITE
from slidetune.simulator.engine import simulate
from slidetune.simulator.predict import predict
from slidetune.simulator.pricing import PriceList
from slidetune.trace import TraceRow, to_frame

from ..strategies import machines, models_and_plans
from .by_hand import lasting, schedule_of, settled, unit_machine

RTX4090 = machine("rtx4090")


def llama(profile=RTX4090, **knobs):
    return predict(build(load_model("llama-3.1-8b"), Plan(model="llama-3.1-8b", **knobs)), profile)


@pytest.fixture(scope="module")
def everywhere():
    """A plan that uses every lane."""
    return llama(micro_batch=4, accumulation=2, optimizer_nvme=9, weights_nvme=4, activations=Activations(nvme=3))


def test_figures_follow_from_each_other(everywhere):
    assert everywhere.tokens_per_s == pytest.approx(4 * 2 * 1024 / everywhere.step_s)
    assert everywhere.gpu_busy == pytest.approx(everywhere.lanes[GPU].busy_s / everywhere.step_s)
    assert everywhere.bound_s == max(everywhere.bounds_s.values()) <= everywhere.step_s
    assert sum(everywhere.critical_s.values()) == pytest.approx(everywhere.step_s)
    assert set(everywhere.lanes) == {GPU, H2D, D2H, CPU_ADAM, NVME_READ, NVME_WRITE}


def test_bytes_written_to_nvme_are_state_and_inputs(everywhere):
    layer = load_model("llama-3.1-8b").layers[0].params
    inputs = 3 * 2 * (2 * 4096 * 4 * 1024)
    assert everywhere.nvme_written_bytes == (4 * 12 + 5 * 10) * layer + inputs


def test_a_given_price_list_is_used():
    prices = PriceList(RTX4090)
    schedule = build(load_model("llama-3.1-8b"), Plan(model="llama-3.1-8b", micro_batch=2))
    assert predict(schedule, RTX4090, prices).step_s == predict(schedule, RTX4090).step_s
    assert prices.demands


def test_a_trace_is_a_table(everywhere):
    frame = to_frame(everywhere.trace)
    assert list(frame.columns) == list(TraceRow._fields)
    assert len(frame) == len(everywhere.schedule.tasks)
    assert frame.start_s.is_monotonic_increasing


# --- what limits


def one_of_each(**seconds):
    """Every lane waits for the GPU's last step, and the GPU for all lanes."""
    works = [lasting(lane, s) for lane, s in seconds.items()]
    last = len(works)
    return schedule_of(*((work, (), (last,)) for work in works), (lasting(GPU, 1.0), tuple(range(last)), ()))


@pytest.mark.parametrize("lane", [H2D, D2H, CPU_ADAM, NVME_READ, NVME_WRITE])
def test_the_lane_with_most_of_the_critical_path_limits(lane):
    seconds = dict.fromkeys((H2D, D2H, CPU_ADAM, NVME_READ, NVME_WRITE), 2.0) | {lane: 8.0}
    assert predict(one_of_each(**seconds), unit_machine()).limiter == LANE_NAMES[lane]


def test_a_gpu_that_never_waits_limits():
    assert predict(schedule_of((lasting(GPU, 5.0), (), ()), (lasting(H2D, 2.0), (), ())), unit_machine()).limiter == (
        "GPU compute"
    )


def test_adam_that_shares_dram_is_limited_by_dram():
    # 5 s of Adam, 4 s of uploads, both at half speed for 8 s.
    crowded = predict(one_of_each(cpu_adam=5.0, h2d=4.0), unit_machine(dram_gbs=1.0, cores=1.0))
    assert crowded.limiter == "CPU Adam (host DRAM)"
    assert crowded.step_s == pytest.approx(9.0 + 1.0)


def test_adam_that_fills_dram_alone_is_limited_by_dram_and_with_few_threads_is_not():
    slow, fast = unit_machine(dram_gbs=0.5), unit_machine(dram_gbs=2.0)
    assert predict(one_of_each(cpu_adam=5.0), slow).limiter == "CPU Adam (host DRAM)"
    # One thread moves 1 GB/s.
    assert predict(one_of_each(cpu_adam=5.0), fast).limiter == "CPU Adam"


def test_transfers_both_ways_are_limited_by_the_link_they_share():
    both = one_of_each(h2d=5.0, d2h=4.0)
    assert predict(both, unit_machine(duplex_gbs=1.0)).limiter == "uploads (both directions of the link)"
    assert predict(both, unit_machine(dram_gbs=1.0)).limiter == "uploads (host DRAM)"
    assert predict(both, unit_machine()).limiter == "uploads"


def test_reads_and_writes_at_once_are_limited_by_the_drive():
    profile = unit_machine()
    one_at_a_time = dataclasses.replace(profile.nvme.mixed_share, value=1.0)
    profile = profile.replaced("nvme.mixed_share", one_at_a_time)
    both = predict(one_of_each(nvme_read=5.0, nvme_write=4.0), profile)
    assert both.limiter == "NVMe drive (reads and writes together)"
    assert both.step_s == pytest.approx(9.0 + 1.0)


def test_small_batches_are_limited_by_the_host_and_large_ones_by_the_gpu():
    small, large = llama(micro_batch=1), llama(micro_batch=16, window=3, prefetch=2)
    assert small.limiter != "GPU compute"
    assert large.limiter == "GPU compute"
    assert small.gpu_busy < 0.5 < large.gpu_busy


# --- forward passes alone


def test_a_forward_pass_is_shorter_than_its_step_and_no_shorter_than_its_computing():
    model = load_model("llama-3.1-8b")
    for micro_batch in (1, 16):
        plan = Plan(model=model.name, micro_batch=micro_batch, window=3, prefetch=2)
        step, forward = predict(build(model, plan), RTX4090), predict(build_forward(model, plan), RTX4090)
        # 2 FLOPs a parameter that a token is multiplied with, at what the GPU's products reach.
        computing_s = 2.0 * model.active_params * plan.tokens / RTX4090.gpu.matmul_flops
        assert computing_s < forward.step_s < step.step_s
        assert forward.tokens_per_s == pytest.approx(plan.tokens / forward.step_s)
        assert forward.nvme_written_bytes == 0
    assert forward.limiter == "GPU compute"
    # All but the first layer's upload and the head's is hidden.
    assert forward.step_s < 1.1 * forward.lanes[GPU].alone_s


# --- any plan

any_case = given(models_and_plans(max_layers=6), machines())
laws = settings(max_examples=40, deadline=None, derandomize=True)


@laws
@any_case
def test_a_prediction_is_the_simulated_step(drawn, profile):
    schedule, prices = build(*drawn), PriceList(profile)
    prediction = predict(schedule, profile, prices)
    assert prediction.step_s == pytest.approx(simulate(schedule, prices, record=False).step_s, rel=0.005)
    assert prediction.schedule is schedule
    assert 0.0 < prediction.gpu_busy <= 1.0 + 1e-9
    assert prediction.limiter.split(" (")[0] in {*LANE_NAMES.values(), "NVMe drive"}


@laws
@any_case
def test_a_trace_has_every_task_once_as_the_schedule_has_it(drawn, profile):
    prediction = predict(build(*drawn), profile)
    schedule, rows = prediction.schedule, prediction.trace
    assert sorted(row.task for row in rows) == list(range(len(schedule.tasks)))
    assert len({row.step for row in rows}) == 1
    for row in rows:
        task = schedule.tasks[row.task]
        assert (row.op, row.lane, row.unit, row.micro_batch, row.chunk) == (
            task.work.op,
            task.work.lane,
            task.unit,
            task.micro_batch,
            task.chunk,
        )
        assert (row.bytes, row.flops) == (task.work.bytes, task.work.flops)
        assert row.ready_s <= row.start_s <= row.end_s


@laws
@any_case
def test_time_zero_is_the_gpus_last_end_and_the_step_its_next(drawn, profile):
    prediction = predict(build(*drawn), profile)
    on_gpu = [row for row in prediction.trace if row.lane == GPU]
    assert on_gpu[0].start_s >= -1e-9
    # Steps that differ by turns are drawn as one of them is, and counted at their mean.
    prices = PriceList(profile)
    if settled(simulate(prediction.schedule, prices, record=True)):
        assert on_gpu[-1].end_s == pytest.approx(prediction.step_s, rel=1e-3)
    else:
        assert on_gpu[-1].end_s == pytest.approx(prediction.step_s, rel=0.2)


@laws
@any_case
def test_critical_seconds_add_up_to_the_step_the_most_first(drawn, profile):
    schedule, prices = build(*drawn), PriceList(profile)
    assume(settled(simulate(schedule, prices, record=True)))
    prediction = predict(schedule, profile, prices)
    seconds = list(prediction.critical_s.values())
    assert seconds == sorted(seconds, reverse=True)
    assert sum(seconds) == pytest.approx(prediction.step_s)


@laws
@any_case
def test_a_forward_pass_of_any_plan_is_predicted(drawn, profile):
    schedule, prices = build_forward(*drawn), PriceList(profile)
    forward, step = predict(schedule, profile, prices), predict(build(*drawn), profile)
    assert forward.step_s == pytest.approx(simulate(schedule, prices, record=False).step_s, rel=0.005)
    assert forward.lanes[GPU].alone_s <= forward.step_s * (1 + 1e-9)
    assert forward.bound_s <= forward.step_s * (1 + 1e-9)
    assert all(forward.memory[tier].peak_bytes <= step.memory[tier].peak_bytes for tier in forward.memory)
