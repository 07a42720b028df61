"""Processes that simulate side by side, each with the same evaluator.

Results don't depend on how many there are: a simulation has no randomness, and plans are proposed in batches either
way.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import TypeVar

from slidetune.tuner.evaluate import Evaluator

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST = 8


class Workers:
    """`count` processes (a core each), as a context manager; none where processes cannot be forked safely."""

    def __init__(self, evaluator: Evaluator, count: int | None = None) -> None:
        self.evaluator = evaluator
        count = _usable_cores() if count is None else count
        self._pool = (
            ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _begin, (evaluator,)) if count > 1 else None
        )

    def map(self, function: Callable[[Evaluator, Item], Result], items: Iterable[Item]) -> list[Result]:
        """`function(evaluator, item)` for every item, in order. `function` stands at the top of a module."""
        items = list(items)
        if self._pool is None or len(items) < 2:
            return [function(self.evaluator, item) for item in items]
        return list(self._pool.map(_call, [function] * len(items), items))

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            # After an interrupt nobody waits for what is still queued.
            self._pool.shutdown(wait=error is None, cancel_futures=True)


def _usable_cores() -> int:
    # A fork copies only the thread that calls it: locks that others hold would stay locked for ever.
    if sys.platform != "linux" or threading.active_count() > 1:
        return 1
    return min(len(os.sched_getaffinity(0)), _MOST)


_evaluator: list[Evaluator] = []


def _begin(evaluator: Evaluator) -> None:
    _evaluator[:] = [evaluator]


def _call(function: Callable[[Evaluator, Item], Result], item: Item) -> Result:
    return function(_evaluator[0], item)
