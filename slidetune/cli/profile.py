"""`slidetune profile`: measure the machine at hand."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated

import typer

from slidetune import files
from slidetune.cli import console
from slidetune.cli.results import check_writable
from slidetune.cli.run import torch_is_there
from slidetune.errors import DoesNotFit
from slidetune.units import format_seconds


def profile(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where the profile is written.")
    ] = Path("profile.yaml"),
    *,
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, cpu.  \\[default: the first GPU, else cpu]", show_default=False)
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Measure this model's layers and head too: predictions of it are then much closer."),
    ] = None,
    kernels: Annotated[
        list[str] | None,
        typer.Option(metavar="auto|eager|liger", help="With --model: their kernels.", show_default="auto"),
    ] = None,
    nvme_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Measure this folder's drive too.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few seconds, for a rough idea.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a page.")] = False,
) -> None:
    """Measure this machine: rates of GPU, link, CPU and drive, for `--profile`. Let it idle meanwhile."""
    check_writable(output)
    torch_is_there()
    from slidetune.runtime.measure import Effort, measure_machine
    from slidetune.runtime.measure_kernels import measure_kernels
    from slidetune.runtime.trainer import chosen_device
    from slidetune.units import MIB

    chosen = chosen_device(device)
    effort = Effort(seconds=0.1, copy_bytes=32 * MIB, params=8 * MIB, matrix=2048, nvme_bytes=128 * MIB)
    try:
        found = measure_machine(chosen, nvme_folder=nvme_dir, effort=effort if quick else None)
    except MemoryError as error:
        raise DoesNotFit(f"{error}.", "End what else uses the memory; --quick takes less of it.") from None
    for name, wanted in itertools.product(model or (), kernels or ("auto",)):
        with console.progress(f"measuring {name}") as advance:
            times = measure_kernels(
                name,
                found.gpu,
                chosen,
                kernels=wanted,
                seconds=5.0 if quick else 30.0,
                progress=lambda done, of: advance(done, of, "micro-batches"),
            )
        found = dataclasses.replace(found, gpu=dataclasses.replace(found.gpu, times=found.gpu.times + times))
    files.write(output, found)
    if json:
        console.print_json(files.dump(found))
        return
    for path, figure in found.figures():
        console.out.print(f"{path:32} {figure.value:>10.4g}  {figure.source}", soft_wrap=True)
    for time in found.gpu.times:
        console.out.print(
            f"{time.model} {time.kernels} {time.op:9} {time.micro_batch:3} x {time.seq_len:<6,} "
            f"{format_seconds(time.seconds):>8} ± {time.spread:.0%}, {time.seconds / time.model_s:.2f} of the figures'"
        )
    console.out.print(f"Written: {output}")
