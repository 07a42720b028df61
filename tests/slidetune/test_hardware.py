"""The vocabulary of machines: figures, derived rates, exchanged figures, capacities."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidetune.files import dump, read, write
from slidetune.hardware import LEAST_SPREAD, MOST_SPREAD, NOISY_SPREAD, RELATIVE_SPREAD, Figure, HardwareProfile
from slidetune.machines import machine

PROFILE = machine("rtx4090")
PATHS = [path for path, _ in PROFILE.figures()]


@pytest.mark.parametrize("kind", RELATIVE_SPREAD)
def test_spread_follows_the_kind(kind):
    assert Figure(1.0, kind, "x").spread == RELATIVE_SPREAD[kind]


def test_spreads_are_ordered_by_how_well_a_figure_is_known():
    spread = RELATIVE_SPREAD
    assert spread["given"] < spread["measured"] <= spread["data sheet"] < spread["derived"] < spread["guess"]


@given(st.floats(0, 10))
def test_a_measured_figure_has_the_spread_it_was_measured_with(spread):
    figure = Figure(2.0, "measured", "bench", spread)
    assert figure.spread == min(MOST_SPREAD, max(LEAST_SPREAD, spread))
    assert figure.noisy == (spread > NOISY_SPREAD)
    assert figure.times(3.0).spread == figure.spread


@pytest.mark.parametrize("kind", RELATIVE_SPREAD)
def test_only_a_measured_figure_is_noisy(kind):
    assert Figure(2.0, kind, "x", 0.5).noisy == (kind == "measured")
    assert not Figure(2.0, kind, "x").noisy


def test_a_profile_file_keeps_spreads_and_leaves_out_those_nobody_stated(tmp_path):
    stated = PROFILE.replaced("link.h2d_gbs", Figure(20.0, "measured", "bench", 0.03))
    assert "measured_spread" not in dump(PROFILE)["link"]["h2d_gbs"]
    assert dump(stated)["link"]["h2d_gbs"]["measured_spread"] == 0.03
    write(tmp_path / "profile.yaml", stated)
    assert read(tmp_path / "profile.yaml", HardwareProfile) == stated


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


def test_what_was_never_measured_costs_nothing():
    gpu, host = PROFILE.gpu, PROFILE.host
    assert (gpu.gap_uploads_us.value, gpu.gap_downloads_us.value, gpu.gap_adam_factor.value) == (0, 0, 1)
    assert host.adam_call_us.value == host.adam_serial_share.value == 0
    # One rule for both ways, as long as nobody measured better: the least of the two ways' own priorities.
    least = min(host.upload_priority.value, host.download_priority.value)
    assert host.upload_duplex_priority.value == host.download_duplex_priority.value == least
    for path in ("gpu.gap_uploads_us", "gpu.gap_adam_factor", "host.adam_call_us", "host.upload_duplex_priority"):
        assert PROFILE.figure(path).kind == "derived"


def test_capacities():
    gpu, host = PROFILE.gpu, PROFILE.host
    assert PROFILE.capacity_bytes("gpu") == int((gpu.memory_gib.value - gpu.context_gib.value) * 2**30)
    assert PROFILE.capacity_bytes("ram") == int((128 - host.process_gib.value) * 2**30)
    assert PROFILE.capacity_bytes("nvme") == 2_000_000_000_000
    assert dataclasses.replace(PROFILE, nvme=None).capacity_bytes("nvme") == 0
