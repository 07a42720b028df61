"""Arenas: exact, aligned, in large pages, and gone when closed."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from slidetune.runtime import arena as module
from slidetune.runtime.arena import HUGE_PAGE, Arena, available_bytes

MIB = 1 << 20
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def mapping_of(address: int) -> dict[str, int]:
    """What the kernel says of the mapping at an address: its start and end, and sizes in bytes."""
    found: dict[str, int] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if "-" in key and not key.endswith(":"):
            start, end = (int(part, 16) for part in key.split("-"))
            if found:
                return found
            if start <= address < end:
                found = {"start": start, "end": end}
        elif found and key in ("Rss:", "AnonHugePages:"):
            found[key[:-1]] = int(values[0]) * 1024
    return found


def test_memory_is_aligned_zeroed_and_there_to_the_page() -> None:
    size = 5 * MIB + 4097
    with Arena(size) as arena:
        whole = arena.tensor(0, size, torch.uint8)
        assert whole.data_ptr() % HUGE_PAGE == 0
        assert whole.count_nonzero() == 0
        mapping = mapping_of(whole.data_ptr())
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        assert mapping["end"] - whole.data_ptr() == pages
        assert mapping["Rss"] == pages
        del whole


@pytest.mark.skipif(
    "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(), reason="large pages are off"
)
def test_memory_is_in_large_pages() -> None:
    with Arena(64 * MIB) as arena:
        assert mapping_of(arena.tensor(0, 1, torch.uint8).data_ptr())["AnonHugePages"] >= 32 * MIB


def test_views_share_memory_at_their_offsets() -> None:
    with Arena(4096) as arena:
        arena.tensor(8, (2, 3), torch.float32).copy_(torch.arange(6).view(2, 3))
        assert arena.tensor(12, 2, torch.float32).tolist() == [1, 2]
        assert arena.tensor(4096, 0, torch.float32).shape == (0,)
        half = arena.tensor(4094, (1,), torch.bfloat16)
        half.fill_(1)
        assert arena.tensor(4094, (), torch.int16).item() == 0x3F80
        del half


def test_close_gives_the_memory_back() -> None:
    arena = Arena(32 * MIB)
    address = arena.tensor(0, 1, torch.uint8).data_ptr()
    assert mapping_of(address)["Rss"] == 32 * MIB
    arena.close()
    arena.close()
    assert not arena.mapped
    assert mapping_of(address).get("Rss", 0) < 32 * MIB
    with pytest.raises(ValueError, match="closed"):
        arena.tensor(0, 1, torch.uint8)


def test_a_view_left_over_keeps_its_memory_and_nothing_else_does() -> None:
    arena = Arena(4096, name="slots")
    view = arena.tensor(0, 4, torch.float32)[1:3]
    arena.close()
    assert arena.mapped
    view.fill_(7)
    assert view.tolist() == [7, 7]
    del view
    assert not arena.mapped


def test_memory_goes_after_an_error_inside() -> None:
    arena = None
    try:
        with Arena(4096) as arena:
            view = arena.tensor(0, 4, torch.float32)
            raise RuntimeError("a lane failed")
    except RuntimeError:
        del view
    gc.collect()
    assert arena is not None
    assert not arena.mapped


def test_what_does_not_fit_is_refused() -> None:
    with Arena(100, name="slots") as arena:
        with pytest.raises(ValueError, match=r"slots has 100 bytes; torch\.float32 \(26,\) would take 0 to 104"):
            arena.tensor(0, 26, torch.float32)
        with pytest.raises(ValueError, match="offset 2 is no multiple of 4 bytes"):
            arena.tensor(2, 1, torch.float32)
        with pytest.raises(ValueError, match="would take -4 to 0"):
            arena.tensor(-4, 1, torch.float32)
    with pytest.raises(ValueError, match="must be positive"):
        Arena(0)


def test_too_much_memory_is_refused_before_it_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryError, match=r"masters needs .* GiB of host memory; .* is available"):
        Arena(available_bytes() + (1 << 40), name="masters")
    monkeypatch.setattr(module, "available_bytes", lambda: 1 << 62)
    with pytest.raises(MemoryError, match=r"masters needs .* the system refused"):
        Arena(1 << 60, name="masters")


def test_available_memory_is_bounded_by_the_machine() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < available_bytes() <= total


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_nothing_is_locked_without_cuda() -> None:
    with Arena(4096, pin=True) as arena:
        assert not arena.pinned


@needs_cuda
def test_pages_are_locked_for_cuda_and_unlocked_on_close() -> None:
    with Arena(3 * MIB + 5, pin=True) as arena:
        view = arena.tensor(0, 100, torch.float32)
        assert arena.pinned
        assert view.is_pinned()
        view.copy_(torch.arange(100))
        on_gpu = view.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(on_gpu.cpu(), torch.arange(100.0))
    assert not arena.pinned
    assert not view.is_pinned()
    del view
    assert not arena.mapped
