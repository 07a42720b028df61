"""A steady step, lane by lane.

The step is a circle: what one step leaves running when the GPU is done, the step before left too. So tasks
that reach outside [0, step] reappear at the other end, in a lighter tone.

With hundreds of tasks on a lane a task is thinner than a pixel, and drawing them all gives noise. Such a lane
is cut into slices of time, and the height of a colour is the share of the slice it takes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from slidetune.traces import style
from slidetune.traces.labels import lane_label
from slidetune.units import format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from slidetune.trace import TraceRow

# A task narrower than this share of the step can't be told from its neighbours in print.
_THIN = 1 / 450
_HEIGHT = 0.8

NEIGHBOUR = "Lighter: work of the neighbouring step."
BINNED = " Where tasks are thinner than a line, the height of a colour is its share of the time."

# What to draw a span as: its kind, and whether it belongs to a neighbouring step.
Key = tuple[str, bool]
Spans = dict[Key, list[tuple[float, float]]]


def timeline(prediction: Any) -> Figure:
    """The steady step of a prediction (or of anything with a trace, step_s and a schedule); seconds."""
    rows, step_s = prediction.trace, prediction.step_s
    order = lanes_in(rows, prediction.schedule.lanes)
    figure = style.new_figure(1.25 + 0.55 * len(order))
    ax = figure.add_subplot()
    binned = draw_step(ax, rows, order, step_s)
    ax.set_xlim(0, step_s)
    ax.set_xlabel("seconds since the GPU finished the step before", fontsize=style.TEXT, color=style.INK)
    style.title(ax, f"One steady step: {format_seconds(step_s)}", NEIGHBOUR + (BINNED if binned else ""))
    legend(figure, {style.kind_of(row.op) for row in rows})
    return figure


def lanes_in(rows: Sequence[TraceRow], lanes: Sequence[str]) -> list[str]:
    """Of these lanes, those with tasks among the rows."""
    used = {row.lane for row in rows}
    return [lane for lane in lanes if lane in used]


def draw_step(ax: Axes, rows: Sequence[TraceRow], order: Sequence[str], step_s: float) -> bool:
    """Draw one step's tasks, a row a lane in this order from the top; whether any lane was cut into slices."""
    lanes: dict[str, list[TraceRow]] = defaultdict(list)
    for row in rows:
        lanes[row.lane].append(row)
    binned = False
    for place, lane in enumerate(order):
        spans = wrap(lanes[lane], step_s)
        bottom = len(order) - 1 - place - _HEIGHT / 2
        ax.barh(bottom + _HEIGHT / 2, step_s, _HEIGHT, color=style.PALE, linewidth=0, zorder=0)
        if _median([row.end_s - row.start_s for row in lanes[lane]]) < _THIN * step_s:
            binned = True
            _draw_shares(ax, spans, step_s, bottom, bins=_bins(lanes[lane], step_s))
        else:
            _draw_spans(ax, spans, bottom)
        busy = sum(row.end_s - row.start_s for row in lanes[lane]) / step_s
        ax.annotate(
            f"{busy:.0%} busy",
            (1, len(order) - 1 - place),
            xytext=(6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=style.SMALL,
            color=style.FAINT,
            annotation_clip=False,
        )
    style.plain_axes(ax)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_yticks(range(len(order)), [lane_label(lane) for lane in reversed(order)])
    ax.set_ylim(-0.55, len(order) - 0.45)
    return binned


def wrap(rows: list[TraceRow], step_s: float) -> Spans:
    """Spans of a lane's tasks laid into [0, step_s] by the step's periodicity, by what they are drawn as."""
    spans: Spans = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.start_s):
        kind = style.kind_of(row.op)
        first = math.floor(row.start_s / step_s)
        for shift in range(first, math.ceil(row.end_s / step_s)):
            start = max(row.start_s - shift * step_s, 0.0)
            end = min(row.end_s - shift * step_s, step_s)
            if end > start:
                spans[kind, shift != 0].append((start, end))
    return spans


def shares(spans: Spans, step_s: float, bins: int) -> dict[Key, list[float]]:
    """The share of each of `bins` equal slices of the step that each kind of span covers."""
    import numpy as np

    edges = np.linspace(0.0, step_s, bins + 1)
    result = {}
    for key, parts in spans.items():
        starts, ends = (np.array(side) for side in zip(*sorted(parts), strict=True))
        # Time covered up to each edge: it grows within spans and stands still between them.
        moments = np.stack([starts, ends], axis=1).ravel()
        covered = np.cumsum(np.stack([np.zeros_like(starts), ends - starts], axis=1).ravel())
        result[key] = (np.diff(np.interp(edges, moments, covered)) / (step_s / bins)).tolist()
    return result


def _draw_spans(ax: Axes, spans: Spans, bottom: float) -> None:
    for key, parts in spans.items():
        boxes = [(start, bottom, end - start, _HEIGHT) for start, end in parts]
        # A hairline between neighbours, so that one can count tasks where they are wide enough.
        _boxes(ax, boxes, key, edge=0.25)


def _draw_shares(ax: Axes, spans: Spans, step_s: float, bottom: float, bins: int) -> None:
    width = step_s / bins
    base = [bottom] * bins
    found = shares(spans, step_s, bins)
    for key in sorted(found, key=lambda key: (list(style.COLOURS).index(key[0]), key[1])):
        boxes = []
        for i, share in enumerate(found[key]):
            if share > 0:
                boxes.append((i * width, base[i], width, share * _HEIGHT))
                base[i] += share * _HEIGHT
        _boxes(ax, boxes, key, edge=0.0)


def _boxes(ax: Axes, boxes: list[tuple[float, float, float, float]], key: Key, edge: float) -> None:
    """Rectangles (x, y, width, height) of one colour, as a single artist."""
    from matplotlib.collections import PolyCollection

    kind, neighbour = key
    colour = style.lighter(style.COLOURS[kind], 0.55 if neighbour else 0.0)
    corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h in boxes]
    ax.add_collection(
        PolyCollection(
            corners,
            facecolors=colour,
            edgecolors="white" if edge else "none",
            linewidths=edge,
            antialiaseds=bool(edge),
            label=kind,
        ),
        autolim=False,
    )


def legend(figure: Figure, kinds: set[str]) -> None:
    """What each colour is, below the picture."""
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=kind) for kind, colour in style.COLOURS.items() if kind in kinds]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=style.SMALL,
        handlelength=1.0,
        columnspacing=1.4,
    )


def _bins(rows: list[TraceRow], step_s: float) -> int:
    """Slices of about three tasks each where the lane is active: finer ones would show the tasks' beat."""
    starts = sorted(row.start_s for row in rows)
    pace = _median([later - sooner for sooner, later in pairwise(starts)] or [step_s])
    return int(min(400, max(60, step_s / (3 * pace)))) if pace > 0 else 400


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
