"""Where the command line writes, and how it shows that it works."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

out = Console(highlight=False)
"""Results."""
err = Console(stderr=True, highlight=False)
"""Progress and errors, so that results can be piped."""


def print_json(value: object) -> None:
    """One JSON object, as it is, for programs."""
    print(json.dumps(value, indent=2, allow_nan=False))


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on standard error, where that is a terminal; yields advance(done, of, note)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    # Drawn when something is done rather than by a thread, since processes are forked meanwhile.
    with Progress(*columns, console=err, auto_refresh=False, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(label, note="")

        def advance(done: int, of: int, note: str) -> None:
            bar.update(task, completed=done, total=of, note=note)
            bar.refresh()

        yield advance
