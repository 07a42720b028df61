"""Predicted against measured, task by task.

Both come from one schedule, so tasks have the same names. Errors of kinds of tasks are sums of absolute
errors beside the signed ones: a forward pass predicted 10 % long and a backward pass 10 % short is not a
perfect prediction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

KEY = ["op", "unit", "micro_batch", "chunk", "lane"]
"""What names a task within a step. Tasks alike in all of these are told apart by their order."""


def compare(predicted: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """One row a task, in seconds; what only one side has is kept, with NaN on the other.

    Where a trace holds several steps, each task is taken at its mean over them. Starts count from the first
    start of the trace's step on the same side, so traces with different clocks can be laid side by side.
    Columns: KEY, nth, predicted_s, measured_s, error_s (predicted less measured), ratio (measured over
    predicted), predicted_start_s, measured_start_s, start_error_s, found ("both", "predicted" or "measured").
    """
    left, right = _tasks(predicted), _tasks(measured)
    both = left.merge(right, how="outer", on=[*KEY, "nth"], suffixes=("_p", "_m"), indicator="found")
    both["found"] = both["found"].map({"both": "both", "left_only": "predicted", "right_only": "measured"}).astype(str)
    out = both[[*KEY, "nth"]].copy()
    out["predicted_s"], out["measured_s"] = both["seconds_p"], both["seconds_m"]
    out["error_s"] = out["predicted_s"] - out["measured_s"]
    # A task predicted to take no time at all has no ratio.
    out["ratio"] = (out["measured_s"] / out["predicted_s"]).where(out["predicted_s"] > 0)
    out["predicted_start_s"], out["measured_start_s"] = both["begins_p"], both["begins_m"]
    out["start_error_s"] = out["predicted_start_s"] - out["measured_start_s"]
    out["found"] = both["found"]
    order = out["predicted_start_s"].fillna(out["measured_start_s"])
    return out.loc[order.sort_values(kind="stable").index].reset_index(drop=True)


def by_kind(compared: pd.DataFrame) -> pd.DataFrame:
    """Sums for each (lane, op), the largest first. Seconds; shares are of the measured sum.

    Columns: tasks (on both sides), predicted_s, measured_s, error_s (signed sum), absolute_error_s (sum of
    the tasks' absolute errors), error (signed share), absolute_error (share), only_predicted, only_measured.
    Sums are over the tasks both sides have; the others are counted.
    """
    import pandas as pd

    rows = []
    for (lane, op), tasks in compared.groupby(["lane", "op"], sort=True):
        shared = tasks[tasks["found"] == "both"]
        measured = shared["measured_s"].sum()
        error, absolute = shared["error_s"].sum(), shared["error_s"].abs().sum()
        rows.append(
            {
                "lane": lane,
                "op": op,
                "tasks": len(shared),
                "predicted_s": shared["predicted_s"].sum(),
                "measured_s": measured,
                "error_s": error,
                "absolute_error_s": absolute,
                "error": error / measured if measured > 0 else float("nan"),
                "absolute_error": absolute / measured if measured > 0 else float("nan"),
                "only_predicted": int((tasks["found"] == "predicted").sum()),
                "only_measured": int((tasks["found"] == "measured").sum()),
            }
        )
    columns = ["lane", "op", "tasks", "predicted_s", "measured_s", "error_s", "absolute_error_s"]
    columns += ["error", "absolute_error", "only_predicted", "only_measured"]
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values("measured_s", ascending=False, kind="stable").reset_index(drop=True)


def _tasks(trace: pd.DataFrame) -> pd.DataFrame:
    """A row a task of the step: its mean duration and its mean start within its own step."""
    frame = trace[[*KEY, "step", "task", "start_s", "end_s"]].copy()
    frame["seconds"] = frame["end_s"] - frame["start_s"]
    frame["begins"] = frame["start_s"] - frame.groupby("step")["start_s"].transform("min")
    frame = frame.sort_values(["step", "task", "start_s"], kind="stable")
    frame["nth"] = frame.groupby([*KEY, "step"]).cumcount()
    return frame.groupby([*KEY, "nth"], as_index=False, sort=False)[["seconds", "begins"]].mean()
