"""A report: the pictures of a prediction, and one self-contained page that explains them.

What only the planner knows (other plans, other machines) comes in as plain rows; the rest is read off the
prediction.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slidetune.traces import page, plots
from slidetune.traces.labels import TIER_LABELS, head_unit, in_words, lane_label, percent
from slidetune.traces.measured_tables import measured_tables
from slidetune.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from slidetune.traces.validation import Validation

_OWNERS_NAMED = 4
# Kinds of figures, the best known first.
_KINDS = {
    "measured": "measured on such a machine",
    "data sheet": "from a data sheet",
    "derived": "carried over from another measurement",
    "given": "given by you",
    "guess": "guessed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One decision of the plan, for the page's table."""

    name: str
    value: object
    meaning: str
    why: str = ""
    """Why it has this value here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """What one change of the machine would do."""

    change: str
    """Such as "+32 GiB RAM"."""
    tokens_per_s: float
    limiter: str = ""
    """What limits the step then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """The search, for its two pictures."""

    trials: Sequence[Mapping[str, Any]]
    """Each with number, value (tokens/s or None), feasible, origin."""
    importances: Mapping[str, float] = field(default_factory=dict)
    """Share of the variation in throughput that each knob explains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """The best plan of each batch, for the throughput picture. Throughputs in tokens/s."""

    points: Sequence[tuple[float, float]]
    chosen: tuple[float, float]
    bounds: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)


def write_report(
    directory: str | Path,
    *,
    prediction: Any,
    title: str,
    facts: Iterable[tuple[str, object]],
    subtitle: str = "",
    knobs: Iterable[Knob] = (),
    whatif: Iterable[WhatIf] = (),
    study: Study | None = None,
    sweep: Sweep | None = None,
    validation: Validation | None = None,
    assumptions: Iterable[str] = (),
) -> Path:
    """Write the pictures as PNG files and index.html, which holds them too; returns the page's path.

    With a `validation` of the prediction, what was measured comes first. `facts` are the page's headline numbers,
    label and value. `assumptions` are sentences on what was taken for granted; the machine's figures and their
    sources come from the prediction's profile.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)

    def draw(name: str, figure: Figure, alt: str) -> page.Html:
        png = _png(figure)
        (directory / f"{name}.png").write_bytes(png)
        return page.picture(png, alt)

    measured = []
    if validation is not None:
        if validation.rows:
            figure = plots.side_by_side(validation)
            measured.append(draw("validation", figure, "The predicted step above the measured one"))
        measured += measured_tables(validation)
    timeline = draw("timeline", plots.timeline(prediction), "Timeline of a steady step, lane by lane")
    lanes = draw("lanes", plots.lane_shares(prediction), "Shares of the step each lane works and waits")
    memory = draw("memory", plots.memory(prediction), "Memory of each tier over the step")
    throughput = ""
    if sweep is not None:
        figure = plots.throughput_by_batch(sweep.points, sweep.chosen, sweep.bounds)
        throughput = draw("throughput", figure, "Throughput against batch, with the bound of each resource")
    search = []
    if study is not None and study.trials:
        search.append(draw("study", plots.study_history(study.trials), "Throughput of every trial"))
        if study.importances:
            figure = plots.knob_importance(study.importances)
            search.append(draw("knobs", figure, "Importance of each knob"))
    content = [
        page.cards(facts),
        page.section("Predicted and measured", *measured, intro=_VALIDATION_INTRO),
        page.section("One step as predicted" if measured else "One step", timeline, intro=_step_intro(prediction)),
        page.section("What limits it", lanes, _limits(prediction), intro=_limit_intro(prediction)),
        page.section("Memory", _memory_table(prediction), memory, intro=_MEMORY_INTRO),
        page.section("Throughput and batch", throughput, intro=_SWEEP_INTRO),
        page.section("What would help", _whatif_table(whatif, prediction.tokens_per_s), intro=_WHATIF_INTRO),
        page.section("The plan", _knob_table(knobs), intro=_PLAN_INTRO),
        page.section("The search", *search, intro=_STUDY_INTRO),
        page.section("Assumptions and sources", _assumptions(assumptions), _sources(prediction.profile)),
    ]
    path = directory / "index.html"
    what = "A prediction by slidetune, and what was measured" if measured else "A prediction by slidetune"
    footer = f"{what}. Times are of a step in steady state."
    text = page.page(title, subtitle, content, footer)
    path.write_text(text, encoding="utf-8")
    return path


_VALIDATION_INTRO = (
    "The prediction was made before the run, from the machine's profile and the plan alone. An error is predicted / "
    "measured - 1: below zero, the prediction was too short or too small."
)
_MEMORY_INTRO = (
    "Pools are allocated once, to the byte, for the whole run, so the peak is known before anything runs. "
    "The colours show which part of each is in use; a tier must hold what is allocated."
)
_SWEEP_INTRO = (
    "A larger batch spreads the same transfers and the same optimizer step over more tokens, until the GPU "
    "is the limit. It is not free for training, so the smallest one near the top is the one to take."
)
_PLAN_INTRO = "What was decided, what each knob does, and what a step either way would do."
_WHATIF_INTRO = "The best plan again, on a machine with one thing changed."
_STUDY_INTRO = "Every plan tried, in order. Plans that don't fit are known from arithmetic and not simulated."


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the library's version in it, the same report gives the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _knob_table(knobs: Iterable[Knob]) -> page.Html:
    rows = []
    for knob in knobs:
        meaning = [page.escape(knob.meaning)]
        if knob.why:
            meaning.append(page.tag("div", knob.why, class_="note"))
        rows.append((page.tag("code", knob.name), _value(knob.value), page.join(meaning)))
    return page.table(("Knob", "Value", "What it does"), rows, numbers=(1,))


def _value(value: object) -> str:
    return "–" if value is None else f"{value:,}" if type(value) is int else str(value)


def _step_intro(prediction: Any) -> str:
    return (
        f"{prediction.schedule.tokens:,} tokens in {format_seconds(prediction.step_s)}, "
        f"{len(prediction.trace):,} tasks. Lanes run side by side, each its tasks in order; the step "
        "repeats, so what runs beyond one end is shown at the other."
    )


def _limit_intro(prediction: Any) -> str:
    share = prediction.bound_s / prediction.step_s
    resource = next(iter(prediction.bounds_s))
    return (
        f"The step waits for {prediction.limiter} most. No step of this plan can be shorter than its busiest "
        f"resource needs, which is {resource} with {format_seconds(prediction.bound_s)}: {share:.0%} of the "
        "step predicted."
    )


def _limits(prediction: Any) -> page.Html:
    step_s = prediction.step_s
    path = page.table(
        ("On the critical path", "Time", "Of the step", ""),
        (
            (lane_label(lane), format_seconds(seconds), f"{seconds / step_s:.1%}", page.bar(seconds / step_s))
            for lane, seconds in prediction.critical_s.items()
        ),
        numbers=(1, 2),
    )
    bounds = page.table(
        ("Least time needed by", "Time", "Of the step", ""),
        (
            (name, format_seconds(seconds), f"{seconds / step_s:.1%}", page.bar(seconds / step_s))
            for name, seconds in prediction.bounds_s.items()
        ),
        numbers=(1, 2),
    )
    return page.join([path, bounds])


def _memory_table(prediction: Any) -> page.Html:
    head = head_unit(prediction.schedule)
    rows = []
    for name, tier in prediction.memory.items():
        if not tier.peak_bytes:
            continue
        owners = list(tier.peak_owners.items())
        named = [f"{owner} {format_bytes(size)}" for owner, size in owners[:_OWNERS_NAMED]]
        if len(owners) > _OWNERS_NAMED:
            named.append(f"{len(owners) - _OWNERS_NAMED} more")
        share = percent(tier.peak_bytes / tier.capacity_bytes) if tier.capacity_bytes else "–"
        rows.append(
            (
                TIER_LABELS.get(name, name),
                format_bytes(tier.peak_bytes),
                format_bytes(tier.capacity_bytes),
                share,
                in_words(tier.peak_task, head) or "all along",
                ", ".join(named),
            )
        )
    return page.table(("", "Peak", "Usable", "Used", "When", "Made of"), rows, numbers=(1, 2, 3))


def _whatif_table(whatif: Iterable[WhatIf], now: float) -> page.Html:
    changes = sorted(whatif, key=lambda row: -row.tokens_per_s)
    most = max([row.tokens_per_s / now - 1 for row in changes], default=0.0)
    rows = [
        (
            row.change,
            f"{row.tokens_per_s:,.0f}",
            f"{row.tokens_per_s / now - 1:+.1%}",
            page.bar((row.tokens_per_s / now - 1) / most if most > 0 else 0.0),
            row.limiter,
        )
        for row in changes
    ]
    return page.table(("Change", "Tokens/s", "Gain", "", "Limited then by"), rows, numbers=(1, 2))


def _assumptions(sentences: Iterable[str]) -> page.Html:
    items = [page.tag("li", sentence) for sentence in sentences]
    return page.tag("ul", page.join(items)) if items else page.Html("")


def _sources(profile: Any) -> page.Html:
    """The machine's figures, how each is known, and how many of each kind there are."""
    figures = list(profile.figures())
    census = Counter(figure.kind for _, figure in figures)
    known = [f"{census[kind]} {text}" for kind, text in _KINDS.items() if census[kind]]
    order = {kind: i for i, kind in enumerate(_KINDS)}
    # Guesses first: they are what to replace.
    figures.sort(key=lambda item: -order.get(item[1].kind, 0))
    rows = [
        (page.tag("code", path), f"{figure.value:,.6g}", figure.kind, f"±{figure.spread:.0%}", figure.source)
        for path, figure in figures
    ]
    listed = page.table(("Figure", "Value", "Kind", "Off by", "Source"), rows, numbers=(1, 3))
    return page.join([page.tag("p", f"The machine's {len(figures)} figures: {', '.join(known)}."), listed])
