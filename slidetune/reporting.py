"""From a priced plan to its report: what the pictures and the page need, gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slidetune.builder import build
from slidetune.field_docs import field_docs
from slidetune.plans import Activations, Plan, Recompute, knobs
from slidetune.simulator.bounds import bounds_s
from slidetune.simulator.pricing import PriceList
from slidetune.units import TB, format_count, format_seconds

if TYPE_CHECKING:
    from slidetune.api import Planned, Priced
    from slidetune.traces.report import Knob, Study, Sweep, WhatIf
    from slidetune.traces.validation import Validation

_NESTED = {"activations": Activations, "recompute": Recompute}


def report(directory: str | Path, priced: Priced, *, assumptions: Sequence[str] = ()) -> Path:
    """Write pictures (PNG) and one self-contained index.html into a directory; returns the page's path.

    A `Planned` result brings the search with it: its history, knob importance, and throughput against batch.
    """
    from slidetune.traces.report import write_report

    prediction, model = priced.prediction, priced.model
    planned = priced if hasattr(priced, "found") else None
    return write_report(
        directory,
        prediction=prediction,
        title=f"{model.name} on {priced.profile.gpu.name}",
        subtitle=f"{format_count(model.params)} parameters, {len(model.layers)} layers, machine {priced.profile.name}",
        facts=_facts(priced),
        knobs=_knobs(priced.plan, planned.reasons if planned else {}) if priced.plan else (),
        whatif=_whatif(priced),
        study=_study(planned) if planned else None,
        sweep=_sweep(planned) if planned else None,
        assumptions=assumptions,
    )


def validation_report(directory: str | Path, found: Validation) -> Path:
    """The same for a plan that was run: what was measured stands beside what was predicted."""
    from slidetune.traces.report import write_report

    prediction, run = found.prediction, found.run
    plan, step = run.plan, found.step
    where = run.machine.get("gpu") or f"{run.machine['cpu']} as device"
    return write_report(
        directory,
        prediction=prediction,
        validation=found,
        title=f"{plan.model} on {where}",
        subtitle=f"Predicted, then run on {run.date}: {', '.join(f'{k} {v}' for k, v in run.versions.items())}",
        facts=[
            ("Predicted step", format_seconds(step.predicted)),
            ("Measured step", format_seconds(step.measured)),
            ("Error", f"{step.error:+.1%}"),
            ("Measured throughput", f"{plan.tokens / step.measured:,.0f} tokens/s"),
            ("Batch", f"{plan.batch} sequences of {plan.seq_len:,}"),
            ("Limited by", prediction.limiter),
        ],
        knobs=_knobs(plan, {}),
    )


def _facts(priced: Priced) -> list[tuple[str, str]]:
    prediction = priced.prediction
    facts = [
        ("Throughput", f"{prediction.tokens_per_s:,.0f} tokens/s"),
        ("A step", format_seconds(prediction.step_s)),
    ]
    if priced.interval:
        low, high = priced.interval.low_s, priced.interval.high_s
        facts.append(("Likely between", f"{format_seconds(low)} and {format_seconds(high)}"))
    if priced.plan:
        facts.append(("Batch", f"{priced.plan.batch} sequences of {priced.plan.seq_len:,}"))
    facts += [
        ("GPU computes", f"{prediction.gpu_busy:.0%} of the time"),
        ("Limited by", prediction.limiter),
        ("Of the bound", f"{prediction.bound_s / prediction.step_s:.0%}"),
    ]
    if prediction.nvme_written_bytes:
        facts.append(("Written to NVMe", f"{prediction.nvme_written_bytes * 1000 / TB:,.3g} TB per 1000 steps"))
    return facts


def _knobs(plan: Plan, reasons: Mapping[str, str]) -> list[Knob]:
    from slidetune.traces.report import Knob

    return [
        Knob(name=name, value=value, meaning=_meaning(name), why=reasons.get(name, ""))
        for name, value in knobs(plan).items()
        if name != "version"
    ]


def _meaning(knob: str) -> str:
    outer, _, inner = knob.partition(".")
    return field_docs(_NESTED[outer])[inner] if inner else field_docs(Plan)[knob]


def _whatif(priced: Priced) -> list[WhatIf]:
    from slidetune.traces.report import WhatIf

    return [WhatIf(change=row.change, tokens_per_s=row.tokens_per_s) for row in priced.whatif]


def _study(planned: Planned) -> Study:
    from slidetune.traces.report import Study

    trials = [
        {
            "number": trial.number,
            "value": trial.worth.tokens_per_s if trial.worth else None,
            "feasible": trial.worth is not None,
            "origin": trial.origin,
        }
        for trial in planned.found.trials
    ]
    return Study(trials=trials, importances=_importances(planned))


def _importances(planned: Planned) -> dict[str, float]:
    """Each knob's share of the variation in throughput; empty where a study is too small or absent."""
    study = planned.found.study
    if study is None or planned.found.simulated < 20:
        return {}
    import optuna

    return optuna.importance.get_param_importances(study)


def _sweep(planned: Planned) -> Sweep | None:
    """The best plan of each batch, and what each resource would allow that plan."""
    from slidetune.traces.report import Sweep

    best = planned.found.best_by_batch()
    if len(best) < 2:
        return None
    prices, kernels = PriceList(planned.profile), planned.profile.gpu.kernels
    bounds: dict[str, list[tuple[float, float]]] = {}
    for batch, trial in best.items():
        for name, seconds in bounds_s(build(planned.model, trial.plan, kernels), prices).items():
            if seconds > 0:
                bounds.setdefault(name, []).append((batch, trial.plan.tokens / seconds))
    return Sweep(
        points=[(batch, trial.worth.tokens_per_s) for batch, trial in best.items()],
        chosen=(planned.plan.batch, planned.prediction.tokens_per_s),
        bounds=bounds,
    )
