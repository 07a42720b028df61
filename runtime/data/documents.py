"""Documents cut to the length of a sequence, and kept on disk: RAM is for the optimizer's state."""

from __future__ import annotations

import tempfile
import weakref
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from slidetune.errors import BadFile
from slidetune.runtime.batches import IGNORED
from slidetune.runtime.data.conventions import Document


class Piece(NamedTuple):
    """What of a document goes into one sequence."""

    ids: list[int]
    labels: list[int]
    """As many. The first is -100: no token of its own document comes before it."""

    @property
    def learned(self) -> int:
        """Tokens that have a loss."""
        return len(self.labels) - self.labels.count(IGNORED)


def packed_bytes(*parts: list[int]) -> bytes:
    """The numbers as int32, one list after the other."""
    return b"".join(array("i", part).tobytes() for part in parts)


def cut(document: Document, seq_len: int) -> list[Piece]:
    """The pieces of a document that fit a sequence.

    One in which every token is learned is cut into pieces that together are all of it, one with labels of its own is
    cut off. There are none if nothing is left to learn.
    """
    ids, labels = document.ids, document.labels
    if labels is not None:
        piece = Piece(ids[:seq_len], [IGNORED, *labels[1:seq_len]])
        return [piece] if piece.learned else []
    if len(ids) < 2 or seq_len < 2:
        return []
    ends = list(range(seq_len, len(ids), seq_len))
    if ends and len(ids) - ends[-1] == 1 and seq_len > 2:
        # A token alone would be neither learned nor read.
        ends[-1] -= 1
    spans = zip([0, *ends], [*ends, len(ids)], strict=True)
    return [Piece(ids[start:end], [IGNORED, *ids[start + 1 : end]]) for start, end in spans]


class Documents:
    """Pieces in a file without a name, which goes with this object. Numbered in the order in which they are added.

    `folder`: on a disk with room for 8 bytes a token; by default where temporary files go. Raises BadFile if it can't
    be written to.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = folder or tempfile.gettempdir()
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        except OSError as error:
            raise self._full(error) from None
        weakref.finalize(self, self._file.close)
        self._starts = array("q", [0])
        self._values: NDArray[np.int32] | None = None

    def add(self, piece: Piece) -> None:
        """Append a piece; not after the first was read."""
        try:
            self._file.write(packed_bytes(piece.ids, piece.labels))
        except OSError as error:
            raise self._full(error) from None
        self._starts.append(self._starts[-1] + len(piece.ids))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each piece."""
        return np.diff(np.array(self._starts, dtype=np.int64))

    def __getitem__(self, number: int) -> NDArray[np.int32]:
        """Ids and labels of a piece: [2, tokens]."""
        if self._values is None:
            try:
                self._file.flush()
                self._values = np.memmap(self._file, dtype=np.int32, mode="r")
            except OSError as error:
                raise self._full(error) from None
        start, end = self._starts[number], self._starts[number + 1]
        return self._values[2 * start : 2 * end].reshape(2, end - start)

    def _full(self, error: OSError) -> BadFile:
        return BadFile(
            f"{self._folder}: the tokens can't be written there ({error.strerror}).",
            "Give a folder on a disk with room for 8 bytes a token.",
        )
