"""Masters on every tier come back bit for bit, frozen parts included."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from slidetune.runtime.adam import AdamW
from slidetune.runtime.arena import Arena
from slidetune.runtime.layout import Entry, Layout
from slidetune.runtime.masters import Master, OnDrive, State, read_master, unit_weights, write_master
from slidetune.runtime.nvme import ALIGNMENT, NvmeFile

CHUNK = 4096


def layout_of(trained, frozen):
    entries = [Entry(name="a", shape=(trained,), hyper=AdamW())]
    if frozen:
        entries.append(Entry(name="b", shape=(frozen,), hyper=None))
    return Layout.packed(entries)


def values_of(layout):
    """fp32 values; those of frozen parameters are bf16, as they come."""
    values = torch.randn(layout.total, generator=torch.Generator().manual_seed(layout.total))
    values[layout.trained :] = values[layout.trained :].to(torch.bfloat16).float()
    return values


def parts(layout, values, size=1000):
    for entry in layout.entries:
        flat = entry.of(values).flatten()
        yield entry, [(at, flat[at : at + size]) for at in range(0, flat.numel(), size)]


def test_in_ram():
    layout = layout_of(5000, 300)
    values = values_of(layout)
    high = torch.empty(layout.total, dtype=torch.bfloat16)
    low = torch.empty(layout.trained, dtype=torch.int16)
    moments = torch.ones(layout.trained), torch.ones(layout.trained)
    master = Master(layout=layout, tier="ram", high=high, state=State(high[: layout.trained], low, *moments))
    write_master(master, parts(layout, values), None)
    assert torch.equal(read_master(master), values)
    assert not any(bool(moment.any()) for moment in moments)
    assert torch.equal(unit_weights(master, None, torch.float32)["b"], values[5000:])


@given(trained=st.integers(1, 3 * CHUNK), frozen=st.integers(0, 5000), whole=st.booleans())
@settings(max_examples=25, deadline=None)
def test_on_nvme(tmp_path_factory, trained, frozen, whole):
    layout = layout_of(trained, frozen)
    values = values_of(layout)
    size = OnDrive.nbytes(layout, CHUNK, whole)
    with NvmeFile(tmp_path_factory.getbasetemp(), ALIGNMENT + size) as file, Arena(1 << 17) as arena:
        slot = arena.tensor(0, 1 << 17, torch.uint8)
        drive = OnDrive(file, ALIGNMENT, layout, CHUNK, whole)
        high = None if whole else torch.empty(layout.total, dtype=torch.bfloat16)
        master = Master(layout=layout, tier="nvme", high=high, drive=drive)
        write_master(master, parts(layout, values), slot)
        # A step reads and writes each chunk: what lies behind the last one must survive it.
        for number in range(-(-trained // CHUNK)):
            drive.read_state(slot, number)
            assert not bool(drive.staged(slot, number).exp_avg.any())
            drive.write_state(slot, number)
        assert torch.equal(read_master(master, slot), values)
        del slot
