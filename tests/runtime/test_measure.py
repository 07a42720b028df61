"""A measured profile is one that the simulator takes."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch")

from slidetune.builder import build
from slidetune.files import read, write
from slidetune.hardware import HardwareProfile
from slidetune.models import load_model
from slidetune.plans import Plan
from slidetune.runtime.fits import Repeated
from slidetune.runtime.measure import (
    _MIX_SECONDS,
    ADAM,
    DOWN,
    KERNEL_MIXES,
    KERNELS,
    MIXES,
    PASSES,
    SMALL_ADAM,
    UP,
    Effort,
    _Bench,
    _SizedCopies,
    measure_machine,
)
from slidetune.simulator.predict import predict
from slidetune.units import KIB, MIB

from .reference import DEVICE

# Copies within the CPU's caches may have no latency to speak of, nor has a call of few threads a cost; and on the CPU
# as device kernels fetch nothing over a link.
MAY_BE_ZERO = (
    "gpu.context_gib",
    "gpu.gap_uploads_us",
    "gpu.gap_downloads_us",
    "link.latency_us",
    "host.adam_serial_share",
    "host.adam_call_us",
)
QUICK = Effort(
    seconds=0.02,
    copy_bytes=MIB,
    copies_bytes=8 * MIB,
    params=MIB,
    adam_bytes=32 * MIB,
    matrix=512,
    nvme_bytes=4 * MIB,
)


def test_a_profile_of_this_machine(tmp_path):
    found = measure_machine(DEVICE, nvme_folder=tmp_path, effort=QUICK)
    for path, figure in found.figures():
        assert figure.value > 0 or path in MAY_BE_ZERO, path
        assert figure.kind in ("measured", "guess", "derived")
        assert figure.source
        assert (figure.measured_spread is not None) == (figure.kind == "measured")
    write(tmp_path / "profile.yaml", found)
    assert read(tmp_path / "profile.yaml", HardwareProfile) == found
    model = load_model("qwen2.5-0.5b")
    assert predict(build(model, Plan(model=model.name, optimizer_nvme=4)), found).step_s > 0


def test_no_drive_unless_asked():
    assert measure_machine(DEVICE, effort=QUICK).nvme is None


@pytest.mark.parametrize("drive", [True, False])
def test_progress_counts_every_measurement(tmp_path, drive):
    told = []
    measure_machine(
        DEVICE, nvme_folder=tmp_path if drive else None, effort=QUICK, progress=lambda *now: told.append(now)
    )
    total = len(told) - 1
    assert [done for done, _, _ in told] == list(range(total + 1))
    assert {of for _, of, _ in told} == {total}
    assert total > PASSES * len(MIXES)
    assert len({what for _, _, what in told}) > len(MIXES)


def bench():
    return _Bench(torch.device(DEVICE), QUICK, lambda *now: None, drive=False)


def test_side_by_side_runs_all_of_them_at_least_once():
    ends = bench()._side_by_side(lambda: time.sleep(0.05), lambda: time.sleep(0.001))
    assert len(ends[0]) == 2
    assert len(ends[1]) > 2
    assert all(list(times) == sorted(times) for times in ends)


@pytest.mark.parametrize("fails_on_call", [1, 2])
def test_an_action_that_fails_side_by_side_ends_them_all(fails_on_call):
    calls = []

    def fail():
        calls.append(1)
        if len(calls) == fails_on_call:
            raise ValueError("no such copy")

    with pytest.raises(ValueError, match="no such copy"):
        bench()._side_by_side(fail, lambda: None)


# --- figures from passes, as if measured: what a machine without a GPU can't run


ALONE = {ADAM: 100.0, SMALL_ADAM: 2000.0, UP: 200.0, DOWN: 180.0, KERNELS: 40.0}


def a_pass(speed=1.0):
    """Calls a second of a machine that is as fast as `speed` in everything, and on which DRAM is short."""
    kept = {
        (ADAM, UP): (0.8, 0.7),
        (ADAM, DOWN): (0.75, 0.9),
        (ADAM, UP, DOWN): (0.7, 0.5, 0.75),
        (UP, DOWN): (0.9, 0.9),
    }
    rates = {
        mix: {name: speed * ALONE[name] * share for name, share in zip(mix, kept.get(mix, (1.0,)), strict=True)}
        for mix in MIXES
    }
    for mix, extra_us in zip(KERNEL_MIXES, (0.0, 1.0, 3.0, 4.0, 8.0), strict=True):
        rates[mix] = dict.fromkeys(mix, speed)
        rates[mix][KERNELS] = speed / (1.0 / ALONE[KERNELS] + bench().kernels * extra_us * 1e-6)
    return rates


def on_a_gpu():
    found = bench()
    found.cuda = True
    return found


def test_gaps_follow_from_kernels_beside_copies():
    figures = on_a_gpu()._gaps([a_pass(speed) for speed in (0.99, 1.0, 1.01)])
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(
        {"gap_uploads_us": 1.0, "gap_downloads_us": 3.0, "gap_adam_factor": 2.0}, rel=1e-3
    )
    assert all(figure.kind == "measured" and figure.measured_spread < 0.02 for figure in figures.values())
    assert "1, 3, 4, 8 us longer" in figures["gap_uploads_us"].source


def test_on_the_cpu_no_kernels_wait_for_copies():
    figures = _Bench(torch.device("cpu"), QUICK, lambda *now: None, drive=False)._gaps([a_pass()])
    assert [figure.value for figure in figures.values()] == [0.0, 0.0, 1.0]
    assert {figure.kind for figure in figures.values()} == {"derived"}


def test_rates_alone_are_the_medians_of_the_passes():
    passes = [a_pass(speed) for speed in (0.5, 1.0, 1.02, 1.03, 1.2)]
    sizes = [4 * KIB, QUICK.copy_bytes]
    copies = _SizedCopies(sizes, *[[Repeated(10e-6 + size / 1e9, 0.0) for size in sizes]] * 2)
    link = bench().link(copies, passes)
    assert link.latency_us.value == pytest.approx(10.0, rel=1e-3)
    for figure, name in ((link.h2d_gbs, UP), (link.d2h_gbs, DOWN)):
        assert figure.value == pytest.approx(MIB * 1.02 * ALONE[name] / 1e9, rel=1e-3)
        assert figure.measured_spread > 0.0


def test_adams_rate_and_cost_of_a_call_come_from_the_passes():
    here = bench()
    here.cores = 16
    copies = _SizedCopies([QUICK.copy_bytes], *[[Repeated(MIB / 1e9, 0.0)]] * 2)
    passes = [a_pass()] * PASSES
    host = here.host(Repeated(1e-9, 0.0), None, here.link(copies, passes), passes, {})
    large, small = 1 / ALONE[ADAM], 1 / ALONE[SMALL_ADAM]
    call, rate = host.adam_call_us.value * 1e-6, host.dram_gbs.value * 1e9 / 26
    assert call + QUICK.params / rate == pytest.approx(large, rel=2e-3)
    assert call + here.small_call / rate == pytest.approx(small, abs=large * 2e-3) or call == 0.0
    # One thread alone, and all of them together, are as fast in the simulator as they were.
    serial = host.adam_serial_share.value
    assert 15 * 1.0 / (1 + 14 * serial) == pytest.approx(rate / 1e9, rel=2e-3) if rate < 15e9 else serial == 0.0
    assert host.upload_priority.value == pytest.approx(0.7 / 0.8, rel=1e-3)
    assert host.download_priority.value == pytest.approx(0.9 / 0.75, rel=1e-3)
    assert host.upload_duplex_priority.value == pytest.approx(0.5 / 0.7, rel=1e-3)
    assert host.download_duplex_priority.value == pytest.approx(0.75 / 0.7, rel=1e-3)
    assert "all three 70%, 50%, 75%" in host.download_duplex_priority.source


def test_all_mixes_take_36_seconds_on_a_gpu():
    assert PASSES * len((*MIXES, *KERNEL_MIXES)) * _MIX_SECONDS <= 36.0
