"""Batches prepared by a thread while a step runs, with the position of what was handed out, not of what was made."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

Batch = Mapping[str, Tensor]


class Positioned(Protocol):
    """An iterator without end that can say where it is."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def position(self) -> dict[str, Any]:
        """Where `next` goes on."""
        ...


class Ahead:
    """Takes batches from an iterator up to `count` ahead of who uses them. A context manager.

    The iterator belongs to the thread until `close`.
    """

    def __init__(self, batches: Positioned, count: int = 2) -> None:
        self._batches = batches
        self._made: queue.Queue[tuple[Batch | None, Any]] = queue.Queue(count)
        self._closed = threading.Event()
        self.position = batches.position()
        """Where the batch after the last one handed out begins: for a checkpoint."""
        self.waited_s = 0.0
        """Seconds that the last `next` waited."""
        self._thread = threading.Thread(target=self._make, name="slidetune batches", daemon=True)
        self._thread.start()

    def next(self) -> Batch:
        """The next batch. Raises what making it raised."""
        start = time.perf_counter()
        batch, found = self._made.get()
        self.waited_s = time.perf_counter() - start
        if batch is None:
            raise found
        self.position = found
        return batch

    def close(self) -> None:
        """End the thread; what was made ahead is dropped. May be called again."""
        self._closed.set()
        while self._thread.is_alive():
            # It may be waiting for room.
            with contextlib.suppress(queue.Empty):
                self._made.get_nowait()
            self._thread.join(0.01)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self) -> None:
        try:
            while not self._closed.is_set():
                batch = next(self._batches)
                self._made.put((batch, self._batches.position()))
        except BaseException as error:
            self._made.put((None, error))
