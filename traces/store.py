"""Traces on disk: CSV with a header of metadata, so that one file says what was run and where.

The first line is `# {...}`, a JSON object; the rest is plain CSV, which pandas, a spreadsheet or `less` read.
Floats are written as Python's shortest exact form, so a trace comes back bit for bit.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slidetune.errors import BadFile
from slidetune.trace import TraceRow

if TYPE_CHECKING:
    import pandas as pd

TRACE_VERSION = 1

_TYPES = {
    **dict.fromkeys(("step", "unit", "micro_batch", "chunk", "bytes", "task", "blocked_by"), "int64"),
    **dict.fromkeys(("op", "lane"), "str"),
}
_FLOATS = ("start_s", "end_s", "flops", "ready_s")


def save_trace(path: str | Path, trace: pd.DataFrame, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a trace to .csv or .csv.gz, and with it what is known about it: plan, machine, date, ..."""
    path = Path(path)
    header = {"slidetune_trace": TRACE_VERSION, **(metadata or {})}
    text = f"# {json.dumps(header, sort_keys=True)}\n{trace.to_csv(index=False, lineterminator=chr(10))}"
    # No time stamp in the archive: saving the same trace twice gives the same file.
    data = text.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def load_trace(path: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read a trace back with its metadata."""
    import io

    import pandas as pd

    path = Path(path)
    text = _text(path)
    first, _, body = text.partition("\n")
    metadata = _metadata(path, first)
    try:
        # Python's float, since pandas' fast parser may be off in the last place. An op named NA is text.
        trace = pd.read_csv(
            io.StringIO(body), dtype=_TYPES, converters=dict.fromkeys(_FLOATS, float), keep_default_na=False
        )
    except (ValueError, pd.errors.ParserError) as error:
        raise BadFile(f"{path}: not a table of tasks: {error}") from error
    missing = [name for name in TraceRow._fields if name not in trace.columns]
    if missing:
        raise BadFile(f"{path}: columns missing: {', '.join(missing)}.", f"A trace has {', '.join(TraceRow._fields)}.")
    return trace, metadata


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BadFile(f"{path}: cannot be read: {error}") from error


def _metadata(path: Path, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line.removeprefix("#")) if line.startswith("#") else None
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict) or "slidetune_trace" not in found:
        raise BadFile(f"{path}: not a trace.", "Its first line is `# {...}`, as save_trace writes it.")
    version = found.pop("slidetune_trace")
    if version != TRACE_VERSION:
        raise BadFile(f"{path}: slidetune_trace is {version}; this version reads {TRACE_VERSION}.")
    return found
