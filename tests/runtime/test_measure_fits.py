"""Figures from measurements: fits that give back what they are made from. No torch, no clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidetune.runtime.fits import fit_call, fit_gaps, fit_link, fit_serial_share, rates_together, repeated
from slidetune.units import KIB, MIB

SIZES = [4 * KIB, 64 * KIB, MIB, 16 * MIB, 256 * MIB]


def test_repeated_by_hand():
    assert repeated([3.0, 1.0, 2.0, 5.0, 4.0]) == (3.0, 1.0 / 3.0)
    assert repeated([2.0]) == (2.0, 0.0)
    assert repeated([0.0, 0.0, 0.0]) == (0.0, 0.0)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=30), st.floats(0.01, 100))
def test_spread_has_no_unit_and_lies_within_the_range(values, unit):
    value, spread = repeated(values)
    assert repeated([unit * v for v in values]) == pytest.approx((unit * value, spread))
    assert 0.0 <= spread * value <= (max(values) - min(values)) / 2 + 1e-12


@given(st.floats(1e-7, 1e-3), st.floats(1e9, 1e12), st.floats(1e9, 1e12))
def test_a_link_of_latency_and_rate_comes_back(latency, up, down):
    found = fit_link(SIZES, [latency + n / up for n in SIZES], [latency + n / down for n in SIZES])
    assert found[:3] == pytest.approx((latency, up, down), rel=1e-6)
    assert found.worst < 1e-6


def test_the_h200_probes_copies_have_14_microseconds_and_55_gb_a_second():
    sizes = [n * MIB for n in (1, 4, 16, 64, 512)]
    up, down = (
        [n / (gbs * 1e9) for n, gbs in zip(sizes, rates, strict=True)]
        for rates in ((32.2, 46.1, 52.9, 54.7, 55.2), (33.5, 47.7, 52.4, 54.8, 55.2))
    )
    found = fit_link(sizes, up, down)
    assert found.latency_s == pytest.approx(14e-6, rel=0.1)
    assert found.up_bytes_per_s == pytest.approx(55.2e9, rel=2e-3)
    assert found.worst < 0.05


@given(st.lists(st.floats(0.9, 1.1), min_size=10, max_size=10))
def test_noise_of_a_tenth_moves_the_fit_by_little_more(noise):
    seconds = [(14e-6 + n / 55e9) * factor for n, factor in zip([*SIZES, *SIZES], noise, strict=True)]
    found = fit_link(SIZES, seconds[:5], seconds[5:])
    assert found.latency_s == pytest.approx(14e-6, rel=0.2)
    assert found.up_bytes_per_s == pytest.approx(55e9, rel=0.2)
    assert found.down_bytes_per_s == pytest.approx(55e9, rel=0.2)
    assert found.worst <= 0.25


def test_the_worst_deviation_is_named():
    seconds = [10e-6 + n / 50e9 for n in SIZES]
    down = [2.0 * s if n == MIB else s for n, s in zip(SIZES, seconds, strict=True)]
    found = fit_link(SIZES, seconds, down)
    assert found.worst_bytes == MIB
    assert 0.2 < found.worst < 0.6


def test_a_link_that_caches_make_fast_for_small_copies_has_the_rate_of_large_ones():
    seconds = [n / (5e9 if n > 16 * MIB else 50e9) for n in SIZES]
    found = fit_link(SIZES, seconds, seconds)
    assert found[:3] == pytest.approx((0.0, 5e9, 5e9))
    assert found.worst == pytest.approx(9.0)


@given(st.integers(1, 5))
def test_the_largest_copy_is_as_it_was_measured(count):
    seconds = [14e-6 + n / 55e9 for n in SIZES[:count]]
    found = fit_link(SIZES[:count], seconds, [2.0 * s for s in seconds])
    assert found.latency_s + SIZES[count - 1] / found.up_bytes_per_s == pytest.approx(seconds[-1])
    assert found.latency_s + SIZES[count - 1] / found.down_bytes_per_s == pytest.approx(2.0 * seconds[-1])


@given(st.lists(st.floats(1e-7, 1.0), min_size=10, max_size=10))
def test_any_times_give_a_link_that_can_be(seconds):
    found = fit_link(SIZES, seconds[:5], seconds[5:])
    assert found.latency_s >= 0.0
    assert found.up_bytes_per_s > 0.0
    assert found.down_bytes_per_s > 0.0


def test_rates_count_while_all_of_them_run():
    # The first runs from 0 to 10 at one call a second, the second from 2 to 6 at two.
    first, second = [float(t) for t in range(11)], [2.0 + 0.5 * n for n in range(9)]
    assert rates_together([first, second]) == [[pytest.approx(1.0)], [pytest.approx(2.0)]]


def test_rates_by_windows():
    # One call a second, then one every two.
    slowing = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0]
    assert rates_together([slowing], 2) == [pytest.approx([1.0, 0.5])]
    assert rates_together([[0.0, 8.0], slowing], 4)[0] == pytest.approx([0.125] * 4)


# --- Adam's cost of a call


@given(st.floats(0, 1e-3), st.floats(1e8, 1e11))
def test_a_call_of_fixed_cost_and_rate_comes_back(call, rate):
    small, large = ((n, call + n / rate) for n in (2 * MIB, 64 * MIB))
    found = fit_call(small, large)
    if call <= 64 * MIB / rate:
        assert found.call_s == pytest.approx(call, abs=1e-9 + 1e-6 * small[1])
        assert found.per_s == pytest.approx(rate, rel=1e-6)
    assert found.call_s + 64 * MIB / found.per_s == pytest.approx(large[1])


def test_the_h100_machines_calls_cost_150_microseconds():
    # G parameters a second, 15 threads, by Mi parameters of a call.
    rates = {2: 4.39, 4: 5.48, 8: 5.99, 16: 5.84, 32: 6.32, 64: 6.26}
    seconds = {n: n * MIB / rate / 1e9 for n, rate in rates.items()}
    found = fit_call((2 * MIB, seconds[2]), (64 * MIB, seconds[64]))
    assert found.call_s == pytest.approx(150e-6, rel=0.1)
    for n, measured in seconds.items():
        assert found.call_s + n * MIB / found.per_s == pytest.approx(measured, rel=0.07)


@given(st.floats(1e-6, 1.0), st.floats(1e-6, 1.0))
def test_any_two_calls_give_a_cost_and_a_rate_that_can_be(small_s, large_s):
    found = fit_call((2 * MIB, small_s), (64 * MIB, large_s))
    assert 0.0 <= found.call_s <= small_s
    assert found.per_s > 0.0
    assert found.call_s + 64 * MIB / found.per_s == pytest.approx(large_s)


# --- kernels beside copies


# benchmarks/results/adam_h200.md: billions of parameters a second by threads.
H200_ADAM = {1: 0.85, 2: 1.59, 4: 2.71, 8: 4.02, 12: 4.70, 16: 5.54}


def test_what_one_thread_and_all_of_them_do_tells_what_others_do():
    share = fit_serial_share(H200_ADAM[1], 16, H200_ADAM[16])
    for threads, rate in H200_ADAM.items():
        # All waiting for nobody, it would be up to 2.5 times as fast.
        assert threads * H200_ADAM[1] / (1 + (threads - 1) * share) == pytest.approx(rate, rel=0.06)


@given(st.floats(0.0, 1.0), st.integers(2, 128), st.floats(1e6, 1e10))
def test_a_serial_share_comes_back(share, threads, one):
    assert fit_serial_share(one, threads, threads * one / (1 + (threads - 1) * share)) == pytest.approx(share, abs=1e-9)


def test_threads_that_help_each_other_have_no_serial_share():
    assert fit_serial_share(1.0, 4, 5.0) == fit_serial_share(1.0, 1, 0.5) == 0.0


def test_gaps_by_hand():
    # Alone they seem to cost 1 and 3 us, together 2: shared out as 1 to 3.
    assert fit_gaps(1e-6, 3e-6, 2e-6, 5e-6) == pytest.approx((0.5e-6, 1.5e-6, 2.5))
    # Neither shows anything alone: half each.
    assert fit_gaps(-1e-7, 0.0, 3e-6, 3e-6) == pytest.approx((1.5e-6, 1.5e-6, 1.0))
    # Adam can't help kernels, and a gap of next to nothing says little about him.
    assert fit_gaps(1e-6, 1e-6, 2e-6, 1e-6).adam_factor == 1.0
    assert fit_gaps(1e-6, 1e-6, 1e-9, 1e-6).adam_factor == 10.0


def test_kernels_that_copies_do_not_slow_have_no_gaps():
    assert fit_gaps(-1e-7, 1e-8, -2e-8, -1e-7) == (0.0, 0.0, 1.0)


@given(st.floats(0, 1e-4), st.floats(0, 1e-4), st.floats(1, 10))
def test_gaps_come_back(up, down, factor):
    found = fit_gaps(up, down, up + down, factor * (up + down))
    assert found[:2] == pytest.approx((up, down))
    if up + down > 1e-12:
        assert found.adam_factor == pytest.approx(factor)
