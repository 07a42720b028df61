"""Options that several commands share, and the machine they describe."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from slidetune.errors import SlidetuneError
from slidetune.hardware import HardwareProfile
from slidetune.machines import DEFAULT_GPU, DEFAULT_HOST, adapted, load_profile, machine, with_gpu

_PANEL = "Machine"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a page.")]
SeqLen = Annotated[
    int | None, typer.Option("--seq-len", help="Tokens a sequence.  \\[default: 1024]", show_default=False)
]
TraceFile = Annotated[
    Path | None,
    typer.Option("--trace", metavar="FILE", help="Write the predicted step for ui.perfetto.dev (.json or .json.gz)."),
]


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as the command line describes it."""

    profile: HardwareProfile
    assumed: tuple[str, ...]
    """What was taken for granted, one phrase each."""


def with_machine(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that describe a machine; it gets a `Machine` as its parameter `here`."""
    own = inspect.signature(command, eval_str=True).parameters
    shared = inspect.signature(_machine_from, eval_str=True).parameters

    @functools.wraps(command)
    def wrapped(**values: Any) -> Any:
        here = _machine_from(**{name: values.pop(name) for name in shared})
        return command(here=here, **values)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for n, p in own.items() if n != "here"]
    parameters += list(shared.values())
    wrapped.__signature__ = inspect.Signature(parameters)
    hints = {**get_type_hints(command, include_extras=True), **get_type_hints(_machine_from, include_extras=True)}
    wrapped.__annotations__ = {p.name: hints[p.name] for p in parameters}
    return wrapped


def _option(*names: str, **kwargs: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_PANEL, show_default=False, **kwargs)


def _machine_from(
    *,
    gpu: Annotated[
        str | None, _option("--gpu", help=f"A GPU of `slidetune gpus`, such as 4090.  \\[default: {DEFAULT_GPU}]")
    ] = None,
    host: Annotated[
        str | None, _option("--host", help=f"Host preset: desktop, workstation, server.  \\[default: {DEFAULT_HOST}]")
    ] = None,
    ram: Annotated[float | None, _option("--ram", metavar="GIB", help="RAM, GiB.")] = None,
    cores: Annotated[float | None, _option("--cores", metavar="N", help="Physical CPU cores.")] = None,
    dram_bw: Annotated[
        float | None, _option("--dram-bw", metavar="GBS", help="Peak DRAM bandwidth of all channels, GB/s.")
    ] = None,
    link: Annotated[
        str | None, _option("--link", help="PCIe generation and width (pcie4x16), or GB/s measured (25.5/26.4).")
    ] = None,
    nvme: Annotated[
        str | None,
        _option("--nvme", metavar="SIZE:READ/WRITE", help="NVMe space and GB/s, such as 2TB:7/5; or none."),
    ] = None,
    gpu_memory: Annotated[
        float | None, _option("--gpu-memory", metavar="GIB", help="Cap on the GPU memory that may be used, GiB.")
    ] = None,
    kernels: Annotated[
        str | None, _option("--kernels", help="eager (transformers' own) or liger (Liger's fused ones).")
    ] = None,
    profile: Annotated[
        str | None,
        _option(
            "--profile",
            metavar="FILE",
            help="A whole machine: a profile's file or a shipped one's name; --gpu puts another card into it.",
        ),
    ] = None,
) -> Machine:
    changes = {
        "ram_gib": ram,
        "cores": cores,
        "dram_gbs": dram_bw,
        "link": link,
        "nvme": nvme,
        "gpu_memory_gib": gpu_memory,
        "kernels": kernels,
    }
    if profile is None:
        here = adapted(machine(gpu or DEFAULT_GPU, host or DEFAULT_HOST), **changes)
        return Machine(here, tuple(_assumed(here, gpu, host, changes)))
    if host:
        raise SlidetuneError("--profile describes a whole machine; --host can't be given with it.", "Drop --host.")
    whole = load_profile(profile)
    return Machine(adapted(with_gpu(whole, gpu) if gpu else whole, **changes), ())


def _assumed(here: HardwareProfile, gpu: str | None, host: str | None, changes: dict[str, Any]) -> list[str]:
    """What of the machine nobody said, each with the flag that says it."""
    phrases = [] if gpu else [f"a {here.gpu.name} (--gpu)"]
    nvme = here.nvme
    drive = (
        f"{nvme.size_gb.value / 1000:g} TB of NVMe, {nvme.read_gbs.value:g}/{nvme.write_gbs.value:g} GB/s"
        if nvme
        else "no NVMe"
    )
    figures = {
        "cores": f"{here.host.cores.value:g} cores (--cores)",
        "ram_gib": f"{here.host.ram_gib.value:g} GiB RAM (--ram)",
        "dram_gbs": f"{here.host.dram_gbs.source or 'DRAM'}, {here.host.dram_gbs.value:g} GB/s (--dram-bw)",
        "nvme": f"{drive} (--nvme)",
    }
    open_figures = [text for name, text in figures.items() if changes[name] is None]
    if open_figures:
        preset = f"a {here.host.name}" if host else f"a {here.host.name} (--host)"
        phrases.append(f"{preset}: " + ", ".join(open_figures))
    if changes["link"] is None:
        phrases.append(f"{here.link.name} (--link)")
    if changes["kernels"] is None:
        phrases.append("transformers' own kernels (--kernels)")
    return phrases
