"""Recipes: all that a person decides about a training, in one YAML file to keep in git.

How it is computed is the plan's matter. The text under each field is the one place that says what it means: it becomes
the file's comments and the help of the command line.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slidetune import files, schedules
from slidetune.commented import commented, write_text
from slidetune.errors import BadFile, SlidetuneError
from slidetune.plans import Plan

AUTO = "auto"
REPORTS = ("tensorboard", "wandb")


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What is trained on, and how its rows become sequences."""

    source: str
    """A .jsonl, .json, .parquet or .txt file, a directory of such files, or a hub dataset's id."""
    split: str = "train"
    """Split of a hub dataset."""
    held_out: float = 0.0
    """Share of the rows that is not trained on but evaluated; 0.01 is one percent."""
    max_faulty: float = 0.01
    """Share of the rows that may be unusable; with more, training does not start."""
    packed: bool = True
    """true: documents share sequences, each seeing only itself. false: a document a sequence, padded; for models
    that can't keep documents apart."""
    assistant_only: bool = True
    """true: of conversations, only the assistant's turns are learned. false: all of them."""
    chat_template: str | None = None
    """File with a Jinja chat template, in the place of the tokenizer's own; null for that one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One training."""

    model: str
    """Directory or hub id of the model to start from."""
    data: Data
    """What is trained on."""
    plan: str = AUTO
    """A plan's file, as `slidetune plan` writes it; auto makes a plan for this machine at the start."""
    seq_len: int | None = None
    """Tokens a sequence; null for the plan's, with plan: auto 1024 or what the model has positions for."""
    batch: int | None = None
    """Sequences an optimizer step, which is micro_batch * accumulation of the plan; null for the plan's, with
    plan: auto the smallest that is fast enough."""
    lr: float = 1e-5
    """Learning rate where the schedule's factor is 1."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    """What follows the warm-up. constant: the learning rate stays. linear, cosine: it falls towards 0 by the last
    step. wsd: it stays, and falls over the last decay_share of the steps."""
    warm_up_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly."""
    decay_share: float = 0.2
    """For schedule: wsd, the share of all steps over which the learning rate falls."""
    weight_decay: float = 0.0
    """Decay of matrices, decoupled: a step takes away this times the learning rate of each weight. Norms and
    biases have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay of the first and of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon, added to the root of the second moment."""
    clip_norm: float | None = None
    """Largest global gradient norm; needs a plan with update: forward, which plan: auto then makes. null for the
    plan's, with plan: auto none."""
    steps: int | None = None
    """Optimizer steps to train for; give these or epochs."""
    epochs: float | None = None
    """Passes over the data to train for, also parts of one; give these or steps."""
    seed: int = 0
    """Of data order, of what is held out, and of dropout."""
    evaluate_every: int | None = None
    """Optimizer steps between evaluations of what data.held_out holds out; null evaluates at the end only."""
    save_every: int | None = None
    """Optimizer steps between checkpoints; null saves at the end only."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    log: str | None = None
    """Directory for log.jsonl, which has a line for every step; null for the output directory."""
    report: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Who gets the log's figures too: tensorboard (files beside the log), wandb; each needs its library installed."""
    output: str = "trained"
    """Directory for checkpoints (step-...), the plan that was followed, and the trained model (in model)."""
    device: str | None = None
    """cuda, cuda:1 or cpu; null for the first GPU, else the CPU."""
    nvme_dir: str | None = None
    """Directory on NVMe for what the plan places there; null for where temporary files go."""
    trust_remote_code: bool = False
    """true runs Python code that comes with the model's tokenizer; only for models whose code you trust."""


def read_recipe(path: str | Path) -> Recipe:
    """The recipe a YAML file holds. Raises `BadFile`, naming the file and every fault."""
    recipe = files.read(path, Recipe)
    found = problems(recipe)
    if found:
        raise BadFile("\n".join(f"{path}: {fault}" for fault in found))
    return recipe


def write_recipe(path: str | Path, recipe: Recipe, *, heading: Sequence[str] = ()) -> Path:
    """Write a recipe, commented. Raises `BadFile` where the file can't be written."""
    return write_text(path, recipe_text(recipe, heading=heading))


def recipe_text(recipe: Recipe, *, heading: Sequence[str] = ()) -> str:
    """The file's text, which `read_recipe` takes back."""
    return commented(recipe, heading=heading)


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values, by field ("lr", "data.held_out"). Steps take the place of epochs, and epochs that
    of steps."""
    own = {name: value for name, value in changes.items() if "." not in name}
    of_data = {name.removeprefix("data."): value for name, value in changes.items() if name not in own}
    if ("steps" in own) != ("epochs" in own):
        own["epochs" if "steps" in own else "steps"] = None
    return dataclasses.replace(recipe, **own, data=dataclasses.replace(recipe.data, **of_data))


def problems(recipe: Recipe) -> list[str]:
    """What is wrong with a recipe, one sentence a fault; empty when it is sound."""
    data = recipe.data
    found = [
        f"{name} is empty."
        for name, text in (
            ("model", recipe.model),
            ("data.source", data.source),
            ("data.split", data.split),
            ("data.chat_template", data.chat_template),
            ("plan", recipe.plan),
            ("log", recipe.log),
            ("output", recipe.output),
            ("device", recipe.device),
            ("nvme_dir", recipe.nvme_dir),
        )
        if text is not None and not text.strip()
    ]
    found += [
        f"{name} must be at least {least}, not {value}."
        for name, value, least in (
            ("seq_len", recipe.seq_len, 1),
            ("batch", recipe.batch, 1),
            ("warm_up_steps", recipe.warm_up_steps, 0),
            ("steps", recipe.steps, 1),
            ("seed", recipe.seed, 0),
            ("evaluate_every", recipe.evaluate_every, 1),
            ("save_every", recipe.save_every, 1),
            ("keep", recipe.keep, 1),
        )
        if value is not None and value < least
    ]
    found += [
        f"{name} must be a number above 0, not {value}."
        for name, value in (
            ("lr", recipe.lr),
            ("eps", recipe.eps),
            ("clip_norm", recipe.clip_norm),
            ("epochs", recipe.epochs),
        )
        if value is not None and not (math.isfinite(value) and value > 0)
    ]
    found += [
        f"{name} must be from 0 to less than 1, not {value}."
        for name, value in (
            ("data.held_out", data.held_out),
            ("data.max_faulty", data.max_faulty),
            ("betas.0", recipe.betas[0]),
            ("betas.1", recipe.betas[1]),
        )
        if not 0 <= value < 1
    ]
    limits = (
        (
            not (math.isfinite(recipe.weight_decay) and recipe.weight_decay >= 0),
            f"weight_decay must be a number of at least 0, not {recipe.weight_decay}.",
        ),
        (
            not 0 < recipe.decay_share <= 1,
            f"decay_share must be above 0 and at most 1, not {recipe.decay_share}.",
        ),
        (
            recipe.schedule not in schedules.KINDS,
            f"schedule is {recipe.schedule!r}; allowed: {', '.join(schedules.KINDS)}.",
        ),
        (
            not set(recipe.report) <= set(REPORTS),
            f"report is {', '.join(recipe.report)}; allowed: {', '.join(REPORTS)}.",
        ),
        ((recipe.steps is None) == (recipe.epochs is None), "give either steps or epochs: exactly one of them."),
        (
            recipe.evaluate_every is not None and data.held_out == 0,
            "evaluate_every needs data to evaluate: give data.held_out a share, such as 0.01.",
        ),
    )
    found += [text for wrong, text in limits if wrong]
    # Whether a schedule fits into its steps is a question only where its parts are sound.
    return found or (_schedule_problems(recipe, recipe.steps) if recipe.steps is not None else [])


def total_steps(recipe: Recipe, epoch_steps: int) -> int:
    """Optimizer steps of the training, where an epoch has `epoch_steps`.

    Raises SlidetuneError if the schedule does not fit into them, which a recipe of epochs can't know before.
    """
    total = max(1, round(recipe.epochs * epoch_steps)) if recipe.steps is None else recipe.steps
    found = _schedule_problems(recipe, total)
    if found:
        raise SlidetuneError(" ".join(found), f"An epoch of this data has {epoch_steps:,} steps.")
    return total


def lr_factor(recipe: Recipe, step: int, total: int) -> float:
    """What the learning rate is multiplied by in step `step`, the first being 1, of `total`."""
    return schedules.factor(recipe.schedule, step, total, warm_up=recipe.warm_up_steps, decay_share=recipe.decay_share)


def plan_to_follow(recipe: Recipe, plan: Plan) -> Plan:
    """The plan of a file with the recipe's clipping, where the recipe names one.

    Raises SlidetuneError, naming every fault, where the two disagree.
    """
    found = []
    if recipe.seq_len not in (None, plan.seq_len):
        found.append(f"seq_len is {recipe.seq_len:,} in the recipe and {plan.seq_len:,} in the plan.")
    if recipe.batch not in (None, plan.batch):
        found.append(
            f"batch is {recipe.batch:,} in the recipe; the plan's is {plan.batch:,}, "
            f"micro_batch {plan.micro_batch:,} x accumulation {plan.accumulation:,}."
        )
    if recipe.clip_norm is not None and plan.update != "forward":
        found.append(f"clip_norm needs a plan with update: forward; this one has update: {plan.update}.")
    if found:
        raise SlidetuneError(
            f"the recipe and {recipe.plan} disagree: " + " ".join(found), "Change one of them, or use plan: auto."
        )
    return plan if recipe.clip_norm is None else dataclasses.replace(plan, clip_norm=recipe.clip_norm)


def batch_text(recipe: Recipe, plan: Plan, epoch_steps: int) -> str:
    """What a training says at its start: the effective batch, tokens a step, steps an epoch and in all."""
    # Padding is no token to learn from.
    up_to = "" if recipe.data.packed else "up to "
    total = total_steps(recipe, epoch_steps)
    return (
        f"{plan.batch:,} sequences a step (micro_batch {plan.micro_batch:,} x accumulation {plan.accumulation:,}), "
        f"{up_to}{plan.tokens:,} tokens a step, {epoch_steps:,} steps an epoch, "
        f"{total:,} step{'s' * (total > 1)} in all"
    )


def _schedule_problems(recipe: Recipe, total: int) -> list[str]:
    return schedules.problems(recipe.schedule, total, warm_up=recipe.warm_up_steps, decay_share=recipe.decay_share)
