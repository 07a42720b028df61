"""`slidetune profile`: measure the machine at hand."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from slidetune import files
from slidetune.cli import console
from slidetune.cli.results import check_writable
from slidetune.cli.run import torch_is_there
from slidetune.errors import DoesNotFit
from slidetune.hardware import NOISY_SPREAD, HardwareProfile
from slidetune.machines import catalog_card, catalog_guesses
from slidetune.units import format_seconds

QUICK = "A rough idea in about 15 seconds, and as much for each --model; else about 55, and 75 for each."


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
    quick: Annotated[bool, typer.Option("--quick", help=QUICK)] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a page.")] = False,
) -> None:
    """Measure this machine: rates of GPU, link, CPU and drive, for `--profile`. Let it idle meanwhile."""
    check_writable(output)
    torch_is_there()
    with console.progress("measuring this machine") as advance:
        advance(0, 1, "torch")
        from slidetune.runtime.measure import Effort, measure_machine
        from slidetune.runtime.measure_kernels import measure_kernels
        from slidetune.runtime.trainer import chosen_device
        from slidetune.units import MIB

    chosen = chosen_device(device)
    effort = Effort(
        seconds=0.1,
        copy_bytes=32 * MIB,
        copies_bytes=512 * MIB,
        params=8 * MIB,
        adam_bytes=512 * MIB,
        matrix=2048,
        nvme_bytes=128 * MIB,
    )
    try:
        with console.progress("measuring this machine") as advance:
            advance(0, 1, "memory")
            found = measure_machine(chosen, nvme_folder=nvme_dir, effort=effort if quick else None, progress=advance)
    except MemoryError as error:
        raise DoesNotFit(f"{error}.", "End what else uses the memory; --quick takes less of it.") from None
    for name, wanted in itertools.product(model or (), kernels or ("auto",)):
        with console.progress(f"measuring {name}") as advance:
            advance(0, 1, "its layers")
            times = measure_kernels(
                name,
                found.gpu,
                chosen,
                kernels=wanted,
                seconds=5.0 if quick else 75.0,
                progress=lambda done, of: advance(done, of, "micro-batches"),
            )
        found = dataclasses.replace(found, gpu=dataclasses.replace(found.gpu, times=found.gpu.times + times))
    files.write(output, found)
    if json:
        console.print_json(files.dump(found) | {"catalog": _catalog(found)})
        return
    for line in page(found):
        console.out.print(line, soft_wrap=True, markup=False)
    console.out.print(f"Written: {output}")


def page(found: HardwareProfile) -> Iterator[str]:
    """A measured profile, line by line: each figure, how sure it is, the catalog's guess of it, and its source."""
    guesses = catalog_guesses(found)
    noisy = []
    for path, figure in found.figures():
        guess = guesses.get(path)
        sure = f"±{figure.spread:.0%}{' noisy' if figure.noisy else ''}" if figure.kind == "measured" else figure.kind
        known = f"catalog {guess.figure.value:.4g}, {guess.difference:+.0%}" if guess else ""
        noisy += [path] if figure.noisy else []
        columns = f"{path:29} {figure.value:>9.4g} {sure:10} "
        yield f"{columns}{known:22} {figure.source}" if guesses else f"{columns}{figure.source}"
    for time in found.gpu.times:
        what = f"{time.model} {time.kernels} {time.op} {time.micro_batch} x {time.seq_len:,}"
        noisy += [what] if time.spread > NOISY_SPREAD else []
        yield (
            f"{time.model} {time.kernels} {time.op:9} {time.micro_batch:3} x {time.seq_len:<6,} "
            f"{format_seconds(time.seconds):>8} ±{time.spread:.0%}{' noisy' if time.spread > NOISY_SPREAD else ''}, "
            f"{time.seconds / time.model_s:.2f} of the figures'"
        )
    if noisy:
        yield f"Noisy, more than ±{NOISY_SPREAD:.0%}: {', '.join(noisy)}. Let the machine idle, then measure again."


def _catalog(found: HardwareProfile) -> dict[str, Any] | None:
    """What the catalog would have had, for programs."""
    card = catalog_card(found.gpu.name, found.gpu.memory_gib.value)
    if card is None:
        return None
    figures = {
        path: files.dump(guess.figure) | {"difference": guess.difference}
        for path, guess in catalog_guesses(found).items()
    }
    return {"card": card, "figures": figures}
