"""The vocabulary of machines: figures, derived rates, exchanged figures, capacities."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidetune.hardware import RELATIVE_SPREAD, Figure
from slidetune.machines import machine

PROFILE = machine("rtx4090")
PATHS = [path for path, _ in PROFILE.figures()]


@pytest.mark.parametrize("kind", RELATIVE_SPREAD)
def test_spread_follows_the_kind(kind):
    assert Figure(1.0, kind, "x").spread == RELATIVE_SPREAD[kind]


def test_spreads_are_ordered_by_how_well_a_figure_is_known():
    spread = RELATIVE_SPREAD
    assert spread["given"] < spread["measured"] <= spread["data sheet"] < spread["derived"] < spread["guess"]


def test_times_keeps_kind_and_source():
    assert Figure(2.0, "measured", "bench").times(3) == Figure(6.0, "measured", "bench")
    assert float(Figure(2.5)) == 2.5


def test_figures_reaches_every_part():
    assert {path.split(".")[0] for path in PATHS} == {"gpu", "link", "host", "nvme"}
    without_drive = dataclasses.replace(PROFILE, nvme=None)
    assert {path.split(".")[0] for path, _ in without_drive.figures()} == {"gpu", "link", "host"}


@given(path=st.sampled_from(PATHS), factor=st.floats(0.1, 10))
def test_scaled_changes_one_figure_and_nothing_else(path, factor):
    scaled = PROFILE.scaled(path, factor)
    for name, figure in scaled.figures():
        expected = PROFILE.figure(name).times(factor) if name == path else PROFILE.figure(name)
        assert figure == expected


def test_achieved_rates_are_peak_times_efficiency():
    gpu, host = PROFILE.gpu, PROFILE.host
    assert gpu.matmul_flops == pytest.approx(gpu.bf16_tflops.value * gpu.matmul_efficiency.value * 1e12)
    assert gpu.memory_bytes_per_s == pytest.approx(1008e9 * gpu.memory_efficiency.value)
    assert host.dram_bytes_per_s == pytest.approx(89.6e9 * host.dram_efficiency.value)


def test_capacities():
    gpu, host = PROFILE.gpu, PROFILE.host
    assert PROFILE.capacity_bytes("gpu") == int((gpu.memory_gib.value - gpu.context_gib.value) * 2**30)
    assert PROFILE.capacity_bytes("ram") == int((128 - host.process_gib.value) * 2**30)
    assert PROFILE.capacity_bytes("nvme") == 2_000_000_000_000
    assert dataclasses.replace(PROFILE, nvme=None).capacity_bytes("nvme") == 0
