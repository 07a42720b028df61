"""Ending a training between two steps: because it was asked to, by a callback or by a signal."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

_WORDS = b"\nStopping after this step; a checkpoint is saved then. Ctrl-C once more stops at once.\n"


class Stop:
    """Whether the training should end, and why: the first reason that was given."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def ask(self, reason: str) -> None:
        """End after the step under way."""
        self.reason = self.reason or reason


@contextlib.contextmanager
def signals_ask(stop: Stop) -> Iterator[None]:
    """Have SIGTERM and the first Ctrl-C ask for the end; a second Ctrl-C interrupts as ever.

    Outside the main thread, where Python takes no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, _: object) -> None:
        stop.ask(signal.Signals(number).name)
        give_back(signal.SIGINT)
        # What prints through buffers may not be called from here.
        with contextlib.suppress(OSError):
            os.write(2, _WORDS)

    def give_back(number: int) -> None:
        handler = before[number]
        # None: it was not set from Python, and can't be from here.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number in before:
            give_back(number)
