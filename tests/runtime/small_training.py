"""A training that takes a second: a random Llama, a few rows of text, a plan for the CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from slidetune.plan_file import write_plan
from slidetune.plans import Plan
from slidetune.recipe import Data, Recipe
from slidetune.runtime.checkpoint import export, latest

CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 256,
    "max_position_embeddings": 64,
}


def put_model(folder: Path, **changes: object) -> Path:
    """Write a random model; text becomes bytes, since it has no tokenizer."""
    torch.manual_seed(3)
    config = AutoConfig.for_model("llama", **(CONFIG | changes))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def put_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def small_recipe(folder: Path, **changes: object) -> Recipe:
    """A recipe whose model, rows and plan lie in `folder`, where they are made if they aren't there."""
    model = folder / "model"
    if not model.is_dir():
        put_model(model)
        put_rows(folder / "rows.jsonl", [{"text": f"the cat {i} sat on mat {i * 7 % 13}. " * 2} for i in range(40)])
        write_plan(folder / "plan.yaml", small_plan(folder))
    data = Data(source=str(folder / "rows.jsonl"), held_out=0.1)
    recipe = Recipe(
        model=str(model),
        data=data,
        plan=str(folder / "plan.yaml"),
        lr=3e-3,
        warm_up_steps=2,
        weight_decay=0.1,
        steps=8,
        output=str(folder / "out"),
        device="cpu",
    )
    return dataclasses.replace(recipe, **changes)


def small_plan(folder: Path, **changes: object) -> Plan:
    plan = Plan(model=str(folder / "model"), seq_len=16, micro_batch=2, accumulation=2, adam_threads=1)
    return dataclasses.replace(plan, **changes)


def events(recipe: Recipe, kind: str | None = None) -> list[dict[str, object]]:
    """The log's lines, or those of one event."""
    folder = Path(recipe.output if recipe.log is None else recipe.log)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["event"])]


def masters(output: str | Path, to: Path) -> dict[str, torch.Tensor]:
    """The fp32 weights of the last checkpoint in a folder, written to `to` on the way."""
    export(latest(output), to, "fp32")
    return {name: tensor for file in to.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
