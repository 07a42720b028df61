"""`slidetune simulate` and `slidetune report`: price a given plan, or a published system's policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slidetune import api
from slidetune.cli import console, pages
from slidetune.cli.options import Json, Machine, SeqLen, TraceFile, with_machine
from slidetune.cli.results import write_report_files, write_trace_file
from slidetune.errors import SlidetuneError

PlanFile = Annotated[Path | None, typer.Argument(metavar="[PLAN]", help="A plan file, as `slidetune plan` writes it.")]


@with_machine
def simulate(
    plan: PlanFile = None,
    *,
    here: Machine,
    policy: Annotated[
        str | None, typer.Option(help="In place of a plan, a published system's own policy: slideformer.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --policy: the model.")] = None,
    batch: Annotated[int | None, typer.Option(help="With --policy: sequences of a step.")] = None,
    seq_len: SeqLen = None,
    trace: TraceFile = None,
    json: Json = False,
) -> None:
    """Price a plan file, as it is or edited by hand: speed, limits, memory of each tier."""
    priced = _priced(plan, here, policy, model, batch, seq_len)
    if trace is not None:
        write_trace_file(trace, priced)
    if json:
        console.print_json(priced.as_dict() | {"assumed": list(here.assumed)})
        return
    console.out.print(pages.header(priced.model, priced.profile, here.assumed))
    console.out.print(pages.priced_page(priced))
    if trace is not None:
        console.out.print(f"Written: {trace}", style="dim")


@with_machine
def report(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file, as `slidetune plan` writes it.")],
    *,
    here: Machine,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the report is written.")] = Path(
        "report"
    ),
    trace: TraceFile = None,
) -> None:
    """Draw a plan's step: timeline, lanes, memory, and one HTML page that explains them."""
    priced = api.simulate(plan, here.profile)
    if trace is not None:
        write_trace_file(trace, priced)
    page = write_report_files(output, priced, here.assumed)
    for path in (page, trace):
        if path is not None:
            console.out.print(f"Written: {path}")


def _priced(
    plan: Path | None,
    here: Machine,
    policy: str | None,
    model: str | None,
    batch: int | None,
    seq_len: int | None,
) -> api.Priced:
    if policy is not None:
        if plan is not None:
            raise SlidetuneError("a plan file and --policy can't be given together.", "Give one of them.")
        return api.simulate_policy(
            policy,
            model or api.DEFAULT_MODEL,
            here.profile,
            batch=1 if batch is None else batch,
            seq_len=api.DEFAULT_SEQ_LEN if seq_len is None else seq_len,
        )
    if plan is None:
        raise SlidetuneError("nothing to simulate.", "Give a plan file, or --policy slideformer.")
    for flag, value in (("--model", model), ("--batch", batch), ("--seq-len", seq_len)):
        if value is not None:
            raise SlidetuneError(f"{flag} goes with --policy; a plan says it itself.", f"Edit {plan}.")
    return api.simulate(plan, here.profile)
