"""The NVMe tier: host tensors to and from preallocated files, past the page cache.

`O_DIRECT`, aligned requests, and a few threads in `preadv` and `pwritev` reach a disk's speed without a dependency.
The page cache would copy every byte through the DRAM bandwidth that Adam needs, and take the RAM the plan counts on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from slidetune.errors import SlidetuneError
from slidetune.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 4096
"""Offsets, lengths and addresses are multiples of this, in bytes."""

_RAM_FILE_SYSTEMS = {"tmpfs", "ramfs"}


class NvmeError(SlidetuneError, OSError):
    """An operation on a file of the NVMe tier failed; the text names operation, file and cause."""

    def __init__(self, number: int | None, text: str, hint: str = "") -> None:
        SlidetuneError.__init__(self, text, hint)
        # Sets errno and strerror.
        OSError.__init__(self, number, text)


class NvmeFile:
    """`nbytes` on disk, addressed by byte offsets; a context manager.

    The space is allocated at the start, so that a disk too small shows then. The file has no name once it is open:
    it is gone when closed, and also after a crash. With several folders (one a disk) requests go to them in turn.

    Reads and writes may run at once from several threads, on ranges that do not overlap. Each has `threads` threads.

    Args:
        folders: where to put the file, or one of its stripes each; they must exist.
        nbytes: capacity, rounded up to `ALIGNMENT`.
        request_bytes: largest single request, a multiple of `ALIGNMENT`.
        threads: requests in flight for reading, and as many for writing.
        direct: False goes through the page cache. For tests on file systems without `O_DIRECT`; no NVMe tier.

    Raises:
        NvmeError: if a folder is missing, its disk is too full or its file system offers no `O_DIRECT` (or is RAM).
        ValueError: for sizes that are not positive or not aligned.
    """

    def __init__(
        self,
        folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        nbytes: int,
        *,
        request_bytes: int = 8 << 20,
        threads: int = 4,
        direct: bool = True,
    ) -> None:
        if nbytes <= 0 or threads < 1 or request_bytes <= 0 or request_bytes % ALIGNMENT:
            raise ValueError(
                f"NVMe file of {nbytes} bytes, {threads} threads, requests of {request_bytes} bytes: all must be "
                f"positive, requests a multiple of {ALIGNMENT}"
            )
        several = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
        self.nbytes = aligned(nbytes)
        self.request_bytes = request_bytes
        self.bytes_read = 0
        """Bytes read so far."""
        self.bytes_written = 0
        """Bytes written so far: what the disk's endurance is spent on."""
        self.paths = [Path(folder) / f"slidetune-{secrets.token_hex(8)}.nvme" for folder in several]
        self._fds: list[int] = []
        self._counting = threading.Lock()
        stripes = -(-self.nbytes // request_bytes)
        each = min(self.nbytes, -(-stripes // len(several)) * request_bytes)
        try:
            for path in self.paths:
                self._fds.append(_create(path, each, direct))
        except BaseException:
            self._close_files()
            raise
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="nvme-read")
        self._writers = ThreadPoolExecutor(threads, thread_name_prefix="nvme-write")

    def read(self, offset: int, tensor: Tensor) -> None:
        """Fill a contiguous CPU tensor from the file's bytes at `offset`. Returns when all is there.

        Raises:
            NvmeError: if the disk fails or the file ends early; part of the tensor may have been filled.
            ValueError: if offset, size or address are not aligned or the range is outside the file.
        """
        self._transfer("read", self._readers, _read_piece, offset, tensor)
        with self._counting:
            self.bytes_read += tensor.nbytes

    def write(self, offset: int, tensor: Tensor) -> None:
        """Write a contiguous CPU tensor to the file at `offset`. Returns when the disk has accepted all.

        Raises:
            NvmeError: if the disk fails or is full; part of the range may have been written.
            ValueError: if offset, size or address are not aligned or the range is outside the file.
        """
        self._transfer("write", self._writers, _write_piece, offset, tensor)
        with self._counting:
            self.bytes_written += tensor.nbytes

    def close(self) -> None:
        """Wait for requests in flight, close and thereby remove the files; may be called again."""
        self._readers.shutdown()
        self._writers.shutdown()
        self._close_files()

    def __enter__(self) -> NvmeFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_files(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def _transfer(
        self,
        operation: str,
        pool: ThreadPoolExecutor,
        piece: Callable[[int, memoryview, int], None],
        offset: int,
        tensor: Tensor,
    ) -> None:
        data = self._bytes_of(operation, offset, tensor)

        def one(start: int, end: int) -> None:
            stripe, within = divmod(start, self.request_bytes)
            row, disk = divmod(stripe, len(self._fds))
            position = row * self.request_bytes + within
            try:
                piece(self._fds[disk], data[start - offset : end - offset], position)
            except OSError as error:
                raise NvmeError(
                    error.errno,
                    f"NVMe {operation} of {end - start} bytes at {position} in {self.paths[disk]} failed: "
                    f"{error.strerror or error}",
                    "Look at the drive's free space and health, or take a folder on another one (--nvme-dir).",
                ) from error

        futures = []
        try:
            for start, end in self._pieces(offset, offset + len(data)):
                futures.append(pool.submit(one, start, end))
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            # The caller may reuse or free the tensor after an error: no request may still be at it.
            for future in futures:
                future.cancel()
            wait(futures)
        for future in futures:
            if not future.cancelled():
                future.result()

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Byte ranges of at most one request, none over the end of a stripe."""
        while start < stop:
            end = min(stop, (start // self.request_bytes + 1) * self.request_bytes)
            yield start, end
            start = end

    def _bytes_of(self, operation: str, offset: int, tensor: Tensor) -> memoryview:
        if not self._fds:
            raise ValueError(f"NVMe {operation}: the file is closed")
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"NVMe {operation} needs a contiguous CPU tensor")
        for what, value in (("offset", offset), ("size", tensor.nbytes), ("address", tensor.data_ptr())):
            if value % ALIGNMENT:
                raise ValueError(f"NVMe {operation}: {what} {value} is no multiple of {ALIGNMENT}")
        if offset < 0 or offset + tensor.nbytes > self.nbytes:
            raise ValueError(
                f"NVMe {operation}: bytes {offset} to {offset + tensor.nbytes} of a file of {self.nbytes} bytes"
            )
        return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to what one tensor takes in the file: a multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _read_piece(fd: int, data: memoryview, position: int) -> None:
    while data:
        done = os.preadv(fd, [data], position)
        if done == 0:
            raise OSError("the file ends before")
        data, position = data[done:], position + done


def _write_piece(fd: int, data: memoryview, position: int) -> None:
    while data:
        done = os.pwritev(fd, [data], position)
        data, position = data[done:], position + done


def _create(path: Path, nbytes: int, direct: bool) -> int:
    """A descriptor of a new, nameless file of `nbytes` allocated bytes."""
    try:
        if direct:
            _refuse_ram(path.parent)
        # Checked first: an allocation that fails half way has filled the disk for everyone by then.
        space = os.statvfs(path.parent)
        free = space.f_bavail * space.f_frsize
        if nbytes > free:
            raise OSError(errno.ENOSPC, f"disk full: {format_bytes(nbytes)} needed, {format_bytes(free)} free")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.unlink(path)
            # Before O_DIRECT is on: where the file system cannot allocate, libc writes single bytes.
            os.posix_fallocate(fd, 0, nbytes)
            if direct:
                _bypass_cache(fd)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise NvmeError(
            error.errno,
            f"NVMe file {path} cannot be made: {error.strerror or error}",
            "Give a folder that is there, on a disk with room for it (--nvme-dir).",
        ) from error
    return fd


def _bypass_cache(fd: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        raise OSError(error.errno, "its file system offers no direct access (O_DIRECT)") from error


def _refuse_ram(folder: Path) -> None:
    """Newer kernels take O_DIRECT on a file system in RAM, where a tier below RAM would make no sense."""
    inside = folder.resolve(strict=True)
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    kind = next((mounts[place] for place in (inside, *inside.parents) if place in mounts), "")
    if kind in _RAM_FILE_SYSTEMS:
        raise OSError(errno.ENOTSUP, f"{folder} is RAM ({kind}); choose a folder on a disk")
