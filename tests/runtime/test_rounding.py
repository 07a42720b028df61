"""Rounding in place gives what a copy to bf16 gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from slidetune.runtime import rounding


@given(count=st.integers(0, 3000), first=st.integers(1, 600))
def test_as_a_copy_rounds(count, first):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    expected = values.to(torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "_FIRST", first)
        rounded = rounding.round_in_place(values)
    assert torch.equal(rounded, expected)
    assert rounded.data_ptr() == values.data_ptr()
    assert torch.equal(rounding.as_rounded(values), expected)


def test_bf16_is_left_alone():
    values = torch.ones(3, dtype=torch.bfloat16)
    assert rounding.as_rounded(values) is values
