"""Batches of stored documents, epoch after epoch, with a position that a checkpoint can keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slidetune.errors import SlidetuneError
from slidetune.runtime.batches import IGNORED
from slidetune.runtime.data.documents import Documents
from slidetune.runtime.data.order import epoch_batches

# Widths of padded batches are multiples of this: few shapes, which GPUs compute well.
_BUCKET = 64


class Batches:
    """An iterator of batches without end: every sequence once an epoch, in another order each time.

    A batch is a dict of int64 tensors [batch, tokens]: input_ids, labels, and

    - packed: position_ids, which start again with each document: that is how transformers knows packed sequences.
      What is left of a sequence is a document of padding. tokens = seq_len.
    - else padded, a document a row. tokens is the longest one's length, up to a multiple of 64.

    Neither has an attention_mask. Beside position ids it would hide the documents from transformers; and padding stands
    behind a document, where causal attention doesn't look, which is fastest without a mask.

    The last batch of an epoch is filled up with rows that have no labels.

    `sequences`: numbers of the documents in each; of one each unless `packed`. `fingerprint`: of all that decides
    which batches come; a position of another is refused.
    """

    def __init__(
        self,
        documents: Documents,
        sequences: Sequence[Sequence[int]],
        *,
        batch: int,
        seq_len: int,
        packed: bool,
        seed: int = 0,
        fingerprint: str = "",
    ) -> None:
        self.sequences = sequences
        self.batch, self.seq_len, self.packed, self.seed = batch, seq_len, packed, seed
        self.fingerprint = fingerprint
        self._documents = documents
        lengths = documents.lengths
        taken = np.array([lengths[list(numbers)].sum() for numbers in sequences], dtype=np.int64)
        self.tokens = int(taken.sum())
        """Of an epoch, without padding."""
        buckets = np.minimum(-(-taken // _BUCKET) * _BUCKET, seq_len)
        self._widths = np.full_like(taken, seq_len) if packed else buckets
        self._epoch, self._next = 0, 0
        self._order: tuple[int, list[NDArray[np.int64]]] | None = None

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.sequences) // self.batch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        batch = self._made(self._batches(self._epoch)[self._next])
        self._next += 1
        if self._next == len(self):
            self._epoch, self._next = self._epoch + 1, 0
        return batch

    def epoch(self, number: int = 0) -> Iterator[dict[str, Tensor]]:
        """The batches of one epoch, wherever this iterator is."""
        return map(self._made, epoch_batches(self._widths, self.batch, self.seed, number))

    def position(self) -> dict[str, Any]:
        """Where `next` goes on: for a checkpoint, as JSON takes it. Restoring it is `restore`."""
        return {"epoch": self._epoch, "batch": self._next, "data": self.fingerprint}

    def restore(self, position: Mapping[str, Any]) -> None:
        """Go on at a position. Raises SlidetuneError for one that is of other data or settings, or none."""
        if not isinstance(position, Mapping) or position.get("data") != self.fingerprint:
            raise SlidetuneError(
                "the data position is of other data: the files, the tokenizer, or one of sequence length, batch, "
                "packing, held-out share and seed differ.",
                "Resume with what the run began with, or begin anew with the checkpoint's weights.",
            )
        epoch, index = position.get("epoch"), position.get("batch")
        if type(epoch) is not int or type(index) is not int or epoch < 0 or not 0 <= index < len(self):
            raise SlidetuneError(
                f"epoch {epoch!r}, batch {index!r} is no data position; an epoch has {len(self):,} batches.",
                "Take another checkpoint.",
            )
        self._epoch, self._next = epoch, index

    def _batches(self, epoch: int) -> list[NDArray[np.int64]]:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_batches(self._widths, self.batch, self.seed, epoch)
        return self._order[1]

    def _made(self, numbers: NDArray[np.int64]) -> dict[str, Tensor]:
        shape = (self.batch, int(self._widths[numbers].max()))
        ids, labels = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int64), shape).copy()
        for row, number in enumerate(numbers):
            at = 0
            for document in self.sequences[number]:
                values = self._documents[document]
                end = at + values.shape[1]
                ids[row, at:end], labels[row, at:end] = values
                positions[row, at:end] = np.arange(end - at)
                at = end
            positions[row, at:] = np.arange(shape[1] - at)
        arrays = {"input_ids": ids, "labels": labels} | ({"position_ids": positions} if self.packed else {})
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
