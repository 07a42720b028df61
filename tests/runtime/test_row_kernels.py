"""Rows are gathered, and their gradients added, with the bits of torch's own."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from slidetune.runtime import adam_native
from slidetune.runtime.adam import AdamW, adam_step
from slidetune.runtime.row_kernels import (
    Readers,
    ReadersThere,
    gather_rows,
    growth_of_squares,
    sum_rows,
    sum_rows_there,
)


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
        readers = Readers.of(places, rows)
        sum_rows(upstream, readers, found, fresh=True, threads=3)
        assert torch.equal(found, expected)
        sums = torch.full((rows, width), 7.0)
        sum_rows(upstream, readers, sums, fresh=True, threads=3)
        sum_rows(upstream, readers, sums, fresh=False, threads=3)
        assert torch.equal(sums, expected.float() * 2)


@pytest.mark.skipif(adam_native.library() is None, reason="needs the native kernels")
def test_special_numbers():
    upstream = torch.tensor([[float("inf"), float("nan"), 3e38], [float("-inf"), 1.0, 3e38]]).to(torch.bfloat16)
    found = torch.zeros(1, 3, dtype=torch.bfloat16)
    sum_rows(upstream, Readers.of(torch.zeros(2, dtype=torch.long), 1), found, fresh=True, threads=1)
    assert found[0, :2].isnan().all()
    assert found[0, 2].isinf()


@pytest.mark.skipif(adam_native.library() is None, reason="needs the native kernels")
def test_every_number_that_is_read_once():
    upstream = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(-1, 256)
    places = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    found = torch.zeros_like(upstream)
    sum_rows(upstream, Readers.of(places, 256), found, fresh=True, threads=2)
    expected = torch.ops.aten.embedding_dense_backward(upstream, places, 256, -1, False)
    numbers = ~expected.isnan()
    assert torch.equal(found.view(torch.int16)[numbers], expected.view(torch.int16)[numbers])
    assert (found.view(torch.int16)[~numbers] == 0x7FC0).all()


@pytest.mark.parametrize("native", [True, False])
@given(rows=st.integers(1, 90), width=st.integers(1, 40), tied=st.booleans(), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_squares_grow_as_if_all_were_squared_again(native, rows, width, tied, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(120, width, generator=generator).to(torch.bfloat16)
    ids = torch.randperm(120, generator=generator)[:rows].sort().values
    values = torch.randn(rows, width, generator=generator).to(torch.bfloat16)
    whole = dense if tied else torch.zeros_like(dense)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(adam_native, "library", lambda: None)
        found = growth_of_squares(values, ids, dense if tied else None, threads=3)
    after = whole.clone()
    after[ids] += values
    assert found == pytest.approx(float(after.double().square().sum() - whole.double().square().sum()), abs=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 3, 500])
@pytest.mark.parametrize("width", [8, 1024, 1544])
def test_summed_on_the_device_to_the_same_bits(rows, width):
    tokens = 700
    places = torch.randint(0, rows, (tokens,), generator=torch.Generator().manual_seed(rows))
    upstream = torch.randn(tokens, width).to(torch.bfloat16)
    # Zero and -0.0 is zero.
    upstream[::5] = -0.0
    readers = Readers.of(places, rows)
    expected = torch.empty(rows, width, dtype=torch.bfloat16)
    sum_rows(upstream, readers, expected, fresh=True, threads=2)
    found = torch.full((rows, width), 7.0, dtype=torch.bfloat16, device="cuda")
    sum_rows_there(upstream.cuda(), readers.on(torch.device("cuda")), found)
    assert torch.equal(found.cpu().view(torch.int16), expected.view(torch.int16))


def test_readers_must_fit_what_is_summed_there():
    readers = ReadersThere(torch.zeros(4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))
    rows = torch.zeros(2, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="readers of 2 rows by 4 tokens don't fit"):
        sum_rows_there(torch.zeros(5, 8, dtype=torch.bfloat16), readers, rows)
    with pytest.raises(ValueError, match="bf16 needed"):
        sum_rows_there(torch.zeros(4, 8), readers, rows)


@pytest.mark.parametrize("native", [True, False])
def test_gathering(native, monkeypatch):
    if not native:
        monkeypatch.setattr(adam_native, "library", lambda: None)
    table = torch.randn(50, 7).to(torch.bfloat16)
    rows = torch.randint(0, 50, (99,))
    found = torch.empty(99, 7, dtype=torch.bfloat16)
    gather_rows(table, rows, found, threads=3)
    assert torch.equal(found, table[rows])


def adam_state(count):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(count, generator=generator)
    return [
        numbers.to(torch.bfloat16),
        torch.zeros(count, dtype=torch.int16),
        numbers.mul(1e-3),
        numbers.square(),
        numbers.flip(0).to(torch.bfloat16),
    ]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_beside_adam_whose_threads_help(threads):
    """Rows that come in the middle of updates are right, and so are the updates."""
    count, steps, rows, width = 300_000, 30, 400, 24
    generator = torch.Generator().manual_seed(1)
    table, upstream = (torch.randn(n, width, generator=generator).to(torch.bfloat16) for n in (rows, 5_000))
    places = torch.randint(0, rows, (5_000,), generator=generator)
    readers = Readers.of(places, rows)
    sums = torch.ops.aten.embedding_dense_backward(upstream, places, rows, -1, False)
    alone, beside = adam_state(count), adam_state(count)

    def train(state):
        for step in range(1, steps + 1):
            adam_step(*state, hyper=AdamW(lr=1e-2), step=step, threads=threads)

    train(alone)
    trained = threading.Event()
    wrong = []

    def look(kind):
        while not trained.is_set():
            found = torch.empty(5_000 if kind == "gather" else rows, width, dtype=torch.bfloat16)
            if kind == "gather":
                gather_rows(table, places, found, threads=threads)
                expected = table[places]
            else:
                sum_rows(upstream, readers, found, fresh=True, threads=threads)
                expected = sums
            if not torch.equal(found, expected):
                wrong.append(kind)

    lookers = [threading.Thread(target=look, args=(kind,)) for kind in ("gather", "sum")]
    for thread in lookers:
        thread.start()
    train(beside)
    trained.set()
    for thread in lookers:
        thread.join()
    assert not wrong
    assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))
