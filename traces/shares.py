"""How each lane spent a steady step: working, slowed down, waiting for whom, idle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slidetune.schedule import CPU_ADAM, D2H, GPU, H2D, NVME_READ, NVME_WRITE
from slidetune.traces import style
from slidetune.traces.labels import lane_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BUSY, _SLOWED, _IDLE = "#3b4252", style.ALERT, "#eceef0"

# A lane is waited for in the light tone of what it mostly carries.
_WAITING = {
    GPU: style.lighter(style.COLOURS["backward"], 0.45),
    H2D: style.COLOURS["weights"],
    D2H: style.lighter(style.COLOURS["gradients"], 0.45),
    CPU_ADAM: style.lighter(style.COLOURS["Adam"], 0.5),
    NVME_READ: style.lighter(style.COLOURS["optimizer state"], 0.35),
    NVME_WRITE: style.lighter(style.COLOURS["activations"], 0.4),
}

# Narrower than this, a percentage doesn't fit into its bar; with a name, than that.
_ROOM, _ROOM_FOR_NAME = 0.035, 0.15


def parts(share: Any, step_s: float) -> list[tuple[str, str, float]]:
    """One lane's bar as (label, colour, share of the step), left to right; they add up to 1."""
    slowed = max(0.0, share.busy_s - share.alone_s)
    bar = [("busy", _BUSY, share.busy_s - slowed), ("busy, slowed by sharing", _SLOWED, slowed)]
    bar += [
        (f"waiting for {lane_label(lane)}", _WAITING.get(lane, style.COLOURS["other"]), seconds)
        for lane, seconds in share.waiting_s.items()
    ]
    bar.append(("idle", _IDLE, share.idle_s))
    return [(label, colour, seconds / step_s) for label, colour, seconds in bar if seconds > 0]


def lane_shares(prediction: Any) -> Figure:
    """Stacked bars, one a lane, of the prediction's steady step."""
    lanes = prediction.lanes
    figure = style.new_figure(1.35 + 0.5 * len(lanes))
    ax = figure.add_subplot()
    used: dict[str, str] = {}
    for place, share in enumerate(lanes.values()):
        y, left = len(lanes) - 1 - place, 0.0
        for label, colour, width in parts(share, prediction.step_s):
            used[label] = colour
            ax.barh(y, width, left=left, height=0.68, color=colour, edgecolor="white", linewidth=0.6)
            if width >= _ROOM:
                named = label.startswith("waiting") and width >= _ROOM_FOR_NAME
                text = f"{label.removeprefix('waiting ')} {width:.0%}" if named else f"{width:.0%}"
                ax.text(
                    left + width / 2,
                    y,
                    text,
                    ha="center",
                    va="center",
                    fontsize=style.SMALL,
                    color=style.ink_on(colour),
                )
            left += width
    style.plain_axes(ax)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_yticks(range(len(lanes)), [lane_label(lane) for lane in reversed(list(lanes))])
    ax.set_xlim(0, 1)
    ax.set_ylim(-0.5, len(lanes) - 0.5)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_xlabel("share of the step", fontsize=style.TEXT, color=style.INK)
    style.title(
        ax,
        "What each lane does, and what it waits for",
        "Slowed: the extra time tasks take because others use the same memory, link, drive or cores.",
    )
    _legend(figure, used)
    return figure


def _legend(figure: Figure, used: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    order = {"busy": 0, "busy, slowed by sharing": 1, "idle": 9}
    labels = sorted(used, key=lambda label: order.get(label, 5))
    figure.legend(
        handles=[Patch(facecolor=used[label], label=label) for label in labels],
        loc="outside lower center",
        ncols=min(len(labels), 5),
        frameon=False,
        fontsize=style.SMALL,
        handlelength=1.0,
        columnspacing=1.4,
    )
