"""The split master against the definition of its bits, in numpy."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from slidetune.runtime.split import join, quiet_nans, set_down, split

LOWS = np.arange(1 << 16, dtype=np.uint32)
# Upper halves of fp32 patterns: zero, denormal, smallest and largest normal, one, infinity, NaN and their neighbours.
HIGHS = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x3F81, 0x4000, 0x7F7E, 0x7F7F]
HIGHS += [0x7F80, 0x7F81, 0x7FBF, 0x7FC0, 0x7FC1, 0x7FFE, 0x7FFF]
HIGHS += [high | 0x8000 for high in HIGHS]


def from_bits(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.astype(np.uint32).view(np.int32)).view(torch.float32)


def parts(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patterns of the bf16 half, the remainders and the bits `down`, as `split` gives them."""
    high, low, down = split(from_bits(bits))
    assert (high.dtype, low.dtype, down.dtype) == (torch.bfloat16, torch.int16, torch.bool)
    return high.view(torch.int16).numpy().view(np.uint16), low.numpy(), down.numpy()


def check_exact(bits: np.ndarray) -> None:
    high, low, down = parts(bits)
    by_definition = ((high.astype(np.int64) + down) << 16) + low.astype(np.int64)
    np.testing.assert_array_equal(by_definition % (1 << 32), bits)
    assert (low[down] == -(1 << 15)).all()
    master = join(*split(from_bits(bits)))
    np.testing.assert_array_equal(master.view(torch.int32).numpy().view(np.uint32), bits)


@pytest.mark.parametrize("high", HIGHS)
def test_every_low_half_comes_back_bit_for_bit(high: int) -> None:
    check_exact((np.uint32(high) << 16) | LOWS)


@given(arrays.arrays(np.uint32, st.integers(0, 200), elements=st.integers(0, 2**32 - 1)))
def test_any_pattern_comes_back_bit_for_bit(bits: np.ndarray) -> None:
    check_exact(bits)


def test_million_random_patterns_come_back_bit_for_bit() -> None:
    check_exact(np.random.default_rng(0).integers(0, 2**32, 1 << 20, dtype=np.uint32))


@pytest.mark.parametrize("high", HIGHS)
def test_the_half_is_what_torch_rounds_to(high: int) -> None:
    """Ties, which torch rounds to even, included."""
    master = from_bits((np.uint32(high) << 16) | LOWS)
    numbers = ~master.isnan()
    assert torch.equal(split(master)[0][numbers], master[numbers].bfloat16())


@given(st.floats(width=32, allow_nan=False))
@settings(max_examples=500)
def test_any_half_is_what_torch_rounds_to(value: float) -> None:
    master = torch.tensor([value])
    assert torch.equal(split(master)[0], master.bfloat16())


def test_a_tie_down_to_even_leaves_more_than_16_bits_hold() -> None:
    """Why there is a bit more."""
    tie = np.array([0x3F808000], np.uint32)
    even = from_bits(tie).bfloat16().view(torch.int16).item()
    assert int(tie[0]) - (even << 16) == 1 << 15
    assert parts(tie)[2].all()


def test_signs_keep_the_bit() -> None:
    moment = torch.tensor([0.0, 1.5, float("inf"), 2.0])
    down = torch.tensor([True, False, True, False])
    set_down(moment, down)
    assert torch.equal(moment.signbit(), down)
    assert torch.equal(moment.abs(), torch.tensor([0.0, 1.5, float("inf"), 2.0]))
    set_down(moment, ~down)
    assert torch.equal(moment.signbit(), ~down)


@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000])
def test_infinity_stays_infinite_in_the_half(bits: int) -> None:
    high, low, _ = split(from_bits(np.array([bits])))
    assert high.isinf().all()
    assert low.item() == 0


def test_nan_of_arithmetic_stays_nan_in_the_half() -> None:
    """Quiet NaN with every payload whose rounding stays within the NaN."""
    for sign in (0, 0x80000000):
        payloads = np.concatenate([LOWS, np.arange(0, 0x3F8000, 61)]) % 0x3F8000
        high, _, _ = split(from_bits(sign | 0x7FC00000 | payloads))
        assert high.isnan().all()


def test_the_halves_that_hide_a_nan_are_the_documented_ones() -> None:
    for sign in (0, 0x80000000):
        patterns = sign | np.arange(0x7F800001, 0x80000000, dtype=np.uint32)
        high, _, _ = split(from_bits(patterns))
        hidden = patterns[~high.isnan().numpy()] & 0x7FFFFFFF
        payload = hidden & 0x7FFFFF
        assert ((payload <= 0x8000) | (payload >= 0x7F8000)).all()
        assert len(hidden) == 0x8000 + 0x8000


def test_quiet_nans_shows_every_nan_and_touches_nothing_else() -> None:
    bits = np.concatenate([0x7F800000 | LOWS, 0x7FFF0000 | LOWS, 0xFFFF0000 | LOWS, 0x3F800000 | LOWS])
    master = from_bits(bits)
    numbers = ~np.isnan(bits.view(np.float32))
    assert quiet_nans(master) is master
    assert torch.equal(split(master)[0].isnan(), torch.from_numpy(~numbers))
    after = master.view(torch.int32).numpy().view(np.uint32)
    np.testing.assert_array_equal(after[numbers], bits[numbers])
    assert (after[~numbers] == 0x7FC00000).all()


def test_shapes_and_given_outputs() -> None:
    master = torch.randn(3, 4, 5).transpose(0, 2)
    buffer = torch.zeros(2, 60, dtype=torch.int16)
    out = buffer[0].view(torch.bfloat16).view(5, 4, 3), buffer[1], torch.zeros(60, dtype=torch.bool)
    found = split(master, out=out)
    assert all(part is given for part, given in zip(found, out, strict=True))
    back = torch.empty(5, 4, 3)
    assert join(*found, out=back) is back
    assert torch.equal(back, master)
    assert [part.shape for part in split(master)] == [master.shape] * 3


def test_outputs_that_could_not_be_written_are_refused() -> None:
    master, strided = torch.zeros(4), torch.zeros(8, dtype=torch.int16)[::2]
    with pytest.raises(ValueError, match=r"out\[1\] must be contiguous, of 4 elements"):
        split(master, out=(torch.zeros(4, dtype=torch.bfloat16), strided, torch.zeros(4, dtype=torch.bool)))
    high, low, down = split(master)
    with pytest.raises(ValueError, match="high has 4 elements, low 3, down 4"):
        join(high, low[1:], down)


def test_other_dtypes_are_refused_by_name() -> None:
    full = torch.zeros(2)
    half, rest, down = split(full)
    with pytest.raises(TypeError, match=r"master must be torch\.float32, not torch\.bfloat16"):
        split(half)
    with pytest.raises(TypeError, match="high must be"):
        join(full, rest, down)
    with pytest.raises(TypeError, match="low must be"):
        join(half, full, down)
    with pytest.raises(TypeError, match=r"out\[1\] must be"):
        split(full, out=(half, half, down))
