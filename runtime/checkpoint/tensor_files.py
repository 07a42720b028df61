"""safetensors files written and read piece by piece: no more in RAM than a piece, and a checksum a tensor.

The checksum is CRC-32 (zlib's): 1.8 GiB/s a core where SHA-256 makes 0.8. It is to find what a disk or a copy has
damaged, not to withstand somebody who wants to deceive. Pieces of a tensor come in order; those of several tensors may
alternate, as they do where a chunk of the optimizer's state comes from NVMe.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slidetune.errors import BadFile

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int16: "I16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
# Of safetensors: larger ones are refused by every reader.
_LARGEST_HEADER = 100_000_000
# Written and not yet on the disk: the page cache must not grow into RAM that the plan counts on.
_DIRTY_BYTES = 256 << 20
# Elements at a time where a whole tensor is read.
_PIECE = 1 << 22


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Type and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class FileSums:
    """What a file must be."""

    nbytes: int
    header: int
    """CRC-32 of all that comes before the tensors."""
    tensors: dict[str, int]
    """CRC-32 a tensor."""


class TensorWriter:
    """A new file of tensors whose names and sizes are known, filled piece by piece. Raises OSError."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        at = 0
        for name, spec in tensors.items():
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [at, at + spec.nbytes],
            }
            at += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        self.nbytes = len(head) + at
        self._next = {name: len(head) + header[name]["data_offsets"][0] for name in tensors}
        self._ends = {name: len(head) + header[name]["data_offsets"][1] for name in tensors}
        self._sums = dict.fromkeys(tensors, 0)
        self._header_sum = zlib.crc32(head)
        self._dirty = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            _write(self._fd, memoryview(head), 0)
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, name: str, piece: Tensor) -> None:
        """The next elements of a tensor; flat, contiguous, from any device."""
        data = _bytes(piece.cpu())
        at = self._next[name]
        if at + len(data) > self._ends[name]:
            raise ValueError(f"{name}: more elements than its shape has")
        _write(self._fd, data, at)
        self._sums[name] = zlib.crc32(data, self._sums[name])
        self._next[name] = at + len(data)
        self._dirty += len(data)
        if self._dirty >= _DIRTY_BYTES:
            self._flush()

    def finish(self) -> FileSums:
        """Close the complete file once it is on the disk."""
        short = [name for name, at in self._next.items() if at != self._ends[name]]
        if short:
            raise ValueError(f"{short[0]}: fewer elements than its shape has")
        self._flush()
        return FileSums(self.nbytes, self._header_sum, self._sums)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def _flush(self) -> None:
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self._dirty = 0


class TensorReader:
    """A file of tensors, read piece by piece and checked against its checksums. Several threads may read.

    Raises BadFile for a file that is not what `sums` say it is, as soon as that shows: a wrong size or header at once,
    a tensor's values once they have all been read.
    """

    def __init__(self, path: Path, sums: FileSums) -> None:
        self.path, self._sums = path, sums
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BadFile(f"{path}: {error.strerror}.") from None
        try:
            self.tensors, self._starts = self._header()
        except BaseException:
            os.close(self._fd)
            raise
        self._lock = threading.Lock()
        self._state = dict.fromkeys(self.tensors, (0, 0))

    def read(self, name: str, into: Tensor) -> None:
        """The next elements of a tensor into a flat, contiguous tensor of its type on any device."""
        spec = self.tensors[name]
        if into.dtype != spec.dtype:
            raise BadFile(f"{self.path}: {name} is {spec.dtype}, not {into.dtype}.")
        target = into if into.device.type == "cpu" else torch.empty(into.shape, dtype=into.dtype)
        data = _bytes(target)
        done, checksum = self._state[name]
        if done + len(data) > spec.nbytes:
            raise BadFile(f"{self.path}: {name} has fewer elements than the model's.")
        _read(self._fd, data, self._starts[name] + done, self.path)
        done, checksum = done + len(data), zlib.crc32(data, checksum)
        with self._lock:
            self._state[name] = (done, checksum)
        if done == spec.nbytes and checksum != self._sums.tensors[name]:
            raise self._damaged(f"{name} is not what was written")
        if target is not into:
            into.copy_(target)

    def skim(self, name: str) -> None:
        """Read a whole tensor for its checksum's sake."""
        spec = self.tensors[name]
        count = spec.nbytes // spec.dtype.itemsize
        for start in range(0, count, _PIECE):
            self.read(name, torch.empty(min(_PIECE, count - start), dtype=spec.dtype))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _header(self) -> tuple[dict[str, TensorSpec], dict[str, int]]:
        size = os.fstat(self._fd).st_size
        if size != self._sums.nbytes:
            raise self._damaged(f"it has {size} bytes where {self._sums.nbytes} were written")
        length = bytearray(8)
        _read(self._fd, memoryview(length), 0, self.path)
        text = bytearray(min(int.from_bytes(length, "little"), _LARGEST_HEADER, size - 8))
        _read(self._fd, memoryview(text), 8, self.path)
        if zlib.crc32(text, zlib.crc32(length)) != self._sums.header:
            raise self._damaged("its header is not what was written")
        found = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        specs = {name: TensorSpec(_DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in found.items()}
        return specs, {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in found.items()}

    def _damaged(self, how: str) -> BadFile:
        return BadFile(f"{self.path} is damaged: {how}.", "Take another checkpoint, if there is one.")


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().view(torch.uint8).numpy())


def _write(fd: int, data: memoryview, at: int) -> None:
    while data:
        done = os.pwrite(fd, data, at)
        data, at = data[done:], at + done


def _read(fd: int, data: memoryview, at: int, path: Path) -> None:
    while data:
        try:
            done = os.preadv(fd, [data], at)
        except OSError as error:
            raise BadFile(f"{path}: {error.strerror}.") from None
        if not done:
            raise BadFile(f"{path} is damaged: it ends early.")
        data, at = data[done:], at + done
