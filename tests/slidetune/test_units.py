"""Figures as people read them: three digits, a unit, never an exponent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidetune.units import GIB, MIB, format_bytes, format_count, format_seconds


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (format_bytes(0), "0 B"),
        (format_bytes(1023), "1023 B"),
        (format_bytes(1536), "1.5 KiB"),
        (format_bytes(640 * MIB), "640 MiB"),
        (format_bytes(1023.9 * MIB), "1,024 MiB"),
        (format_bytes(12.34 * GIB), "12.3 GiB"),
        (format_bytes(1862.6 * GIB), "1,863 GiB"),
        (format_bytes(-2 * GIB), "-2 GiB"),
        (format_seconds(7800), "2 h 10 min"),
        (format_seconds(321.4), "321 s"),
        (format_seconds(3.512), "3.51 s"),
        (format_seconds(0.99996), "1,000 ms"),
        (format_seconds(0.0124), "12.4 ms"),
        (format_seconds(8e-5), "80 µs"),
        (format_count(8_030_261_248), "8.03 B"),
        (format_count(999_885_952), "1,000 M"),
        (format_count(123e9), "123 B"),
        (format_count(999), "999"),
    ],
)
def test_examples(text, wanted):
    assert text == wanted


@given(st.floats(0, 1e15), st.sampled_from((format_bytes, format_count, format_seconds)))
def test_no_exponents(value, write):
    number = write(value).split()[0]
    assert "e" not in number or value < 1e-9  # less than a nanosecond is no duration of ours
