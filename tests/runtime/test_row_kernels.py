"""Rows are gathered, and their gradients added, with the bits of torch's own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from slidetune.runtime import adam_native
from slidetune.runtime.row_kernels import gather_rows, sum_rows


@pytest.mark.parametrize("native", [True, False])
@given(rows=st.integers(1, 70), tokens=st.integers(0, 200), width=st.integers(1, 40), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_as_torch_adds_them(native, rows, tokens, width, seed):
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(0, rows, (tokens,), generator=generator)
    upstream = torch.randn(tokens, width, generator=generator).to(torch.bfloat16)
    expected = torch.ops.aten.embedding_dense_backward(upstream, places, rows, -1, False)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(adam_native, "library", lambda: None)
        found = torch.full((rows, width), 7.0, dtype=torch.bfloat16)
        sum_rows(upstream, places, found, fresh=True, threads=3)
        assert torch.equal(found, expected)
        sums = torch.full((rows, width), 7.0)
        sum_rows(upstream, places, sums, fresh=True, threads=3)
        sum_rows(upstream, places, sums, fresh=False, threads=3)
        assert torch.equal(sums, expected.float() * 2)


@pytest.mark.skipif(adam_native.library() is None, reason="needs the native kernels")
def test_special_numbers():
    upstream = torch.tensor([[float("inf"), float("nan"), 3e38], [float("-inf"), 1.0, 3e38]]).to(torch.bfloat16)
    found = torch.zeros(1, 3, dtype=torch.bfloat16)
    sum_rows(upstream, torch.zeros(2, dtype=torch.long), found, fresh=True, threads=1)
    assert found[0, :2].isnan().all()
    assert found[0, 2].isinf()


@pytest.mark.parametrize("native", [True, False])
def test_gathering(native, monkeypatch):
    if not native:
        monkeypatch.setattr(adam_native, "library", lambda: None)
    table = torch.randn(50, 7).to(torch.bfloat16)
    rows = torch.randint(0, 50, (99,))
    found = torch.empty(99, 7, dtype=torch.bfloat16)
    gather_rows(table, rows, found, threads=3)
    assert torch.equal(found, table[rows])
