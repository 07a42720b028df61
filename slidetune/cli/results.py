"""Files that results are written to: reports and traces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slidetune.api import Priced
from slidetune.errors import BadFile
from slidetune.reporting import report


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
