"""Files that results are written to: reports and traces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slidetune.api import Priced
from slidetune.errors import BadFile
from slidetune.reporting import report


def check_writable(*paths: Path | None) -> None:
    """Refuse, before a search rather than after it, files that can't be written."""
    for path in paths:
        if path is not None and path.is_dir():
            raise BadFile(f"{path}: is a directory, not a file.")
        if path is not None and not path.parent.is_dir():
            raise BadFile(f"{path}: there is no directory {path.parent}.")


def write_trace_file(path: Path, priced: Priced) -> None:
    """The predicted step for ui.perfetto.dev."""
    from slidetune.traces.perfetto import TraceProcess, write_trace

    prediction = priced.prediction
    process = TraceProcess(
        name="predicted",
        rows=prediction.trace,
        schedule=prediction.schedule,
        step_s=prediction.step_s,
        memory=prediction.memory,
    )
    try:
        write_trace(path, process)
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}.") from None


def write_report_files(directory: Path, priced: Priced, assumed: Sequence[str] = ()) -> Path:
    """Pictures and one HTML page; returns the page."""
    try:
        return report(directory, priced, assumptions=assumed)
    except OSError as error:
        raise BadFile(f"{error.filename or directory}: {error.strerror}.") from None
