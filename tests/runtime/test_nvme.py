"""The NVMe tier: what is written comes back, and every failure names operation, file and cause."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slidetune.runtime import nvme
from slidetune.runtime.arena import Arena
from slidetune.runtime.nvme import ALIGNMENT, NvmeError, NvmeFile, aligned

PAGES = 32
SIZE = PAGES * ALIGNMENT


@pytest.fixture(scope="module")
def memory() -> Iterator[Arena]:
    with Arena(4 * SIZE) as arena:
        yield arena


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether the folder for temporary files is on a disk with O_DIRECT."""
    try:
        NvmeFile(tmp_path_factory.mktemp("probe"), ALIGNMENT).close()
    except NvmeError:
        return False
    return True


def tensor(memory: Arena, pages: int = PAGES, at: int = 0) -> torch.Tensor:
    return memory.tensor(at * ALIGNMENT, pages * ALIGNMENT, torch.uint8)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("disks", [1, 3])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(writes=st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES), st.integers(0, 255)), max_size=6))
def test_reads_return_the_last_write(
    tmp_path: Path, memory: Arena, direct: bool, disks: int, writes: list[tuple[int, int, int]]
) -> None:
    folders = [tmp_path / str(disk) for disk in range(disks)]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    expected = torch.zeros(SIZE, dtype=torch.uint8)
    written = 0
    with NvmeFile(folders, SIZE, request_bytes=3 * ALIGNMENT, threads=3, direct=direct) as file:
        for page, pages, value in writes:
            pages = min(pages, PAGES - page)
            data = tensor(memory, pages).random_(generator=torch.Generator().manual_seed(value))
            file.write(page * ALIGNMENT, data)
            expected[page * ALIGNMENT : (page + pages) * ALIGNMENT] = data
            written += data.nbytes
        back = tensor(memory).fill_(99)
        file.read(0, back)
        assert torch.equal(back, expected)
        assert (file.bytes_written, file.bytes_read) == (written, SIZE)


def test_tensors_of_any_dtype_and_shape(tmp_path: Path, memory: Arena, direct: bool) -> None:
    halves = memory.tensor(0, (4, 512), torch.bfloat16).normal_()
    back = memory.tensor(SIZE, (4, 512), torch.bfloat16)
    with NvmeFile(tmp_path, 4096, direct=direct) as file:
        file.write(0, halves)
        file.read(0, back)
    assert torch.equal(halves, back)


def test_reads_and_writes_at_once(tmp_path: Path, memory: Arena, direct: bool) -> None:
    errors = []
    with NvmeFile(tmp_path, 2 * SIZE, request_bytes=ALIGNMENT, direct=direct) as file:

        def user(value: int) -> None:
            mine = tensor(memory, PAGES, at=value * PAGES)
            for _ in range(20):
                file.write(value * SIZE, mine.fill_(value + 1))
                file.read(value * SIZE, mine.zero_())
                if not (mine == value + 1).all():
                    errors.append(value)

        users = [threading.Thread(target=user, args=(value,)) for value in range(2)]
        for each in users:
            each.start()
        for each in users:
            each.join()
    assert not errors


def test_space_is_taken_at_once_and_all_is_gone_after_close(tmp_path: Path, direct: bool) -> None:
    descriptors, threads = open_descriptors(), threading.active_count()
    file = NvmeFile(tmp_path, 40 * ALIGNMENT - 1, direct=direct)
    # Without a name from the start: a killed process leaves nothing either.
    assert not list(tmp_path.iterdir())
    status = os.fstat(file._fds[0])
    assert status.st_size == file.nbytes == 40 * ALIGNMENT
    assert status.st_blocks * 512 >= status.st_size
    file.close()
    file.close()
    assert open_descriptors() == descriptors
    assert threading.active_count() == threads
    with pytest.raises(ValueError, match="closed"):
        file.read(0, torch.empty(0))


def test_everything_is_gone_after_an_error_inside(tmp_path: Path, direct: bool) -> None:
    descriptors, threads = open_descriptors(), threading.active_count()
    with pytest.raises(RuntimeError, match="a lane failed"), NvmeFile(tmp_path, SIZE, direct=direct):
        raise RuntimeError("a lane failed")
    assert not list(tmp_path.iterdir())
    assert (open_descriptors(), threading.active_count()) == (descriptors, threads)


def test_a_disk_too_small_shows_at_the_start(tmp_path: Path) -> None:
    space = os.statvfs(tmp_path)
    descriptors = open_descriptors()
    with pytest.raises(NvmeError, match=r"NVMe file .*\.nvme cannot be made: disk full: .* needed, .* free") as caught:
        NvmeFile(tmp_path, space.f_bavail * space.f_frsize * 2, direct=False)
    assert caught.value.errno == errno.ENOSPC
    assert open_descriptors() == descriptors
    assert not list(tmp_path.iterdir())


def test_a_limit_that_only_the_allocation_meets(tmp_path: Path) -> None:
    """As a quota would: there is space, and still the system refuses."""
    descriptors = open_descriptors()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(NvmeError, match=r"NVMe file .*\.nvme cannot be made: File too large"):
            NvmeFile(tmp_path, 2 << 20, direct=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert open_descriptors() == descriptors
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_writing(
    tmp_path: Path, memory: Arena, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copy-on-write file systems: allocating is no promise."""

    def full(fd: int, buffers: list, offset: int) -> int:
        if offset == 2 * ALIGNMENT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(buffers[0])

    monkeypatch.setattr(nvme.os, "pwritev", full)
    with NvmeFile(tmp_path, SIZE, request_bytes=ALIGNMENT, direct=direct) as file:
        with pytest.raises(NvmeError) as caught:
            file.write(0, tensor(memory))
        assert caught.value.errno == errno.ENOSPC
        text = str(caught.value)
        assert f"NVMe write of {ALIGNMENT} bytes at {2 * ALIGNMENT} in {file.paths[0]} failed: No space left" in text
        assert file.bytes_written == 0


def test_a_file_cut_short_is_a_read_error(tmp_path: Path, memory: Arena, direct: bool) -> None:
    with NvmeFile(tmp_path, SIZE, request_bytes=4 * ALIGNMENT, direct=direct) as file:
        os.ftruncate(file._fds[0], 10 * ALIGNMENT)
        with pytest.raises(NvmeError, match=r"NVMe read of 16384 bytes at 32768 in .* failed: the file ends before"):
            file.read(0, tensor(memory))
        file.write(0, tensor(memory))
        file.read(0, tensor(memory))


def test_after_an_error_no_request_is_still_at_the_tensor(
    tmp_path: Path, memory: Arena, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, both_in = set(), threading.Barrier(2, timeout=10)

    def read(fd: int, buffers: list, offset: int) -> int:
        running.add(offset)
        if offset < 2 * ALIGNMENT:
            both_in.wait()
        if offset == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        # Slower than the failure, so that only waiting for it can be right.
        threading.Event().wait(0.05)
        running.discard(offset)
        return len(buffers[0])

    monkeypatch.setattr(nvme.os, "preadv", read)
    with NvmeFile(tmp_path, SIZE, request_bytes=ALIGNMENT, threads=2, direct=direct) as file:
        with pytest.raises(NvmeError, match=r"NVMe read of 4096 bytes at 0 in .* failed: Input/output error"):
            file.read(0, tensor(memory))
        assert running == {0}


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs here")
def test_memory_file_systems_are_refused() -> None:
    with pytest.raises(NvmeError, match=r"/dev/shm is RAM \(tmpfs\); choose a folder on a disk"):
        NvmeFile("/dev/shm", SIZE)
    # The documented way for tests.
    with NvmeFile("/dev/shm", SIZE, direct=False) as file, Arena(SIZE) as arena:
        data = tensor(arena).fill_(3)
        file.write(0, data)
        file.read(0, data.zero_())
        assert (data == 3).all()
        del data


def test_a_file_system_without_direct_access_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, command: int, flags: int = 0) -> int:
        if command == nvme.fcntl.F_SETFL:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return 0

    monkeypatch.setattr(nvme.fcntl, "fcntl", refuse)
    monkeypatch.setattr(nvme, "_refuse_ram", lambda folder: None)
    descriptors = open_descriptors()
    with pytest.raises(NvmeError, match="offers no direct access"):
        NvmeFile(tmp_path, SIZE)
    assert open_descriptors() == descriptors


def test_the_page_cache_stays_out(tmp_path: Path, direct: bool) -> None:
    if not direct:
        pytest.skip("the temporary folder has no O_DIRECT")
    with NvmeFile(tmp_path, SIZE) as file:
        assert nvme.fcntl.fcntl(file._fds[0], nvme.fcntl.F_GETFL) & os.O_DIRECT


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(NvmeError, match=r"NVMe file .*nowhere.* cannot be made: No such file or directory"):
        NvmeFile(tmp_path / "nowhere", SIZE)


def test_what_is_not_aligned_or_outside_is_refused(tmp_path: Path, memory: Arena, direct: bool) -> None:
    with NvmeFile(tmp_path, SIZE, direct=direct) as file:
        with pytest.raises(ValueError, match="NVMe read: offset 512 is no multiple of 4096"):
            file.read(512, tensor(memory, 1))
        with pytest.raises(ValueError, match="NVMe write: size 4095 is no multiple"):
            file.write(0, tensor(memory, 1)[1:])
        with pytest.raises(ValueError, match=r"NVMe read: address .* is no multiple"):
            file.read(0, memory.tensor(512, 4096, torch.uint8))
        with pytest.raises(ValueError, match="bytes 4096 to 135168 of a file of 131072 bytes"):
            file.read(ALIGNMENT, tensor(memory))
        with pytest.raises(ValueError, match="contiguous CPU tensor"):
            file.read(0, tensor(memory)[::2])
    for sizes in ({"nbytes": 0}, {"nbytes": 1, "request_bytes": 1000}, {"nbytes": 1, "threads": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            NvmeFile(tmp_path, **sizes)


def test_aligned_rounds_up() -> None:
    assert [aligned(size) for size in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
