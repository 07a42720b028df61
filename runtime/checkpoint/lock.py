"""One run a directory: a lock that ends with the process that holds it, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from slidetune.errors import SlidetuneError

_FILE = "lock"
_held: set[int] = set()


class DirectoryLock:
    """Holds a directory, which must exist, until `close`; a context manager.

    Raises SlidetuneError if another run, in this process or another one, holds it; the message says which.
    """

    def __init__(self, directory: Path) -> None:
        self._fd = os.open(directory / _FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 200, 0).decode(errors="replace").strip()
            os.close(self._fd)
            if not isinstance(error, BlockingIOError):
                raise SlidetuneError(f"{directory} cannot be locked ({error.strerror}).") from None
            raise SlidetuneError(
                f"{directory}: another run saves its checkpoints here ({holder or 'process unknown'}).",
                "Wait for it or end it, or choose another directory.",
            ) from None
        _held.add(self._fd)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def close(self) -> None:
        """Let go of the directory; may be called again."""
        if self._fd in _held:
            _held.discard(self._fd)
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _forget() -> None:
    """In a forked child (a data loader's): it must not hold the lock longer than the run does."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget)
