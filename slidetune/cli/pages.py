"""What commands print for people: one page a result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slidetune.api import Fit, Planned, Priced
from slidetune.hardware import HardwareProfile
from slidetune.model import ModelSpec
from slidetune.plans import Plan, knobs
from slidetune.schedule import LANE_NAMES, TIERS
from slidetune.simulator.memory import TierMemory
from slidetune.simulator.predict import Prediction
from slidetune.traces.labels import TIER_LABELS
from slidetune.tuner.whatif import AS_IT_IS
from slidetune.units import GIB, TB, format_bytes, format_count, format_seconds

_BAR = 16
_IN_WORDS = ("waiting for", "most of it", "Optimizer state in")
_TIER_NAMES = {"gpu": "GPU", "ram": "RAM", "nvme": "NVMe"}
# Effects on the step below this share are not worth a line.
_TELLING = 0.002
_NAMED = 3


def header(model: ModelSpec, profile: HardwareProfile, assumed: Iterable[str] = ()) -> RenderableType:
    """The model, the machine, and what was taken for granted."""
    rows = _rows()
    rows.add_row("Model", f"{model.name}: {format_count(model.params)} parameters, {len(model.layers)} layers")
    return _with_machine(rows, profile, assumed)


def machine_rows(profile: HardwareProfile, assumed: Iterable[str] = ()) -> RenderableType:
    """The machine alone."""
    return _with_machine(_rows(), profile, assumed)


def _with_machine(rows: Table, profile: HardwareProfile, assumed: Iterable[str]) -> Table:
    rows.add_row("Machine", machine_line(profile))
    if assumed := list(assumed):
        rows.add_row("Assumed", Text("; ".join(assumed), style="dim"))
    return rows


def machine_line(profile: HardwareProfile) -> str:
    gpu, host, nvme = profile.gpu, profile.host, profile.nvme
    drive = (
        f"NVMe {nvme.size_gb.value / 1000:g} TB at {nvme.read_gbs.value:g}/{nvme.write_gbs.value:g} GB/s"
        if nvme
        else "no NVMe"
    )
    return (
        f"{gpu.name}, {gpu.memory_gib.value:.3g} GiB; {profile.link.name}; {host.cores.value:g} cores; "
        f"{host.ram_gib.value:g} GiB RAM at {host.dram_gbs.value:g} GB/s; {drive}"
    )


def priced_page(priced: Priced) -> RenderableType:
    """Speed, limits, memory, and what would help."""
    parts: list[RenderableType] = [Text(), _speed(priced), Text(), _lanes(priced), Text(), _memory(priced)]
    if priced.whatif:
        parts += [Text(), _whatif(priced)]
    if priced.interval:
        parts += [Text(), _uncertain(priced)]
    return Group(*parts)


def plan_table(plan: Plan) -> RenderableType:
    """The knobs that are set, several to a line."""
    shown = [f"{name} {_knob(name, value)}" for name, value in knobs(plan).items() if _worth_showing(name, value)]
    return Text(" · ".join(shown))


def planned_footer(planned: Planned, path: object) -> RenderableType:
    trials = planned.found
    lacking = sum(trial.worth is None for trial in trials.trials)
    searched = f"{trials.simulated} plans simulated" + (f", {lacking} more don't fit" if lacking else "")
    rows = _rows()
    rows.add_row("Plan", plan_table(planned.plan))
    rows.add_row("Search", Text(f"{searched}; why each knob has its value stands in {path}", style="dim"))
    return rows


def fit_table(rows: Sequence[Fit]) -> RenderableType:
    """One line a model: fits or not, tokens/s, step, and where its state lives."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    _columns(
        table,
        ("Model", "left"),
        ("Parameters", "right"),
        ("Tokens/s", "right"),
        ("Step", "right"),
        ("Batch", "right"),
        ("Optimizer state in", "left"),
        ("RAM", "right"),
    )
    for row in rows:
        if row.planned is None:
            lack = f"does not fit: too little {TIER_LABELS[row.lacking]}"
            table.add_row(row.model, format_count(row.params), "–", "", "", lack, "", style="dim")
            continue
        plan, worth = row.planned.plan, row.planned.worth
        table.add_row(
            row.model,
            format_count(row.params),
            f"{worth.tokens_per_s:,.0f}",
            format_seconds(worth.step_s),
            str(plan.batch),
            tiers(plan),
            format_bytes(worth.ram_bytes),
        )
    return table


def tiers(plan: Plan) -> str:
    """Where the layers' optimizer state lives."""
    parts = []
    if plan.resident_layers:
        parts.append(f"GPU ({_layers(plan.resident_layers)})")
    parts.append("RAM")
    if plan.optimizer_nvme:
        parts.append(f"NVMe ({_layers(plan.optimizer_nvme)})")
    return ", ".join(parts)


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _rows() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True, min_width=8)
    table.add_column(ratio=1)
    return table


def _speed(priced: Priced) -> RenderableType:
    prediction = priced.prediction
    tokens = prediction.schedule.tokens
    likely = ""
    if priced.interval:
        low, high = priced.interval.low_s, priced.interval.high_s
        likely = f", likely {format_seconds(low)} to {format_seconds(high)}"
    batch = f" of {priced.plan.batch} sequences" if priced.plan else ""
    rows = _rows()
    rows.add_row(
        "Speed",
        Text.assemble(
            (f"{prediction.tokens_per_s:,.0f} tokens/s", "bold green"),
            f"  {format_seconds(prediction.step_s)} a step{batch} ({tokens:,} tokens){likely}",
        ),
    )
    bound = next(iter(prediction.bounds_s))
    rows.add_row(
        "Limit",
        f"{prediction.limiter}; the GPU computes {prediction.gpu_busy:.0%} of the time. No step of this plan takes "
        f"less than {format_seconds(prediction.bound_s)} ({bound}); this one is {_distance(prediction)}",
    )
    written = prediction.nvme_written_bytes
    if written:
        rows.add_row("Wear", f"{written * 1000 / TB:,.3g} TB written to NVMe per 1000 steps")
    return rows


def _distance(prediction: Prediction) -> str:
    over = prediction.step_s / prediction.bound_s - 1.0
    return f"{over:.1%} above that" if over >= 0.0005 else "at that bound"


def _lanes(priced: Priced) -> RenderableType:
    prediction = priced.prediction
    table = Table(box=None, pad_edge=False, header_style="bold")
    _columns(table, ("Lane", "left"), ("busy", "right"), ("", "left"), ("waiting for", "left"))
    for lane, share in prediction.lanes.items():
        waits = [
            f"{LANE_NAMES.get(other, other)} {seconds / prediction.step_s:.0%}"
            for other, seconds in share.waiting_s.items()
            if seconds >= 0.01 * prediction.step_s
        ]
        busy = share.busy_s / prediction.step_s
        table.add_row(LANE_NAMES.get(lane, lane), f"{busy:.0%}", _bar(busy), ", ".join(waits[:_NAMED]) or "–")
    return table


def _memory(priced: Priced) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("Memory", "left"),
        ("peak", "right"),
        ("", "left"),
        ("usable", "right"),
        ("most of it", "left"),
    ):
        table.add_column(name, justify=justify)
    for tier in TIERS:
        memory = priced.prediction.memory[tier]
        if memory.capacity_bytes or memory.peak_bytes:
            share = memory.peak_bytes / memory.capacity_bytes if memory.capacity_bytes else 0.0
            table.add_row(
                _TIER_NAMES[tier],
                f"{memory.peak_bytes / GIB:,.1f} GiB",
                _bar(share),
                f"{memory.capacity_bytes / GIB:,.1f} GiB",
                _owners(memory),
            )
    return table


def _owners(memory: TierMemory) -> str:
    named = [f"{owner} {size / GIB:,.1f}" for owner, size in list(memory.peak_owners.items())[:_NAMED]]
    return ", ".join(named) or "unused"


def _whatif(priced: Priced) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    _columns(table, ("What would help most", "left"), ("tokens/s", "right"), ("gain", "right"), ("", "left"))
    most = max(row.gain for row in priced.whatif)
    helps = [row for row in priced.whatif if row.gain >= _TELLING]
    for row in helps:
        table.add_row(row.change, f"{row.tokens_per_s:,.0f}", f"{row.gain:+.1%}", _bar(row.gain / most))
    rest = [row.change for row in priced.whatif if row.gain < _TELLING and row.change != AS_IT_IS]
    if not rest:
        return table
    return Group(table, Text(("No help: " if helps else "Nothing helps: ") + ", ".join(rest), style="dim"))


def _uncertain(priced: Priced) -> RenderableType:
    """Which figures make the interval, and which of them are guesses."""
    step_s = priced.prediction.step_s
    telling = [e for e in priced.interval.effects if e.slower_s >= _TELLING * step_s]
    if not telling:
        return Text()
    words = [f"{e.figure} ({e.kind}, ±{e.spread:.0%}: up to {e.slower_s / step_s:+.1%})" for e in telling[:_NAMED]]
    text = "The interval comes from " + ", ".join(words) + "."
    guesses = [e.figure for e in priced.interval.guessed]
    if guesses:
        text += f" Guessed: {', '.join(guesses)}."
    return Text(text, style="dim")


def _columns(table: Table, *columns: tuple[str, str]) -> None:
    """Columns by name and alignment; only what is in words may wrap."""
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=name not in _IN_WORDS)


def _bar(share: float) -> Text:
    filled = round(min(max(share, 0.0), 1.0) * _BAR)
    return Text.assemble(("█" * filled, "cyan"), ("░" * (_BAR - filled), "bright_black"), no_wrap=True)


def _knob(name: str, value: object) -> str:
    return format_bytes(value) if name.endswith("_bytes") else str(value)


def _worth_showing(name: str, value: object) -> bool:
    return name not in ("model", "version") and value not in (0, None)
