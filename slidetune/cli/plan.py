"""`slidetune plan`: search the best plan for a model on a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slidetune import api
from slidetune.cli import console, pages
from slidetune.cli.options import Json, Machine, SeqLen, TraceFile, with_machine
from slidetune.cli.results import check_writable, write_report_files, write_trace_file
from slidetune.models import load_model
from slidetune.plan_file import write_plan
from slidetune.units import format_seconds

_SEARCH = "Search"


@with_machine
def plan(
    *,
    here: Machine,
    model: Annotated[
        str | None,
        typer.Option(
            help="A name of `slidetune models`, a config.json, a directory or a hub id.  "
            f"\\[default: {api.DEFAULT_MODEL}]",
            show_default=False,
        ),
    ] = None,
    seq_len: SeqLen = None,
    batch: Annotated[
        int | None, typer.Option(help="Sequences of an optimizer step; by default the smallest that is fast enough.")
    ] = None,
    clip: Annotated[
        float | None, typer.Option(metavar="NORM", help="Clip exactly to this global gradient norm.")
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="throughput; or at least 90 % of it with least ram, or with least nvme-writes a token.",
            rich_help_panel=_SEARCH,
        ),
    ] = "throughput",
    trials: Annotated[
        int, typer.Option(help="Distinct plans to simulate; in a shared study, new ones.", rich_help_panel=_SEARCH)
    ] = (api.DEFAULT_TRIALS),
    seed: Annotated[int, typer.Option(help="The same seed gives the same plan.", rich_help_panel=_SEARCH)] = 0,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Try every plan of a coarse space.", rich_help_panel=_SEARCH)
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Optuna storage to share between machines: sqlite:///FILE, postgresql://..., journal:FILE.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    study: Annotated[str, typer.Option(help="The study's name in the storage.", rich_help_panel=_SEARCH)] = "slidetune",
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the plan is written.")] = Path(
        "plan.yaml"
    ),
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="Write pictures and one HTML page.")] = None,
    trace: TraceFile = None,
    json: Json = False,
) -> None:
    """Search the best settings: does it fit, how fast will it be, what limits it, what would help.

    Writes the plan to plan.yaml, with a comment on what each knob does and why it has its value.
    """
    spec = load_model(model or api.DEFAULT_MODEL)
    length = min(api.DEFAULT_SEQ_LEN, spec.max_seq_len) if seq_len is None else seq_len
    assumed = [*_assumed(model, seq_len, length), *here.assumed]
    check_writable(output, trace)
    if not json:
        console.out.print(pages.header(spec, here.profile, assumed))
    with console.progress("planning") as advance:
        planned = api.plan(
            spec,
            here.profile,
            seq_len=length,
            batch=batch,
            clip_norm=clip,
            objective=objective,
            trials=trials,
            seed=seed,
            exhaustive=exhaustive,
            storage=storage,
            study_name=study,
            progress=lambda done, of, best: advance(done, of, f"{done} plans, best {best:,.0f} tokens/s"),
        )
    write_plan(output, planned.plan, reasons=planned.reasons, heading=_heading(planned))
    if trace is not None:
        write_trace_file(trace, planned)
    page = write_report_files(report, planned, assumed) if report is not None else None
    if json:
        console.print_json(planned.as_dict() | {"assumed": assumed, "plan_file": str(output)})
        return
    console.out.print(pages.priced_page(planned))
    console.out.print()
    console.out.print(pages.planned_footer(planned, output))
    for path in (page, trace):
        if path is not None:
            console.out.print(f"Written: {path}", style="dim")


def _assumed(model: str | None, given: int | None, seq_len: int) -> list[str]:
    phrases = [] if model else [f"{api.DEFAULT_MODEL} (--model)"]
    return phrases if given else [*phrases, f"sequences of {seq_len} tokens (--seq-len)"]


def _heading(planned: api.Planned) -> list[str]:
    prediction, interval = planned.prediction, planned.interval
    return [
        f"slidetune: {planned.model.name} on {planned.profile.name}.",
        f"Predicted: {prediction.tokens_per_s:,.0f} tokens/s, {format_seconds(prediction.step_s)} a step "
        f"(likely {format_seconds(interval.low_s)} to {format_seconds(interval.high_s)}); "
        f"limited by {prediction.limiter}.",
        "Edit what you like, then `slidetune simulate` this file.",
    ]
