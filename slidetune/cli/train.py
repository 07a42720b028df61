"""`slidetune train`: fine-tune by a recipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from slidetune.cli import console
from slidetune.cli.init import with_recipe
from slidetune.cli.run import INTERRUPTED
from slidetune.errors import SlidetuneError
from slidetune.recipe import Data, Recipe, changed, problems, read_recipe
from slidetune.runtime.training.callbacks import (
    Callback,
    CheckpointSaved,
    Evaluated,
    Note,
    Started,
    StepDone,
    Trained,
)
from slidetune.training import Trainer
from slidetune.units import format_bytes, format_seconds

TERMINATED = 143
# Where no terminal shows a bar that moves, a line so often.
_LINE_S = 10.0


@with_recipe
def train(
    *,
    given: dict[str, Any],
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE", help="A recipe, as `slidetune init` writes it; flags change it."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of the output, if there is one.")
    ] = False,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="This machine's profile, to plan and predict by.  \\[default: profile.yaml, if it is there]",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a page.")] = False,
) -> None:
    """Fine-tune a model by a recipe: plan, train, save, evaluate; SIGTERM and Ctrl-C save first."""
    chosen = _recipe(recipe, given)
    with console.progress("training") as advance:
        trained = Trainer(chosen, callbacks=[Page(advance, quiet=json)], profile=profile).fit(resume=resume)
    if json:
        console.print_json(trained.as_dict())
    else:
        for line in _result(trained):
            console.out.print(line, markup=False, soft_wrap=True)
    if not trained.finished:
        raise typer.Exit(TERMINATED if trained.ended == "SIGTERM" else INTERRUPTED)


def _recipe(path: Path | None, given: dict[str, Any]) -> Recipe:
    if path is None and not {"model", "data.source"} <= given.keys():
        raise SlidetuneError(
            "there is nothing to train by.",
            "Give a recipe's file (`slidetune init` writes one), or at least --model, --data and --epochs.",
        )
    recipe = Recipe(model="", data=Data(source="")) if path is None else read_recipe(path)
    recipe = changed(recipe, given)
    found = problems(recipe)
    if found:
        raise SlidetuneError("this is no recipe to train by: " + " ".join(found))
    return recipe


class Page(Callback):
    """What a training shows on standard error: what it begins with, a bar, and what happens on the way."""

    def __init__(self, advance: Callable[[int, int, str], None], *, quiet: bool = False) -> None:
        self._advance, self._quiet = advance, quiet
        self._shown_s = 0.0

    def on_prepare(self, doing: str) -> None:
        self._advance(0, 1, doing)

    def on_start(self, started: Started) -> None:
        for line in started.lines():
            self._print(line)

    def on_step(self, done: StepDone) -> None:
        self._advance(done.step, done.total_steps, f"{done.step:,}/{done.total_steps:,}  {progress_text(done)}")
        now = time.monotonic()
        if not console.err.is_terminal and (now - self._shown_s > _LINE_S or done.step == done.total_steps):
            self._shown_s = now
            self._print(f"step {done.step:,} of {done.total_steps:,}  {progress_text(done)}")

    def on_evaluate(self, found: Evaluated) -> None:
        self._print(f"step {found.step:,}  loss of what is held out {found.loss:.4f}")

    def on_save(self, saved: CheckpointSaved) -> None:
        self._print(f"step {saved.step:,}  saved {saved.path} ({format_bytes(saved.nbytes)})")

    def on_note(self, note: Note) -> None:
        console.err.print(note.text, markup=False, soft_wrap=True)

    def _print(self, line: str) -> None:
        if not self._quiet:
            console.err.print(line, markup=False, soft_wrap=True)


def progress_text(done: StepDone) -> str:
    """A step on one line."""
    beside = "" if done.predicted_tokens_per_s is None else f" (predicted {done.predicted_tokens_per_s:,.0f})"
    norm = "" if done.grad_norm is None else f"  norm {done.grad_norm:.3g}"
    tiers = "  ".join(
        f"{tier.upper() if tier != 'nvme' else 'NVMe'} {format_bytes(done.peak_bytes[tier])}"
        for tier in ("gpu", "ram", "nvme")
        if done.peak_bytes[tier]
    )
    left = f"  {format_seconds(done.left_s)} left" if done.left_s else ""
    return f"loss {done.loss:.4f}  lr {done.lr:.2e}{norm}  {done.tokens_per_s:,.0f} tokens/s{beside}{left}  {tiers}"


def _result(trained: Trained) -> list[str]:
    made = len(trained.losses)
    found = []
    if made:
        found.append(f"loss      {trained.losses[0]:.4f} -> {trained.losses[-1]:.4f} in {made:,} steps")
    elif trained.finished:
        found.append(f"All {trained.total_steps:,} steps were made before; more need --steps or --epochs.")
    if trained.evaluations:
        found.append(f"held out  {trained.evaluations[-1].loss:.4f}")
    if trained.tokens_per_s is not None:
        found.append(f"speed     {trained.tokens_per_s:,.0f} tokens/s")
    if not trained.finished:
        found.append(f"Stopped ({trained.ended}) after step {trained.step:,} of {trained.total_steps:,}.")
        found.append("--resume goes on from there." if trained.checkpoint is not None else "Nothing was to be saved.")
    found += [f"Written: {path}" for path in (trained.model, trained.checkpoint, trained.log) if path is not None]
    return found
