"""A predicted step above the measured one, on one time axis, and by how much each kind of task is off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slidetune.traces import style
from slidetune.traces.labels import lane_label
from slidetune.traces.timeline import BINNED, NEIGHBOUR, draw_step, lanes_in, legend
from slidetune.traces.validation import Kind, Validation
from slidetune.units import format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Kinds of tasks that take less of the step than this are left out.
_TELLING = 0.005
_LANE, _KIND, _AROUND = 0.42, 0.3, 0.75  # inches of a lane's row, of a kind's two bars, of title and axis
_BAR = 0.36


def side_by_side(found: Validation) -> Figure:
    """Timelines of the predicted and the measured step, and the seconds of each kind of task in both."""
    prediction = found.prediction
    order = lanes_in([*prediction.trace, *found.rows], prediction.schedule.lanes)
    kinds = telling_kinds(found)
    heights = [_LANE * len(order) + _AROUND] * 2 + [_KIND * len(kinds) + _AROUND]
    figure = style.new_figure(sum(heights) + 0.4)
    above, below, bars = figure.subplots(3, 1, height_ratios=heights)
    longest = max(prediction.step_s, found.typical_step_s)
    parts = (
        (above, "Predicted", prediction.trace, prediction.step_s),
        (below, "Measured", found.rows, found.typical_step_s),
    )
    binned = [draw_step(ax, rows, order, step_s) for ax, _, rows, step_s in parts]
    for ax, what, _, step_s in parts:
        ax.set_xlim(0, longest)
        _end(ax, step_s, longest)
        note = NEIGHBOUR + (BINNED if any(binned) else "")
        style.title(ax, f"{what}: a step takes {format_seconds(step_s)}", note if ax is above else "")
    above.tick_params(axis="x", labelbottom=False)
    below.set_xlabel("seconds since the GPU finished the step before", fontsize=style.TEXT, color=style.INK)
    _bars(bars, kinds)
    legend(figure, {style.kind_of(row.op) for row in prediction.trace})
    return figure


def telling_kinds(found: Validation) -> list[Kind]:
    """Kinds of tasks that take enough of the step, on either side, to be worth a line; the longest first."""
    least = _TELLING * found.step.measured
    return [kind for kind in found.kinds if max(kind.beside.predicted, kind.beside.measured) >= least]


def _end(ax: Axes, step_s: float, longest: float) -> None:
    """A line where the step ends, if the other step is longer."""
    if step_s < longest:
        ax.axvline(step_s, color=style.INK, linewidth=0.9, linestyle=(0, (4, 3)))


def _bars(ax: Axes, kinds: Sequence[Kind]) -> None:
    most = max((max(kind.beside.predicted, kind.beside.measured) for kind in kinds), default=1.0)
    for place, kind in enumerate(kinds):
        y, colour = len(kinds) - 1 - place, style.colour_of(kind.op)
        ax.barh(y + _BAR / 2, kind.beside.predicted, _BAR, color=style.lighter(colour, 0.5), linewidth=0)
        ax.barh(y - _BAR / 2, kind.beside.measured, _BAR, color=colour, linewidth=0)
        error = kind.beside.error
        ax.annotate(
            "" if error is None else f"{error:+.0%}",
            (max(kind.beside.predicted, kind.beside.measured), y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=style.SMALL,
            color=style.INK,
        )
    style.plain_axes(ax, grid="x")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_yticks(range(len(kinds)), [f"{lane_label(kind.lane)}: {kind.op}" for kind in reversed(kinds)])
    ax.set_xlim(0, 1.06 * most)
    ax.set_ylim(-0.6, len(kinds) - 0.4)
    ax.set_xlabel("seconds of a step", fontsize=style.TEXT, color=style.INK)
    style.title(
        ax,
        "Tasks by kind",
        f"Upper bar, lighter: predicted. Lower: measured. Kinds below {_TELLING:.1%} of the step are left out.",
    )
