"""A trace: one row a task, the same columns whether it was predicted or measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pandas as pd


class TraceRow(NamedTuple):
    """When one task ran. Times are seconds from the end of the step before on the GPU."""

    step: int
    op: str
    unit: int
    """0 the embedding, 1..n the layers, n+1 the head."""
    micro_batch: int
    """-1 where it doesn't apply, as for chunk."""
    chunk: int
    lane: str
    start_s: float
    end_s: float
    bytes: int
    flops: float
    task: int
    """Index of the task in its Schedule."""
    ready_s: float
    """When the lane came to the task; from then to start_s it waited."""
    blocked_by: int
    """Index of the task it waited for last, -1 if it didn't wait."""


def to_frame(rows: list[TraceRow]) -> pd.DataFrame:
    """The rows as a DataFrame, a column a field."""
    import pandas as pd

    return pd.DataFrame(rows, columns=list(TraceRow._fields))
