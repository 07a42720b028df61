"""`slidetune profile`: measure the machine at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slidetune import files
from slidetune.cli import console
from slidetune.cli.results import check_writable
from slidetune.cli.run import torch_is_there


def profile(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where the profile is written.")
    ] = Path("profile.yaml"),
    *,
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, cpu.  [default: the first GPU, else cpu]", show_default=False)
    ] = None,
    nvme_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Measure this folder's drive too.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few seconds, for a rough idea.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a page.")] = False,
) -> None:
    """Measure this machine: rates of GPU, link, CPU and drive, for `--profile`. Let it idle meanwhile."""
    check_writable(output)
    torch_is_there()
    import torch

    from slidetune.runtime.measure import Effort, measure_machine
    from slidetune.units import MIB

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    effort = Effort(seconds=0.1, copy_bytes=32 * MIB, params=8 * MIB, matrix=2048, nvme_bytes=128 * MIB)
    found = measure_machine(chosen, nvme_folder=nvme_dir, effort=effort if quick else None)
    files.write(output, found)
    if json:
        console.print_json(files.dump(found))
        return
    for path, figure in found.figures():
        console.out.print(f"{path:32} {figure.value:>10.4g}  {figure.source}", soft_wrap=True)
    console.out.print(f"Written: {output}")
