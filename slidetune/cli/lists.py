"""`slidetune gpus`, `models` and `schema`: what there is, and how files look."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.table import Table

from slidetune.cli import console
from slidetune.cli.options import Json
from slidetune.errors import UnknownName
from slidetune.files import json_schema
from slidetune.hardware import HardwareProfile
from slidetune.machines import default_link, gpu_names, load_gpu
from slidetune.models import catalog_row, load_model, model_names
from slidetune.plans import Plan
from slidetune.units import format_count

_FILES = {"plan": Plan, "profile": HardwareProfile}


def gpus(json: Json = False) -> None:
    """The GPUs in the catalog, with rates and memory; --json has full names and every figure's source."""
    names = gpu_names()
    if json:
        console.print_json({name: dataclasses.asdict(load_gpu(name)) for name in names})
        return
    table = _table(
        ("Name", "left"),
        ("bf16 TFLOP/s", "right"),
        ("reached", "right"),
        ("memory GiB", "right"),
        ("GB/s", "right"),
        ("link", "left"),
    )
    for name in names:
        gpu = load_gpu(name)
        table.add_row(
            name,
            f"{gpu.bf16_tflops.value:,.4g}",
            f"{gpu.matmul_efficiency.value:.0%}",
            f"{gpu.memory_gib.value:.4g}",
            f"{gpu.memory_gbs.value:,.4g}",
            default_link(name).name,
        )
    console.out.print(table)


def models(json: Json = False) -> None:
    """The models in the offline catalog; --json has their hub ids."""
    specs = [load_model(name) for name in model_names()]
    if json:
        console.print_json(
            {
                spec.name: {
                    "hub": catalog_row(spec.name)["hub"],
                    "family": spec.family,
                    "params": spec.params,
                    "active_params": spec.active_params,
                    "layers": len(spec.layers),
                    "hidden_size": spec.hidden_size,
                    "vocab_size": spec.vocab_size,
                    "max_seq_len": spec.max_seq_len,
                }
                for spec in specs
            }
        )
        return
    table = _table(
        ("Name", "left"),
        ("family", "left"),
        ("parameters", "right"),
        ("active", "right"),
        ("layers", "right"),
        ("hidden", "right"),
        ("positions", "right"),
    )
    for spec in specs:
        table.add_row(
            spec.name,
            spec.family,
            format_count(spec.params),
            format_count(spec.active_params),
            str(len(spec.layers)),
            f"{spec.hidden_size:,}",
            f"{spec.max_seq_len:,}",
        )
    console.out.print(table)


def schema(kind: Annotated[str, typer.Argument(metavar="plan|profile")]) -> None:
    """The JSON schema of plan files or of profile files."""
    if kind not in _FILES:
        raise UnknownName("file kind", kind, _FILES)
    console.print_json(json_schema(_FILES[kind]))


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=True)
    return table
