"""Pictures of a search: throughput against batch under its bounds, the study's history, what mattered."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, pairwise
from typing import TYPE_CHECKING, Any

from slidetune.traces import style
from slidetune.traces.labels import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

_NOTE = "Dots: the best plan of each batch. Shaded: out of reach, since one resource alone would need longer."

# Points of a bound's curve from one batch to the next.
_FINENESS = 24

# As many as there are bounds: no two lines of one picture look the same.
_BOUND_COLOURS = (
    *("#332288", "#cc6677", "#117733", "#999933", "#aa4499", "#44aa99"),
    *("#882255", "#88ccee", "#ddcc77", "#661100", "#6699cc", "#888888"),
)
_ORIGIN_COLOURS = {"heuristic": "#cc6677", "expert": "#cc6677", "sampler": "#88ccee", "neighbour": "#44aa99"}
_FURTHER_COLOURS = ("#ddcc77", "#aa4499", "#999933")


def throughput_by_batch(points: Points, chosen: tuple[float, float], bounds: Mapping[str, Points]) -> Figure:
    """Tokens/s against sequences a step (log scale), below what each resource allows.

    `points`: (batch, tokens/s) of the best plan of each batch. `chosen`: the plan picked. `bounds`: for each
    resource (batch, tokens/s) if it alone limited the step; nothing can lie above the lowest.
    """
    figure = style.new_figure(4.2)
    ax = figure.add_subplot()
    points = sorted(points)
    # Room above the best plan, not above the highest bound: most bounds of a small batch are far away.
    top = 1.35 * max(y for _, y in [*points, chosen])
    # A resource whose bound never comes into sight has nothing to say here.
    curves = {
        name: _smooth(sorted(curve))
        for name, curve in _merged(bounds).items()
        if any(y <= top for _, y in curve) and len(curve) > 1
    }
    colours = dict(zip(curves, cycle(_BOUND_COLOURS), strict=False))
    left = min([x for x, _ in [*points, chosen]] + [curve[0][0] for curve in curves.values()])
    right = max([x for x, _ in [*points, chosen]] + [curve[-1][0] for curve in curves.values()])
    _shade_above(ax, list(curves.values()), top)
    for name, curve in curves.items():
        ax.plot(*zip(*curve, strict=True), color=colours[name], linewidth=1.4, label=name)
    ax.plot(
        *zip(*points, strict=True),
        color=style.INK,
        marker="o",
        markersize=4,
        linewidth=1.8,
        label="best plan",
    )
    _mark_chosen(ax, chosen)
    _name_lines(ax, curves, colours, top)
    style.plain_axes(ax, grid="y")
    ax.set_xscale("log", base=2)
    ax.set_xlim(left / 1.08, right * 1.02)
    ax.set_ylim(0, top)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.set_xlabel("sequences an optimizer step", fontsize=style.TEXT, color=style.INK)
    ax.set_ylabel("tokens/s", fontsize=style.TEXT, color=style.INK)
    style.title(
        ax,
        "Throughput against batch",
        _NOTE,
    )
    return figure


def _merged(bounds: Mapping[str, Points]) -> dict[str, Points]:
    """Bounds with curves that coincide to 1 % under one name: "uploads, h2d link"."""
    merged: list[tuple[list[str], Points]] = []
    for name, curve in bounds.items():
        for names, other in merged:
            if len(curve) == len(other) and all(
                a[0] == b[0] and math.isclose(a[1], b[1], rel_tol=0.01)
                for a, b in zip(sorted(curve), sorted(other), strict=True)
            ):
                names.append(name)
                break
        else:
            merged.append(([name], curve))
    return {", ".join(names): curve for names, curve in merged}


def _smooth(curve: Points) -> Points:
    """The curve with points between its own: what a resource needs grows in a straight line with the batch.

    Seconds a step go as batch / (tokens/s), so it is those that are interpolated.
    """
    fine = []
    for (x0, y0), (x1, y1) in pairwise(curve):
        for i in range(_FINENESS):
            x = x0 * (x1 / x0) ** (i / _FINENESS)
            seconds = x0 / y0 + (x1 / y1 - x0 / y0) * (x - x0) / (x1 - x0)
            fine.append((x, x / seconds))
    return [*fine, curve[-1]]


def _shade_above(ax: Axes, curves: Sequence[Points], top: float) -> None:
    """Shade what lies above the lowest bound."""
    import numpy as np

    batches = np.unique([x for curve in curves for x, _ in curve])
    lowest = np.full(len(batches), top)
    for curve in curves:
        xs, ys = zip(*curve, strict=True)
        lowest = np.minimum(lowest, np.interp(batches, xs, ys, left=top, right=top))
    ax.fill_between(batches, lowest, top, color=style.PALE, linewidth=0, zorder=0)


def _mark_chosen(ax: Axes, chosen: tuple[float, float]) -> None:
    x, y = chosen
    ax.plot([x], [y], marker="o", markersize=10, markerfacecolor="none", color=style.ALERT, markeredgewidth=1.8)
    ax.annotate(
        f"chosen: batch {x:g}, {y:,.0f} tokens/s",
        (x, y),
        # Below and to the right, where no plan of a larger batch lies and few bounds come through.
        xytext=(8, -18),
        textcoords="offset points",
        ha="left",
        va="top",
        fontsize=style.SMALL,
        fontweight="bold",
        color=style.ALERT,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
    )


def _name_lines(ax: Axes, curves: Mapping[str, Points], colours: Mapping[str, str], top: float) -> None:
    """Each bound's name at its right end; an arrow if the line has left through the top by then."""
    ends = [min(curve[-1][1] / top, 1.0) for curve in curves.values()]
    heights = style.spread(ends, 0.055, 0.0, 1.12)
    for name, end, height in zip(curves, ends, heights, strict=True):
        ax.annotate(
            f"{name} ↑" if end >= 1.0 else name,
            (1, height),
            xytext=(7, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            fontsize=style.SMALL,
            color=colours[name],
            annotation_clip=False,
        )


def study_history(trials: Iterable[Mapping[str, Any]]) -> Figure:
    """Every trial in the order tried, tokens/s, with the best so far; plans that don't fit along the bottom.

    A trial has "number", "value" (tokens/s or None), "feasible" and "origin" ("expert", "sampler", ...).
    """
    trials = sorted(trials, key=lambda trial: trial["number"])
    good = [trial for trial in trials if trial["feasible"] and trial["value"] is not None]
    bad = [trial["number"] for trial in trials if not (trial["feasible"] and trial["value"] is not None)]
    figure = style.new_figure(3.4)
    ax = figure.add_subplot()
    style.plain_axes(ax, grid="y")
    top = 1.1 * max((trial["value"] for trial in good), default=1.0)
    origins = sorted({trial["origin"] for trial in good})
    further = iter(_FURTHER_COLOURS * len(origins))
    for origin in origins:
        colour = _ORIGIN_COLOURS.get(origin) or next(further)
        mine = [trial for trial in good if trial["origin"] == origin]
        ax.scatter(
            [trial["number"] for trial in mine],
            [trial["value"] for trial in mine],
            s=16,
            color=colour,
            linewidths=0,
            label=f"{origin} ({len(mine)})",
            zorder=3,
        )
    if bad:
        ax.scatter(
            bad,
            [-0.05 * top] * len(bad),
            s=16,
            marker="x",
            linewidths=0.9,
            color=style.FAINT,
            label=f"does not fit ({len(bad)})",
            zorder=3,
        )
    if good:
        numbers, best = _best_so_far(good, trials[-1]["number"])
        ax.step(numbers, best, where="post", color=style.INK, linewidth=1.4, label="best so far", zorder=4)
        ax.annotate(
            f"{best[-1]:,.0f}",
            (numbers[-1], best[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=style.TEXT,
            color=style.INK,
            annotation_clip=False,
        )
    ax.set_ylim(-0.1 * top, top)
    ax.axhline(0, color=style.GRID, linewidth=0.7, zorder=1)
    if trials:
        ax.set_xlim(trials[0]["number"] - 0.5, trials[-1]["number"] + 0.5)
    ax.set_yticks([tick for tick in ax.get_yticks() if 0 <= tick <= top])
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.set_xlabel("trial", fontsize=style.TEXT, color=style.INK)
    ax.set_ylabel("tokens/s", fontsize=style.TEXT, color=style.INK)
    style.title(ax, "The search")
    if trials:
        figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=style.SMALL)
    return figure


def _best_so_far(good: list[Mapping[str, Any]], last: float) -> tuple[list[float], list[float]]:
    numbers, best = [], []
    for trial in good:
        if not best or trial["value"] > best[-1]:
            numbers.append(trial["number"])
            best.append(trial["value"])
    return [*numbers, last], [*best, best[-1]]


def knob_importance(importances: Mapping[str, float]) -> Figure:
    """How much of the variation between trials each knob explains, as shares of 1."""
    ranked = sorted(importances.items(), key=lambda item: item[1])
    figure = style.new_figure(0.9 + 0.27 * max(1, len(ranked)))
    ax = figure.add_subplot()
    style.plain_axes(ax)
    ax.barh([name for name, _ in ranked], [share for _, share in ranked], height=0.65, color="#44aa99")
    for place, (_, share) in enumerate(ranked):
        ax.annotate(
            percent(share),
            (share, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=style.SMALL,
            color=style.INK,
        )
    ax.set_xlim(0, 1.12 * max([share for _, share in ranked], default=1.0) or 1.0)
    ax.set_ylim(-0.6, max(1, len(ranked)) - 0.4)
    ax.xaxis.set_visible(False)
    for side in ("bottom", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="y", length=0)
    style.title(ax, "Which knobs mattered", "Share of the variation in throughput between trials.")
    return figure
