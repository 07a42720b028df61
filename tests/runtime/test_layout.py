"""Flat layouts: every parameter once, without gaps, trained ones first."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from slidetune.runtime.adam import AdamW
from slidetune.runtime.layout import Entry, Layout

HYPERS = (AdamW(), AdamW(weight_decay=0.1), None)
entries = st.lists(
    st.builds(
        Entry,
        name=st.text("ab", min_size=1, max_size=3),
        shape=st.lists(st.integers(1, 80), min_size=1, max_size=2).map(tuple),
        hyper=st.sampled_from(HYPERS),
    ),
    min_size=1,
    max_size=9,
)


@given(entries)
def test_a_layout_has_no_gaps(given_entries):
    layout = Layout.packed(given_entries)
    assert sorted((e.name, e.shape) for e in layout.entries) == sorted((e.name, e.shape) for e in given_entries)
    at = 0
    for entry in layout.entries:
        assert entry.start == at
        at = entry.stop
    assert layout.total == at
    assert layout.trained == sum(e.numel for e in given_entries if e.hyper is not None)
    assert all((e.stop <= layout.trained) == (e.hyper is not None) for e in layout.entries)


@given(entries, st.data())
def test_pieces_are_the_runs_inside(given_entries, data):
    layout = Layout.packed(given_entries)
    start = data.draw(st.integers(0, layout.trained))
    stop = data.draw(st.integers(start, layout.trained))
    pieces = list(layout.pieces(start, stop))
    assert [i for low, high, _ in pieces for i in range(low, high)] == list(range(start, stop))
    for low, high, hyper in pieces:
        assert all(e.hyper == hyper for e in layout.entries if e.start < high and low < e.stop)


def test_every_parameter_is_as_well_aligned_as_its_size_allows():
    decays, plain = AdamW(weight_decay=0.1), AdamW()
    layout = Layout.packed(
        [
            Entry(name="norm", shape=(5,), hyper=plain),
            Entry(name="q", shape=(64, 2), hyper=decays),
            Entry(name="norm2", shape=(64,), hyper=plain),
            Entry(name="k", shape=(64,), hyper=decays),
        ]
    )
    # Grouped products want 16 bytes; equal hyper-parameters stand together among what is aligned alike.
    assert [e.name for e in layout.entries] == ["norm2", "q", "k", "norm"]
    assert all(e.start % math.gcd(e.numel, 64) == 0 for e in layout.entries)
    assert layout.runs == ((0, 64, plain), (64, 256, decays), (256, 261, plain))


def test_a_view():
    layout = Layout.packed([Entry(name="a", shape=(2, 3), hyper=None)])
    flat = torch.arange(10.0)
    assert layout.entries[0].of(flat).tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
