"""Rows of the embedding tables: whatever is updated as rows and as the rest, together it is one update of all."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from slidetune.plans import Plan
from slidetune.runtime.adam import AdamW, adam_implementations, adam_rows, adam_step
from slidetune.runtime.masters import State
from slidetune.runtime.rows import RowGradients, RowTables
from slidetune.runtime.split import set_down, split
from slidetune.runtime.trainer import SlidingTrainer, decay_where_it_belongs

from ..slidetune.reference import SMALL_CONFIGS
from .reference import (
    DEVICE,
    PlainLoop,
    assert_same_losses,
    assert_same_weights,
    make_model,
    random_batches,
    weights_on_cpu,
)

FAST, SLOW = AdamW(lr=0.1, weight_decay=0.1), AdamW(lr=0.01)
WIDTH = 4


def random_state(rows):
    return wide_state(rows * WIDTH)


def update(state, rows, places, values, dense, hyper):
    adam_rows(*state, width=WIDTH, rows=rows, places=places, values=values, dense=dense, hyper=hyper, step=3)


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
        adam_step(*(part[span] for part in expected), whole[span], hyper=hyper, step=3)
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


def test_places_of_ids():
    gradients = RowGradients(torch.tensor([2, 5, 9]), torch.zeros(3, WIDTH))
    assert gradients.places(np.array([1, 2, 9, 10])).tolist() == [-1, 0, 2, -1]


@pytest.mark.parametrize("implementation", adam_implementations())
@pytest.mark.parametrize("has_dense", [False, True])
@pytest.mark.parametrize("width", [1, 16, 33, 40000])
def test_rows_are_updated_in_place_as_all_are(implementation, has_dense, width):
    generator = torch.Generator().manual_seed(0)
    count = 9
    found = wide_state(count * width)
    expected = State(*(part.clone() for part in found))
    rows, places = torch.tensor([7, 0, 3]), torch.tensor([1, -1, 0])
    values = torch.randn(2, width, generator=generator).to(torch.bfloat16)
    dense = torch.randn(count * width, generator=generator).to(torch.bfloat16) if has_dense else None
    adam_rows(
        *found,
        width=width,
        rows=rows,
        places=places,
        values=values,
        dense=dense,
        hyper=FAST,
        step=3,
        grad_scale=0.5,
        threads=2,
        implementation=implementation,
    )
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        span = slice(row * width, (row + 1) * width)
        own = torch.zeros(width, dtype=torch.bfloat16) if dense is None else dense[span]
        gradient = own + values[place] if place >= 0 else own
        adam_step(*(part[span] for part in expected), gradient, hyper=FAST, step=3, grad_scale=0.5)
    for name, one, other in zip(State._fields, found, expected, strict=True):
        assert torch.equal(one, other), name


def wide_state(count):
    generator = torch.Generator().manual_seed(2)
    high, low, down = split(torch.randn(count, generator=generator))
    state = State(high, low, torch.randn(count, generator=generator), torch.rand(count, generator=generator))
    set_down(state.exp_avg_sq, down)
    return state


@pytest.mark.parametrize(("rows", "places"), [([5], [0]), ([-1], [0]), ([0], [1])])
def test_rows_outside_are_refused(rows, places):
    with pytest.raises(IndexError):
        adam_rows(
            *random_state(5),
            width=WIDTH,
            rows=torch.tensor(rows),
            places=torch.tensor(places),
            values=torch.zeros(1, WIDTH, dtype=torch.bfloat16),
            hyper=FAST,
            step=1,
        )


@pytest.mark.parametrize("update", ["backward", "forward"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_whatever_rows_a_step_shares_with_the_one_before(name, update):
    """All, some, none; with the last update finished in between or not."""
    config = SMALL_CONFIGS[name]
    plan = Plan(model=f"small {name}", seq_len=16, micro_batch=2, chunk_bytes=8192, adam_threads=2, update=update)
    one, other = (batch["input_ids"] for batch in random_batches(config, plan, 2))
    half = config["vocab_size"] // 2
    batches = [one % half, one % half, other % half + half, other, one, torch.full_like(one, 7), other % half]
    rule = decay_where_it_belongs(AdamW(lr=1e-2, weight_decay=0.1))
    loop = PlainLoop(make_model(config), rule=rule)
    with SlidingTrainer(make_model(config), plan, rule=rule, device=DEVICE) as trainer:
        for number, ids in enumerate(batches):
            assert_same_losses([trainer.step({"input_ids": ids})], [loop.step({"input_ids": ids})])
            if number % 3 == 1:
                trainer.finish()
        on_cpu = partial(weights_on_cpu, make_model(config), [{"input_ids": ids} for ids in batches], rule=rule)
        assert_same_weights(trainer.state_dict(), loop.state_dict(), on_cpu)
