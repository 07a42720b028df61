"""Memory of each tier over a step: what fills it, what is allocated, and what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slidetune.traces import style
from slidetune.traces.labels import TIER_LABELS, head_unit, in_words, percent
from slidetune.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OTHER = "other"
# Owners below this share of the peak are drawn together.
_TINY = 0.02
# With less than this share of the capacity used, drawing it would flatten everything else.
_CAPACITY_IN_SIGHT = 0.35


def memory(prediction: Any) -> Figure:
    """A panel for each tier that holds something; GiB over the seconds of the steady step."""
    tiers = {name: tier for name, tier in prediction.memory.items() if tier.peak_bytes}
    figure = style.new_figure(0.3 + 2.5 * max(1, len(tiers)))
    head = head_unit(prediction.schedule)
    panels = figure.subplots(max(1, len(tiers)), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (name, tier) in zip(panels, tiers.items(), strict=False):
        _panel(ax, name, tier, prediction.step_s, head)
    panels[-1].set_xlabel("seconds since the GPU finished the step before", fontsize=style.TEXT, color=style.INK)
    return figure


def owners_in_use(tier: Any) -> dict[str, tuple[int, ...]]:
    """Bytes in use by owner over the tier's moments, the largest and steadiest first, tiny ones together."""
    large = {name: values for name, values in tier.in_use.items() if max(values) >= _TINY * tier.peak_bytes}
    tiny = [values for name, values in tier.in_use.items() if name not in large]
    # What never changes lies at the bottom, so that it doesn't ride on what does.
    order = sorted(large, key=lambda name: (max(large[name]) > min(large[name]), -max(large[name])))
    stacked = {name: large[name] for name in order}
    if tiny:
        stacked[_OTHER] = tuple(sum(column) for column in zip(*tiny, strict=True))
    return stacked


def _panel(ax: Axes, name: str, tier: Any, step_s: float, head: int) -> None:
    import numpy as np

    times = np.array([*tier.times_s, step_s])
    stacked = owners_in_use(tier)
    colours = style.owner_colours(list(stacked))
    base = np.zeros(len(times))
    handles = []
    for owner, values in stacked.items():
        top = base + np.array([*values, values[-1]]) / GIB
        label = f"{owner}  {max(values) / GIB:,.{_digits(max(values))}f}"
        handles.append(ax.fill_between(times, base, top, step="post", color=colours[owner], linewidth=0, label=label))
        base = top
    allocated = np.array([sum(column) for column in zip(*tier.allocated.values(), strict=True)]) / GIB
    handles += ax.step(
        times,
        [*allocated, allocated[-1]],
        where="post",
        color=style.INK,
        linewidth=1.0,
        label=f"allocated  {tier.peak_bytes / GIB:,.{_digits(tier.peak_bytes)}f}",
    )
    peak, capacity = tier.peak_bytes / GIB, tier.capacity_bytes / GIB
    if capacity and peak >= _CAPACITY_IN_SIGHT * capacity:
        line = {"color": style.ALERT, "linewidth": 1.2, "linestyle": (0, (5, 3))}
        handles.append(ax.axhline(capacity, label=f"usable  {capacity:,.1f}", **line))
        ax.set_ylim(0, 1.12 * max(peak, capacity))
    else:
        ax.set_ylim(0, 1.3 * peak)
    if tier.peak_task:
        _mark_peak(ax, tier.peak_s, peak, step_s, in_words(tier.peak_task, head))
    style.plain_axes(ax, grid="y")
    ax.set_xlim(0, step_s)
    ax.set_ylabel("GiB", fontsize=style.TEXT, color=style.INK)
    share = f" ({percent(peak / capacity)})" if capacity else ""
    style.title(ax, f"{TIER_LABELS.get(name, name)}: peak {peak:,.1f} of {capacity:,.1f} GiB{share}")
    # In the order of the stack, the line of what there is on top.
    ax.legend(
        handles=handles[::-1],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        frameon=False,
        fontsize=style.SMALL,
        title="largest, GiB",
        title_fontsize=style.SMALL,
        alignment="left",
        handlelength=1.2,
        labelspacing=0.35,
    )


def _mark_peak(ax: Axes, at_s: float, peak: float, step_s: float, task: str) -> None:
    ax.plot([at_s], [peak], marker="o", markersize=4.5, color=style.INK, clip_on=False, zorder=5)
    right = at_s > step_s / 2
    ax.annotate(
        f"peak: {task}",
        (at_s, peak),
        xytext=(-6 if right else 6, 5),
        textcoords="offset points",
        ha="right" if right else "left",
        va="bottom",
        fontsize=style.SMALL,
        color=style.INK,
    )


def _digits(size: float) -> int:
    return 2 if size < 10 * GIB else 1
