"""Rows of the embedding tables: whatever is updated as rows and as the rest, together it is one update of all."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from slidetune.runtime.adam import AdamW, adam_step
from slidetune.runtime.masters import State
from slidetune.runtime.rows import RowGradients, RowTables
from slidetune.runtime.split import split

FAST, SLOW = AdamW(lr=0.1, weight_decay=0.1), AdamW(lr=0.01)
WIDTH = 4


def random_state(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    high, low = split(torch.randn(rows * WIDTH, generator=generator))
    first = torch.randn(rows * WIDTH, generator=generator) * 0.1
    return State(high, low, first, torch.rand(rows * WIDTH, generator=generator))


def update(state, gradient, hyper):
    adam_step(*state, gradient, hyper=hyper, step=3)


@given(
    rows=st.integers(1, 30),
    second=st.integers(0, 10),
    read_before=st.sets(st.integers(0, 39)),
    read_now=st.sets(st.integers(0, 39)),
    parts=st.integers(1, 4),
    tied=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_rows_and_rest_are_one_update_of_all(rows, second, read_before, read_now, parts, tied):
    total = rows + second
    tables = [(rows, FAST), (second, SLOW)] if second else [(rows, FAST)]
    before, now = (
        torch.tensor(sorted(i for i in ids if i < total), dtype=torch.long) for ids in (read_before, read_now)
    )
    generator = torch.Generator().manual_seed(1)
    gradients = RowGradients(before, torch.randn(before.numel(), WIDTH, generator=generator).to(torch.bfloat16))
    dense = torch.randn(total * WIDTH, generator=generator).to(torch.bfloat16) if tied else None

    found = random_state(total)
    split_up = RowTables(found, WIDTH, tables)
    for part in range(parts):
        split_up.update_rows(now.tensor_split(parts)[part], dense, gradients, update)
    for part in range(parts):
        split_up.update_rest(part, parts, now, dense, gradients, update)

    expected = random_state(total)
    whole = torch.zeros(total * WIDTH, dtype=torch.bfloat16) if dense is None else dense.clone()
    whole.view(total, WIDTH)[before] += gradients.values
    start = 0
    for count, hyper in tables:
        span = slice(start * WIDTH, (start + count) * WIDTH)
        update(State(*(part[span] for part in expected)), whole[span], hyper)
        start += count
    for name, one, other in zip(State._fields, found, expected, strict=True):
        assert torch.equal(one, other), name


def test_frozen_tables_are_left_alone():
    state = random_state(5)
    before = [part.clone() for part in state]
    tables = RowTables(state, WIDTH, [(5, None)])
    tables.update_rows(torch.tensor([1, 2]), None, None, update)
    tables.update_rest(0, 1, torch.tensor([1, 2]), None, None, update)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_places_of_common_ids():
    gradients = RowGradients(torch.tensor([2, 5, 9]), torch.zeros(3, WIDTH))
    here, there = gradients.of(torch.tensor([1, 2, 9, 10]))
    assert here.tolist() == [1, 2]
    assert there.tolist() == [0, 2]
