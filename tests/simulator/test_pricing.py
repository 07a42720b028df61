"""Prices against the H200 probe's measurements and against arithmetic by hand.

The probe: one machine with an H200, 16 vCPUs and PCIe 5.0 x16 (torch 2.11, CUDA 13.0), shared, so that its
figures spread by 5 % from run to run. They are typed in here, not read from the profile they led to.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidetune.builder import ADAM_BYTES_PER_PARAM, build
from slidetune.gpu_time import gpu_seconds
from slidetune.hardware import Figure
from slidetune.machines import load_profile, machine
from slidetune.models import load_model
from slidetune.plans import Plan
from slidetune.runtime.fits import FULL_SPEED, Beside, fit_contention
from slidetune.schedule import CPU_ADAM, D2H, GPU, H2D, NVME_READ, NVME_WRITE, Work
from slidetune.simulator.pricing import SHARED_RESOURCES, PriceList
from slidetune.units import GB, GIB, MIB

H200 = load_profile("h200-16c")
# The contention figures were read with Adam's arrays in 4 KiB pages: 5.02 G parameters/s of 26 bytes, where the
# profile has what 2 MiB pages reach.
H200_SMALL_PAGES = H200.replaced("host.dram_gbs", Figure(5.02 * 26))

ADAM = Work(op="adam", lane=CPU_ADAM, params=200_000_000, param_bytes=26.0, threads=16)
UP = Work(op="fetch", lane=H2D, bytes=512 * MIB)
DOWN = Work(op="store", lane=D2H, bytes=512 * MIB)


def rates(profile, *works):
    """What each of the works, all running at once, does a second: G parameters or GB."""
    prices = PriceList(profile)
    numbers = tuple(prices.demand_index(prices.price(work).demand) for work in works)
    return [
        (work.params or work.bytes) / 1e9 / prices.price(work).alone_s * speed
        for work, speed in zip(works, prices.speeds(numbers), strict=True)
    ]


# --- H200 probe: Adam (split kernel, 16 threads) beside transfers of 512 MiB


@pytest.mark.parametrize(
    ("works", "measured"),
    [
        ((ADAM,), (5.02,)),
        ((ADAM, UP), (3.94, 45.6)),
        ((ADAM, DOWN), (3.16, 52.4)),
        ((ADAM, UP, DOWN), (3.01, 35.1, 35.1)),
        ((UP,), (55.2,)),
        ((DOWN,), (55.2,)),
        ((UP, DOWN), (50.1, 50.1)),
    ],
    ids=["Adam", "Adam, up", "Adam, down", "Adam, up, down", "up", "down", "up, down"],
)
def test_h200_contention_within_5_percent(works, measured):
    assert rates(H200_SMALL_PAGES, *works) == pytest.approx(measured, rel=0.05)


# --- Contention as `slidetune profile` fits it: from speeds side by side to figures and back

SIDES = {"upload": (UP, "h2d"), "download": (DOWN, "d2h")}


def beside_adam(profile, side):
    """Adam and a copy side by side, each as a fraction of its speed alone."""
    both = rates(profile, ADAM, SIDES[side][0])
    alone = [rates(profile, work)[0] for work in (ADAM, SIDES[side][0])]
    return Beside(*(rate / of for rate, of in zip(both, alone, strict=True)))


def fitted(profile, side, beside, weight=0.7, priority=1.2):
    dram = profile.host.dram_bytes_per_s
    adam_share = min(1.0, 16 * profile.host.adam_gparams_per_core.value * 1e9 * 26.0 / dram)
    copy_share = profile.figure(f"link.{SIDES[side][1]}_gbs").value * GB / dram
    return fit_contention(beside, adam_share=adam_share, copy_share=copy_share, weight=weight, priority=priority)


def with_contention(profile, side, found):
    weighted = profile.replaced(f"host.{side}_dram_weight", Figure(found.weight))
    return weighted.replaced(f"host.{side}_priority", Figure(found.priority))


def test_the_h200_probes_speeds_give_the_shipped_profiles_figures():
    for side, adam, gbs in (("upload", 3.94, 45.6), ("download", 3.16, 52.4)):
        found = fitted(H200_SMALL_PAGES, side, Beside(adam / 5.02, gbs / 55.2))
        assert found.weight == pytest.approx(H200.figure(f"host.{side}_dram_weight").value, rel=0.03)
        assert found.priority == pytest.approx(H200.figure(f"host.{side}_priority").value, rel=0.01)
        assert found.weight_known
        assert found.priority_known


def test_speeds_in_pairs_give_those_of_all_three():
    """The H200 probe's pairs, fitted, give what it read with Adam, uploads and downloads all at once."""
    profile = H200_SMALL_PAGES
    for side, adam, gbs in (("upload", 3.94, 45.6), ("download", 3.16, 52.4)):
        profile = with_contention(profile, side, fitted(profile, side, Beside(adam / 5.02, gbs / 55.2)))
    assert rates(profile, ADAM, UP) == pytest.approx((3.94, 45.6), rel=2e-3)
    assert rates(profile, ADAM, DOWN) == pytest.approx((3.16, 52.4), rel=2e-3)
    assert rates(profile, ADAM, UP, DOWN) == pytest.approx((3.01, 35.1, 35.1), rel=0.05)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(("upload", "download")),
    st.floats(20, 400),
    st.floats(0.1, 1.5),
    st.floats(0.1, 2),
    st.floats(0.3, 3),
)
def test_figures_come_back_from_the_speeds_they_give(side, dram, per_core, weight, priority):
    machine = H200.replaced("host.dram_gbs", Figure(dram)).replaced("host.adam_gparams_per_core", Figure(per_core))
    link_share = machine.link.h2d_gbs.value / dram
    # A link that DRAM holds back alone would have been measured as slower; and no copy is free.
    weight = max(0.03 / link_share, min(weight, 1.0 / link_share))
    true = machine.replaced(f"host.{side}_dram_weight", Figure(weight))
    true = true.replaced(f"host.{side}_priority", Figure(priority))
    beside = beside_adam(true, side)
    found = fitted(true, side, beside)
    again = beside_adam(with_contention(true, side, found), side)
    assert again.adam == pytest.approx(beside.adam, abs=1.0 - FULL_SPEED + 1e-6)
    assert again.copy == pytest.approx(beside.copy, abs=1.0 - FULL_SPEED + 1e-6)
    if min(beside.adam, beside.copy) < FULL_SPEED:
        assert found.weight == pytest.approx(weight, rel=1e-6)
    if max(beside.adam, beside.copy) < FULL_SPEED:
        assert found.priority == pytest.approx(priority, rel=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    st.floats(0.02, 1.2),
    st.floats(0.02, 1.2),
    st.sampled_from(("upload", "download")),
    st.floats(20, 400),
)
def test_speeds_that_dram_can_explain_come_back_from_their_figures(adam, copy, side, dram):
    """Any two speeds, as noise may have it: where neither more than DRAM is asked for nor less than a copy takes."""
    machine = H200.replaced("host.dram_gbs", Figure(dram)).replaced("host.adam_gparams_per_core", Figure(100.0))
    found = fitted(machine, side, Beside(adam, copy))
    copy_share = found.weight * machine.link.h2d_gbs.value / dram
    again = beside_adam(with_contention(machine, side, found), side)
    assert 0.0 < copy_share <= 1.0 + 1e-9
    asked = (1.0 - min(1.0, adam)) / min(1.0, copy)
    if 0.02 <= asked <= 1.0:
        assert again.adam == pytest.approx(min(1.0, adam), abs=0.0201)
        assert again.copy == pytest.approx(min(1.0, copy), abs=0.0201)


def test_where_nothing_is_held_back_the_assumptions_stay():
    unhindered = fit_contention(Beside(1.0, 1.0), adam_share=0.3, copy_share=0.5, weight=0.6, priority=1.5)
    assert (unhindered.weight, unhindered.priority) == (0.6, 1.5)
    assert not unhindered.weight_known
    assert not unhindered.priority_known
    # More than what is left beside Adam it can't take.
    bound = fit_contention(Beside(0.99, 1.0), adam_share=0.9, copy_share=0.5, weight=0.6, priority=1.5)
    assert bound.weight == pytest.approx((1.0 - 0.9 * 0.99) / 0.5)
    assert bound.weight_known


# --- H200 probe: transfers alone, by size; and beside the other direction from 16 MiB. Smaller ones slow each other
# --- down more than the model says: 17.4 GB/s each way at 1 MiB, where it has 28.8. Plans hardly move any.

LINK_GBS = {1: (32.2, 33.5), 4: (46.1, 47.7), 16: (52.9, 52.4), 64: (54.7, 54.8), 512: (55.2, 55.2)}
DUPLEX_GBS = {16: 45.2, 64: 49.1, 512: 50.1}


@pytest.mark.parametrize("mib", LINK_GBS)
def test_h200_transfers_by_size_within_6_percent(mib):
    for lane, measured in zip((H2D, D2H), LINK_GBS[mib], strict=True):
        assert rates(H200, Work(op="fetch", lane=lane, bytes=mib * MIB)) == [pytest.approx(measured, rel=0.06)]


@pytest.mark.parametrize("mib", DUPLEX_GBS)
def test_h200_transfers_both_ways_within_7_percent(mib):
    both = [Work(op="fetch", lane=lane, bytes=mib * MIB) for lane in (H2D, D2H)]
    assert rates(H200, *both) == pytest.approx([DUPLEX_GBS[mib]] * 2, rel=0.07)


# --- H200 probe: one Llama-3.1-8B layer, seq 1024: milliseconds forward, and forward + backward

LAYER_MS = {
    1: (1.29, 4.40),
    2: (1.80, 6.11),
    4: (3.42, 10.57),
    8: (6.65, 20.68),
    16: (13.70, 41.45),
    32: (28.43, 84.24),
}


@pytest.mark.parametrize("batch", LAYER_MS)
def test_h200_layer_timings(batch):
    schedule = build(load_model("llama-3.1-8b"), Plan(model="llama-3.1-8b", micro_batch=batch))
    layer = {
        t.work.op: gpu_seconds(t.work, H200.gpu) * 1e3 for t in schedule.tasks if t.work.lane == GPU and t.unit == 16
    }
    forward, both = LAYER_MS[batch]
    # Where launching is the limit (batch 1 and 2) the model is coarser.
    bound = 0.12 if batch <= 2 else 0.07
    assert layer["forward"] == pytest.approx(forward, rel=bound)
    assert layer["forward"] + layer["backward"] == pytest.approx(both, rel=bound)


# H200 probe: Adam by threads, arrays in 2 MiB pages, two rounds.
ADAM_BY_THREADS = {8: (4.43, 4.92), 12: (5.16, 6.06), 14: (5.57, 6.06), 16: (5.70, 6.39)}


@pytest.mark.parametrize("threads", ADAM_BY_THREADS)
def test_h200_adam_by_threads_lies_between_the_rounds(threads):
    (rate,) = rates(H200, Work(op="adam", lane=CPU_ADAM, params=200_000_000, param_bytes=26.0, threads=threads))
    low, high = ADAM_BY_THREADS[threads]
    assert low <= rate <= high


# --- by hand

RTX4090 = machine("rtx4090", nvme="2TB:7/5")


def alone(work, profile=RTX4090):
    return PriceList(profile).price(work).alone_s


@pytest.mark.parametrize(("lane", "path"), [(H2D, "link.h2d_gbs"), (D2H, "link.d2h_gbs")])
def test_a_transfer_takes_its_latency_and_its_bytes_at_the_links_rate(lane, path):
    latency, rate = RTX4090.link.latency_us.value * 1e-6, RTX4090.figure(path).value * GB
    assert alone(Work(op="x", lane=lane)) == pytest.approx(latency)
    assert alone(Work(op="x", lane=lane, bytes=GIB)) == pytest.approx(latency + GIB / rate)


@pytest.mark.parametrize(("lane", "gbs"), [(NVME_READ, 7.0), (NVME_WRITE, 5.0)])
def test_the_drive_takes_its_bytes_at_its_rate(lane, gbs):
    assert alone(Work(op="x", lane=lane, bytes=7 * GB)) == pytest.approx(7.0 / gbs)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**34), st.integers(0, 2**34), st.sampled_from((H2D, D2H, NVME_READ, NVME_WRITE)))
def test_larger_transfers_take_longer_and_are_no_less_efficient(size, other, lane):
    small, large = sorted((size, other))
    a, b = (alone(Work(op="x", lane=lane, bytes=n)) for n in (small, large))
    assert a <= b
    # Seconds a byte, without dividing by nothing.
    assert b * small <= a * large * (1 + 1e-12)


def test_adam_is_held_back_by_its_threads_or_by_dram():
    host = RTX4090.host
    few = Work(op="adam", lane=CPU_ADAM, params=10**9, param_bytes=26.0, threads=2)
    all_of_them = Work(op="adam", lane=CPU_ADAM, params=10**9, param_bytes=26.0, threads=int(host.cores.value))
    assert alone(few) == pytest.approx(1.0 / (2 * host.adam_gparams_per_core.value))
    assert alone(all_of_them) == pytest.approx(26.0 * 10**9 / host.dram_bytes_per_s)


def test_threads_beyond_the_cores_add_nothing():
    cores = int(RTX4090.host.cores.value)
    at, beyond = (
        PriceList(RTX4090).price(Work(op="adam", lane=CPU_ADAM, params=10**8, param_bytes=26.0, threads=n))
        for n in (cores, 10 * cores)
    )
    assert at == beyond


def test_gpu_time_is_products_and_traffic_one_after_the_other():
    gpu = RTX4090.gpu
    work = Work(op="forward", lane=GPU, flops=1e13, traffic_bytes=1e10)
    assert gpu_seconds(work, RTX4090.gpu) == pytest.approx(1e13 / gpu.matmul_flops + 1e10 / gpu.memory_bytes_per_s)


def test_launching_is_the_floor_of_gpu_time():
    work = Work(op="forward", lane=GPU, launches=50, flops=1e6)
    assert gpu_seconds(work, RTX4090.gpu) == pytest.approx(50 * RTX4090.gpu.launch_us.value * 1e-6)
    assert gpu_seconds(Work(op="nothing", lane=GPU), RTX4090.gpu) == 0.0


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1e15), st.integers(0, 5000))
def test_launching_and_computing_overlap_but_for_their_ends(flops, launches):
    compute = gpu_seconds(Work(op="x", lane=GPU, flops=flops), RTX4090.gpu)
    launch = gpu_seconds(Work(op="x", lane=GPU, launches=launches), RTX4090.gpu)
    both = gpu_seconds(Work(op="x", lane=GPU, flops=flops, launches=launches), RTX4090.gpu)
    assert max(compute, launch) * (1 - 1e-9) <= both <= (compute + launch) * (1 + 1e-9)


WORKS = (
    Work(op="forward", lane=GPU, flops=1e12, launches=40),
    Work(op="fetch", lane=H2D, bytes=64 * MIB),
    Work(op="store", lane=D2H, bytes=64 * MIB),
    Work(op="adam", lane=CPU_ADAM, params=10**7, param_bytes=ADAM_BYTES_PER_PARAM, threads=8),
    Work(op="read state", lane=NVME_READ, bytes=64 * MIB),
    Work(op="write state", lane=NVME_WRITE, bytes=64 * MIB),
)


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.lane)
@pytest.mark.parametrize("slow", ["host.dram_gbs", "link.duplex_gbs", "host.cores"])
def test_alone_means_alone_whatever_is_slow(work, slow):
    """A machine whose DRAM or link total can't feed a lane sets that lane's top speed; alone it then runs at it."""
    prices = PriceList(RTX4090.scaled(slow, 0.01))
    price = prices.price(work)
    assert prices.speeds((prices.demand_index(price.demand),)) == (1.0,)
    for name, share in price.demand.shares:
        assert name in SHARED_RESOURCES
        assert 0.0 < share <= 1.0


def test_a_link_faster_than_dram_moves_bytes_as_fast_as_dram_does():
    slow = RTX4090.scaled("host.dram_gbs", 0.01)
    rate = slow.host.dram_bytes_per_s / slow.host.download_dram_weight.value
    assert alone(Work(op="store", lane=D2H, bytes=64 * GIB), slow) == pytest.approx(64 * GIB / rate, rel=1e-3)


def test_reads_and_writes_share_one_drive():
    read, write = Work(op="r", lane=NVME_READ, bytes=GIB), Work(op="w", lane=NVME_WRITE, bytes=GIB)
    share = RTX4090.nvme.mixed_share.value
    assert rates(RTX4090, read, write) == pytest.approx([7.0 * share / 2, 5.0 * share / 2])
    independent = RTX4090.replaced("nvme.mixed_share", Figure(2.0))
    assert rates(independent, read, write) == pytest.approx([7.0, 5.0])


def test_slideformers_one_stream_uses_the_direction_its_operation_names():
    prices = PriceList(RTX4090)
    for op, lane in (("fetch", H2D), ("load", H2D), ("store", D2H), ("save", D2H)):
        on_link = prices.price(Work(op=op, lane="link", bytes=64 * MIB))
        assert on_link == prices.price(Work(op=op, lane=lane, bytes=64 * MIB))


def test_conversion_runs_as_fast_as_dram_allows():
    # H200 probe: fp32 to bf16 alone, 13.3 G parameters/s on 16 threads of the machine with 4 KiB pages.
    convert = Work(op="convert", lane="convert", params=10**9, param_bytes=9.8, threads=16)
    assert rates(H200_SMALL_PAGES, convert) == [pytest.approx(13.3, rel=0.05)]


def test_idle_lanes_have_no_speed_and_change_none():
    prices = PriceList(RTX4090)
    number = {work.lane: prices.demand_index(prices.price(work).demand) for work in WORKS}
    busy = prices.speeds((number[H2D], number[CPU_ADAM]))
    assert prices.speeds((0, number[H2D], 0, number[CPU_ADAM], 0)) == (0.0, busy[0], 0.0, busy[1], 0.0)
