"""One look for all pictures: what has which colour, sizes of type, and axes without decoration.

Colours are Paul Tol's "muted" scheme, which people with any of the common colour-vision deficiencies can tell
apart. A colour stands for one thing in every picture: sand is weights, whether they cross the link in the
timeline or fill memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10.5
"""Inches, of every figure; with DPI it gives the page sharp pictures on dense screens too."""
DPI = 170

TEXT, SMALL, TITLE = 9.0, 8.0, 11.0
INK, FAINT, GRID, PALE = "#1f2328", "#6a7077", "#e4e6e9", "#f1f2f4"
ALERT = "#b5301f"

COLOURS = {
    "forward": "#332288",
    "recompute": "#88ccee",
    "backward": "#cc6677",
    "head and loss": "#882255",
    "Adam": "#117733",
    "weights": "#ddcc77",
    "gradients": "#aa4499",
    "activations": "#44aa99",
    "optimizer state": "#999933",
    "other": "#bbbbbb",
}

_KINDS = {
    "forward": "forward",
    "recompute": "recompute",
    "backward": "backward",
    "head": "head and loss",
    "loss": "head and loss",
    "adam": "Adam",
    "adam rows": "Adam",
    "adam other rows": "Adam",
    "adam rest": "Adam",
    "fetch": "weights",
    "read weights": "weights",
    "write weights": "weights",
    "store": "gradients",
    "store rows": "gradients",
    "gather": "activations",
    "save": "activations",
    "load": "activations",
    "save middle": "activations",
    "load middle": "activations",
    "save inner": "activations",
    "load inner": "activations",
    "write input": "activations",
    "read input": "activations",
    "read state": "optimizer state",
    "write state": "optimizer state",
}

# The first word found in an owner's name decides; order matters ("head gradient" is a gradient).
_OWNER_WORDS = (
    ("working", "recompute"),
    ("hidden", "activations"),
    ("resident layer", "Adam"),
    ("gradient", "gradients"),
    ("weight", "weights"),
    ("optimizer", "optimizer state"),
    ("state", "optimizer state"),
    ("input", "activations"),
    ("middle", "activations"),
    ("activation", "activations"),
    ("embedding", "head and loss"),
)


def kind_of(op: str) -> str:
    """What an operation works on or does, as the legends name it."""
    return _KINDS.get(op, "other")


def colour_of(op: str) -> str:
    return COLOURS[kind_of(op)]


def owner_colours(owners: Sequence[str]) -> dict[str, str]:
    """A colour for each owner of memory: its kind's, lighter with each further owner of that kind."""
    seen: dict[str, int] = {}
    colours = {}
    for owner in owners:
        kind = next((kind for word, kind in _OWNER_WORDS if word in owner.lower()), "other")
        place = seen[kind] = seen.get(kind, -1) + 1
        colours[owner] = lighter(COLOURS[kind], (0.0, 0.4, 0.65, 0.8)[min(place, 3)])
    return colours


def lighter(colour: str, share: float) -> str:
    """The colour mixed with white; share 0 leaves it, 1 is white."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)


def ink_on(colour: str) -> str:
    """Black or white, whichever can be read on the colour."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


def new_figure(height: float) -> Figure:
    """A figure of its own, `height` inches high, that touches none of pyplot's state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")


def plain_axes(ax: Axes, *, grid: str = "") -> None:
    """No frame but the axis lines; a light grid along "x", "y" or nothing, behind the data."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(FAINT)
        ax.spines[side].set_linewidth(0.7)
    ax.tick_params(colors=INK, labelsize=TEXT, width=0.7, length=3, color=FAINT)
    ax.set_axisbelow(True)
    if grid:
        ax.grid(axis=grid, color=GRID, linewidth=0.7)


def title(ax: Axes, text: str, note: str = "") -> None:
    """What the picture says, at its left; what to know when reading it, smaller, below."""
    ax.set_title(text, loc="left", fontsize=TITLE, color=INK, fontweight="bold", pad=20 if note else 8)
    if note:
        ax.annotate(
            note,
            (0, 1),
            xytext=(0, 7),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=SMALL,
            color=FAINT,
            annotation_clip=False,
        )


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `gap` apart and within [low, high] if there is room."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed = [min(max(wanted[i], low), high) for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    if placed and placed[-1] > high:
        placed[-1] = high
        for i in range(len(placed) - 2, -1, -1):
            placed[i] = min(placed[i], placed[i + 1] - gap)
    result = [0.0] * len(wanted)
    for position, i in zip(placed, order, strict=True):
        result[i] = position
    return result
