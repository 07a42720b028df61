"""`slidetune fit`: which models a machine can train."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from slidetune import api
from slidetune.cli import console, pages
from slidetune.cli.options import Json, Machine, SeqLen, with_machine
from slidetune.files import dump


@with_machine
def fit(
    *,
    here: Machine,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Only this model; may be given several times.  \\[default: the catalog]", show_default=False),
    ] = None,
    seq_len: SeqLen = None,
    trials: Annotated[int, typer.Option(help="Plans to simulate for each model.")] = api.FIT_TRIALS,
    json: Json = False,
) -> None:
    """For a machine: which catalog models fit, at what tokens/s, with their state in which tiers."""
    length = api.DEFAULT_SEQ_LEN if seq_len is None else seq_len
    assumed = [*([] if seq_len else [f"sequences of {api.DEFAULT_SEQ_LEN} tokens (--seq-len)"]), *here.assumed]
    with console.progress("fitting") as advance:
        rows = api.fit(
            here.profile,
            model,
            seq_len=length,
            trials=trials,
            progress=advance,
        )
    if json:
        console.print_json(
            {
                "machine": here.profile.name,
                "assumed": assumed,
                "models": [
                    {
                        "model": row.model,
                        "params": row.params,
                        "seq_len": row.seq_len,
                        "fits": row.planned is not None,
                        "lacking": row.lacking or None,
                        "worth": dataclasses.asdict(row.planned.worth) if row.planned else None,
                        "plan": dump(row.planned.plan) if row.planned else None,
                    }
                    for row in rows
                ],
            }
        )
        return
    console.out.print(pages.machine_rows(here.profile, assumed))
    console.out.print()
    console.out.print(pages.fit_table(rows))
    shorter = [row for row in rows if row.seq_len < length]
    if shorter:
        names = ", ".join(f"{row.model} ({row.seq_len} tokens)" for row in shorter)
        console.out.print(f"With shorter sequences, having no more positions: {names}", style="dim")
