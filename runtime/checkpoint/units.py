"""One unit's masters and moments to a file and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from slidetune.runtime.checkpoint.ranges import FROZEN_PARTS, PARTS, Range, ranges
from slidetune.runtime.checkpoint.tensor_files import FileSums, TensorReader, TensorSpec, TensorWriter
from slidetune.runtime.layout import Layout
from slidetune.runtime.masters import Master

# Units moved at once where nothing else runs: one thread copies and checks no faster than 1 GB/s.
_AT_ONCE = 4


def tensor_name(parameter: str, part: str) -> str:
    """The name of a part (see `ranges.PARTS`) of a parameter in a checkpoint."""
    return f"{parameter}.{part}"


def tensor_specs(layout: Layout) -> dict[str, TensorSpec]:
    """The tensors that a unit's file holds."""
    return {
        tensor_name(entry.name, part): TensorSpec(dtype, entry.shape)
        for part, dtype in PARTS.items()
        for entry in layout.entries
        if entry.hyper is not None or part in FROZEN_PARTS
    }


def write_unit(path: Path, master: Master, slot: Tensor | None, moved: Callable[[int], None]) -> FileSums:
    """Write a unit to a new file; `moved` is called with the bytes of each piece. Raises OSError."""
    with TensorWriter(path, tensor_specs(master.layout), {"format": "pt"}) as writer:
        for start, parts in ranges(master, slot):
            for name, piece in _pieces(master.layout, (start, parts)):
                writer.write(name, piece)
                moved(piece.nbytes)
        return writer.finish()


def read_unit(readers: Mapping[str, TensorReader], master: Master, slot: Tensor | None) -> None:
    """Set a unit from the files that hold its tensors, by name. Raises BadFile where one is damaged."""
    for start, parts in ranges(master, slot, store=True):
        for name, piece in _pieces(master.layout, (start, parts)):
            readers[name].read(name, piece)


def at_once(function: Callable[[Master], None], masters: Iterable[Master]) -> None:
    """Call a function for every unit; several at a time but for those on NVMe, which share a staging buffer."""
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="slidetune-checkpoint") as pool:
        futures = []
        try:
            on_drive = []
            for master in masters:
                if master.drive is None:
                    futures.append(pool.submit(function, master))
                else:
                    on_drive.append(master)
            for master in on_drive:
                function(master)
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()


def _pieces(layout: Layout, found: Range) -> Iterator[tuple[str, Tensor]]:
    """The parameters' shares of a range, by their names in a file."""
    start, parts = found
    for part, values in parts.items():
        for entry in layout.entries:
            first, last = max(entry.start, start), min(entry.stop, start + values.numel())
            if first < last:
                yield tensor_name(entry.name, part), values[first - start : last - start]
