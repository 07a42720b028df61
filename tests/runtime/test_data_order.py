"""Order is a permutation of its own each epoch, the same everywhere; a run that goes on sees what it would have."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")

from slidetune.errors import SlidetuneError
from slidetune.runtime.data import Batches
from slidetune.runtime.data.documents import Documents, Piece
from slidetune.runtime.data.order import epoch_batches, hashes, is_held_out, shuffled

SEEDS = st.integers(0, 2**40)


def batches(lengths=(3, 70, 5, 130, 2), *, batch=2, seed=0, packed=False, fingerprint="a"):
    stored = Documents()
    for number, length in enumerate(lengths):
        stored.add(Piece([number] * length, [-100] + [number] * (length - 1)))
    sequences = [[number] for number in range(len(lengths))]
    how = {"batch": batch, "seq_len": 150, "seed": seed, "packed": packed, "fingerprint": fingerprint}
    return Batches(stored, sequences, **how)


def test_hashes_are_the_same_for_good():
    assert hashes(3, 1, 2).tolist() == [7856015880585239489, 3094976796629159923, 7165454640083935283]
    assert shuffled(8, 7, 0).tolist() == [1, 4, 0, 3, 6, 5, 2, 7]
    assert [is_held_out(bytes([n]), 0.5, 3) for n in range(4)] == [True, True, False, False]


def test_hashes_are_even():
    bits = np.unpackbits(hashes(4096, 5).view(np.uint8).reshape(-1, 8), axis=1).mean(0)
    assert abs(bits - 0.5).max() < 0.05


@given(st.lists(st.integers(1, 9), max_size=300), st.integers(1, 5), SEEDS, st.integers(0, 3))
def test_an_epoch_has_every_sequence_once(widths, batch, seed, epoch):
    found = epoch_batches(np.array(widths, dtype=np.int64), batch, seed, epoch)
    assert sorted(n for numbers in found for n in numbers.tolist()) == list(range(len(widths)))
    assert all(len(numbers) == batch for numbers in found[:-1])
    assert all(0 < len(numbers) <= batch for numbers in found)


def test_epochs_and_seeds_differ():
    orders = {tuple(shuffled(20, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_batches_are_of_like_width():
    widths = np.array([1, 100] * 64)
    spread = [np.ptp(widths[numbers]) for numbers in epoch_batches(widths, 4, 0, 0)]
    assert sum(spread) == 0


def test_padded_batches():
    lengths = (3, 70, 5, 130, 2)
    found = list(batches(lengths).epoch())
    seen = []
    for batch in found:
        assert batch.keys() == {"input_ids", "labels"}
        rows = [row[row != -100] for row in batch["labels"]]
        seen += [(int(row[0]), len(row) + 1) for row in rows if len(row)]
        longest = max(len(row) + 1 for row in rows)
        assert batch["input_ids"].shape == batch["labels"].shape == (2, min(-(-longest // 64) * 64, 150))
    assert sorted(seen) == list(enumerate(lengths))


@pytest.mark.parametrize("packed", [True, False])
def test_the_last_batch_is_filled_up_without_labels(packed):
    last = list(batches(packed=packed).epoch())[-1]
    assert last["input_ids"].shape[0] == 2
    assert bool((last["labels"][1] == -100).all())


@given(
    st.lists(st.integers(2, 150), min_size=1, max_size=12),
    st.integers(1, 4),
    SEEDS,
    st.integers(0, 20),
    st.booleans(),
)
def test_going_on_anywhere_gives_the_same_batches(lengths, batch, seed, steps, packed):
    how = {"batch": batch, "seed": seed, "packed": packed}
    whole = batches(lengths, **how)
    for _ in range(steps):
        next(whole)
    position = json.loads(json.dumps(whole.position()))
    again = batches(lengths, **how)
    again.restore(position)
    for _ in range(6):
        expected, found = next(whole), next(again)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert again.position() == whole.position()


def test_iterating_is_epoch_after_epoch():
    data = batches()
    assert len(data) == 3
    expected = [batch for number in (0, 1) for batch in data.epoch(number)]
    assert data.position() == {"epoch": 0, "batch": 0, "data": "a"}
    found = [next(data) for _ in range(6)]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(expected, found, strict=True))
    assert data.position() == {"epoch": 2, "batch": 0, "data": "a"}


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ({"epoch": 0, "batch": 0, "data": "b"}, "other data"),
        ({}, "other data"),
        (3, "other data"),
        ({"epoch": 0, "batch": 3, "data": "a"}, "batch 3 is no data position; an epoch has 3 batches"),
        ({"epoch": -1, "batch": 0, "data": "a"}, "epoch -1"),
        ({"data": "a"}, "epoch None"),
    ],
)
def test_positions_that_are_none(position, message):
    with pytest.raises(SlidetuneError, match=message) as caught:
        batches().restore(position)
    assert caught.value.hint


@given(st.binary(min_size=1, max_size=8), st.integers(0, 99), SEEDS)
def test_a_larger_share_holds_out_what_a_smaller_did(content, percent, seed):
    if is_held_out(content, percent / 100, seed):
        assert is_held_out(content, (percent + 1) / 100, seed)


def test_the_share_is_about_what_is_asked():
    held = sum(is_held_out(n.to_bytes(4, "little"), 0.1, 1) for n in range(5000))
    assert 400 < held < 600
