"""`slidetune export`: a checkpoint as a model that transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slidetune.cli import console
from slidetune.cli.run import torch_is_there


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a training's output, whose last one is taken."),
    ],
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where it goes; weights that are there are replaced.")
    ],
    dtype: Annotated[
        str, typer.Option(help="bf16, or fp32 for the weights as the optimizer has them, twice as large.")
    ] = "bf16",
) -> None:
    """Write a checkpoint's model and tokenizer as a Hugging Face directory."""
    torch_is_there()
    from slidetune.runtime.checkpoint import export as write

    taken = write(checkpoint, output, dtype)
    console.out.print(f"Written: {output}, the model of {taken}", markup=False)
