"""A writer slowed down to a rate, so that a drive which training waits for has its bandwidth for training."""

from __future__ import annotations

import threading
import time


class Pace:
    """Holds a thread back to so many bytes a second, counted from the first call; None: to none."""

    def __init__(self, bytes_s: float | None) -> None:
        self._bytes_s, self._done, self._start = bytes_s, 0, None
        self._hurried = threading.Event()

    def moved(self, nbytes: int) -> None:
        """Wait until it is time to go on after so many more bytes."""
        now = time.monotonic()
        self._start = now if self._start is None else self._start
        self._done += nbytes
        if self._bytes_s is not None:
            self._hurried.wait(max(0.0, self._start + self._done / self._bytes_s - now))

    def hurry(self) -> None:
        """Hold back no more: somebody waits."""
        self._hurried.set()
