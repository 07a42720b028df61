"""What `slidetune validate` prints for people: predictions beside measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slidetune.schedule import LANE_NAMES
from slidetune.traces.labels import MEMORY_LABELS
from slidetune.traces.validation import Beside, Spread, Summary, Validation
from slidetune.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from slidetune.grid import Failure

# Kinds of tasks below this share of the step are summed up in one line.
_TELLING = 0.005
# An error beyond this is marked.
_LARGE = 0.10


def validation_page(found: Validation) -> RenderableType:
    """One run: the step, lanes, kinds of tasks and memory."""
    parts: list[RenderableType] = [_headline(found)]
    if found.lanes:
        parts += [Text(), _lanes(found), Text(), _kinds(found)]
    parts += [Text(), _memory(found)]
    parts += [Text(f"Note: {note}", style="yellow") for note in found.notes]
    return Group(*parts)


def summary_page(summary: Summary) -> RenderableType:
    """Several runs: a line each, and how far they are off together."""
    parts: list[RenderableType] = [_runs(summary.runs), Text(), _spreads(summary)]
    noted = [(run.run.name, note) for run in summary.runs for note in run.notes]
    parts += [Text(f"{name}: {note}", style="yellow") for name, note in noted]
    return Group(*parts)


def grid_page(summary: Summary, failures: Iterable[Failure], not_started: Sequence[str]) -> RenderableType:
    """The runs of a grid, and what became of the other cases."""
    parts: list[RenderableType] = [summary_page(summary)] if summary.runs else []
    parts += [Text(f"Failed: {failure.name}: {failure.error}", style="red") for failure in failures]
    if not_started:
        parts.append(Text(f"Not started, for want of time: {', '.join(not_started)}", style="yellow"))
    return Group(*parts)


def signed(error: float | None) -> Text:
    """+1.2%; – where there is none. Large errors stand out."""
    if error is None:
        return Text("–", style="dim")
    return Text(f"{error:+.1%}", style="bold red" if abs(error) > _LARGE else "")


def _headline(found: Validation) -> RenderableType:
    step, plan = found.step, found.run.plan
    rows = Table(box=None, show_header=False, pad_edge=False)
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column()
    machine = found.run.machine
    where = machine.get("gpu") or f"{machine['cpu']} as device"
    rows.add_row(
        "Run",
        f"{plan.model}, batch {plan.batch} ({plan.micro_batch} x {plan.accumulation}), sequences of {plan.seq_len:,}; "
        f"{where}, {found.run.kernels} kernels",
    )
    rows.add_row(
        "Step",
        Text.assemble(
            f"predicted {format_seconds(step.predicted)}, measured {format_seconds(step.measured)}: ",
            (f"{step.error:+.1%}", "bold red" if abs(step.error) > _LARGE else "bold green"),
            f"  ({_range(found)})",
        ),
    )
    rows.add_row(
        "Speed",
        f"predicted {plan.tokens / step.predicted:,.0f}, measured {plan.tokens / step.measured:,.0f} tokens/s",
    )
    if found.adam_alone is not None and found.adam_alone.error is not None:
        alone = found.adam_alone
        rows.add_row(
            "Adam alone",
            Text.assemble(
                f"predicted {format_seconds(alone.predicted)}, measured {format_seconds(alone.measured)} a step: ",
                signed(alone.error),
                "  (right after the run: of the machine's memory, not of the plan)",
            ),
        )
    return rows


def _range(found: Validation) -> str:
    times = found.run.measured.step_s
    return f"{len(times)} steps from {format_seconds(min(times))} to {format_seconds(max(times))}"


def _lanes(found: Validation) -> RenderableType:
    table = _table("Lane busy, a step", "predicted", "measured", "error", "of the step")
    for lane, beside in found.lanes.items():
        _row(table, LANE_NAMES.get(lane, lane), beside, f"{beside.measured / found.typical_step_s:.0%}")
    return table


def _kinds(found: Validation) -> RenderableType:
    table = _table("Tasks, a step", "predicted", "measured", "error", "tasks")
    least = _TELLING * found.step.measured
    small = [k for k in found.kinds if max(k.beside.predicted, k.beside.measured) < least]
    for kind in found.kinds:
        if kind not in small:
            _row(table, f"{LANE_NAMES.get(kind.lane, kind.lane)}: {kind.op}", kind.beside, f"{kind.tasks:,}")
    if small:
        rest = Beside(sum(k.beside.predicted for k in small), sum(k.beside.measured for k in small))
        name = f"{len(small)} more, each below {_TELLING:.1%} of the step"
        _row(table, name, rest, f"{sum(k.tasks for k in small):,}")
    return table


def _memory(found: Validation) -> RenderableType:
    table = _table("Memory", "predicted", "measured", "error")
    for name, beside in found.memory.items():
        if not (beside.predicted or beside.measured):
            continue
        measured = "not measured" if beside.measured is None else format_bytes(beside.measured)
        table.add_row(MEMORY_LABELS[name], format_bytes(beside.predicted), measured, signed(beside.error))
    return table


def _runs(runs: Iterable[Validation]) -> RenderableType:
    table = _table("Run", "predicted", "measured", "step", "Adam alone", "GPU memory", "RAM", "worst lane")
    for found in runs:
        lanes = {lane: b.error for lane, b in found.lanes.items() if b.error is not None}
        worst = max(lanes, key=lambda lane: abs(lanes[lane]), default=None)
        named = Text("–", style="dim")
        if worst:
            named = Text.assemble(signed(lanes[worst]), f" {LANE_NAMES.get(worst, worst)}")
        table.add_row(
            found.run.name,
            format_seconds(found.step.predicted),
            format_seconds(found.step.measured),
            signed(found.step.error),
            signed(found.adam_alone.error if found.adam_alone else None),
            signed(found.memory["gpu"].error),
            signed(found.memory["ram"].error),
            named,
        )
    return table


def _spreads(summary: Summary) -> RenderableType:
    table = _table("Error, absolute", "median", "95th percentile", "worst", "runs")
    rows: list[tuple[str, Spread | None]] = [("step time", summary.step_time)]
    rows += [(f"{LANE_NAMES.get(lane, lane)}, busy", summary.lane(lane)) for lane in summary.lanes]
    rows += [(label, summary.memory(name)) for name, label in MEMORY_LABELS.items()]
    for name, found in rows:
        if found is not None:
            table.add_row(name, f"{found.median:.1%}", f"{found.p95:.1%}", f"{found.worst:.1%}", str(found.runs))
    return table


def _table(*columns: str) -> Table:
    """The first column is words, the others figures."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", no_wrap=bool(place), overflow="fold")
    return table


def _row(table: Table, name: str, beside: Beside, last: str) -> None:
    table.add_row(name, format_seconds(beside.predicted), format_seconds(beside.measured), signed(beside.error), last)
