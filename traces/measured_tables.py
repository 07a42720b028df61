"""The measured side of a report: tables of what was predicted beside what was found."""

from __future__ import annotations

from slidetune.traces import page
from slidetune.traces.labels import MEMORY_LABELS, lane_label
from slidetune.traces.validation import Beside, Validation
from slidetune.units import format_bytes, format_seconds


def measured_tables(found: Validation) -> list[page.Html]:
    """Step and lanes, memory, kinds of tasks; and what the comparison had to leave out."""
    times = [("a step", found.step)] + [(f"{lane_label(lane)}, busy", beside) for lane, beside in found.lanes.items()]
    if found.adam_alone is not None:
        times.append(("CPU Adam with nothing beside, right after the run", found.adam_alone))
    head = ("Predicted", "Measured", "Error")
    figures = (1, 2, 3)
    made = [page.table(("Time", *head), ((name, *_seconds(beside)) for name, beside in times), numbers=figures)]
    memory = [
        (MEMORY_LABELS[name], *_bytes(beside))
        for name, beside in found.memory.items()
        if beside.predicted or beside.measured
    ]
    made.append(page.table(("Memory", *head), memory, numbers=figures))
    kinds = [
        (f"{lane_label(kind.lane)}: {kind.op}", *_seconds(kind.beside), _percent(kind.absolute_error, ""), kind.tasks)
        for kind in found.kinds
    ]
    columns = ("Tasks of a step", *head, "Task by task", "Tasks")
    made.append(page.table(columns, kinds, numbers=(1, 2, 3, 4, 5)))
    if kinds:
        made.append(page.tag("p", _ABSOLUTE, class_="note"))
    return made + [page.tag("p", note, class_="note") for note in found.notes]


_ABSOLUTE = (
    "Task by task: the tasks' absolute errors over what they took together, so that tasks predicted too long and "
    "tasks predicted too short don't make up for each other."
)


def _seconds(beside: Beside) -> tuple[str, str, str]:
    return format_seconds(beside.predicted), format_seconds(beside.measured), _percent(beside.error)


def _bytes(beside: Beside) -> tuple[str, str, str]:
    measured = "not measured" if beside.measured is None else format_bytes(beside.measured)
    return format_bytes(beside.predicted), measured, _percent(beside.error)


def _percent(share: float | None, sign: str = "+") -> str:
    return "–" if share is None else f"{share:{sign}.1%}"
