"""`slidetune tune-loop`: plan, run, learn from the run, plan again."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import typer
from rich.padding import Padding
from rich.text import Text

from slidetune import api, files
from slidetune.cli import console, pages
from slidetune.cli.options import Json, Machine, SeqLen, with_machine
from slidetune.cli.plan import plan as plan_command
from slidetune.cli.results import check_writable
from slidetune.cli.run import torch_is_there
from slidetune.cli.validate import profile_here
from slidetune.cli.validation_pages import signed
from slidetune.hardware import HardwareProfile
from slidetune.machines import load_profile
from slidetune.models import load_model
from slidetune.plan_file import write_plan
from slidetune.plans import Plan, knobs
from slidetune.tuner.refit import Lesson, carried_over
from slidetune.tuning_loop import DEFAULT_ROUNDS, DEFAULT_STEPS, Round, Tuned, tuning_loop
from slidetune.units import format_seconds

# What is asked of a plan is said as for `slidetune plan`.
_ASKED = get_type_hints(plan_command, include_extras=True)
Model, Batch, Clip, Objective, Trials, Seed = (
    _ASKED[name] for name in ("model", "batch", "clip", "objective", "trials", "seed")
)
# Lessons of a round that are printed; --json has them all.
_SHOWN = 6
_INDENT = 10


class _Ended(NamedTuple):
    """A loop that has ended, and where its results go."""

    tuned: Tuned
    before: HardwareProfile
    """The machine as the command line described it."""
    plan: Path
    profile: Path
    json: bool


@with_machine
def _go(
    *,
    here: Machine,
    model: Model = None,
    seq_len: SeqLen = None,
    batch: Batch = None,
    clip: Clip = None,
    objective: Objective = "throughput",
    trials: Trials = api.DEFAULT_TRIALS,
    seed: Seed = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Plans to run at most.")] = DEFAULT_ROUNDS,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps of a plan that are measured, after a warm-up of two.")
    ] = DEFAULT_STEPS,
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, cpu; by default the first GPU, else cpu.", show_default=False)
    ] = None,
    nvme_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the NVMe tier's file goes, if a plan has one.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where the best plan measured is written.")
    ] = Path("plan.yaml"),
    profile_out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the refitted profile is written; by default tuned-profile.yaml beside the plan.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> _Ended:
    """Plan, run some steps, refit the profile to what was measured, plan again, until the plan stops changing.

    Writes the best plan measured to plan.yaml, and the refitted profile, for --profile, beside it.
    """
    profile_out = profile_out or output.with_name("tuned-profile.yaml")
    check_writable(output, profile_out)
    torch_is_there()
    spec = load_model(model or api.DEFAULT_MODEL)
    loop = tuning_loop(
        spec,
        here.profile,
        steps=steps,
        device=device,
        nvme_dir=nvme_dir,
        seq_len=min(api.DEFAULT_SEQ_LEN, spec.max_seq_len) if seq_len is None else seq_len,
        batch=batch,
        clip_norm=clip,
        objective=objective,
        trials=trials,
        seed=seed,
    )
    if not json:
        console.out.print(pages.header(spec, here.profile, here.assumed))
    for number in range(1, rounds + 1):
        # A bar of its own for each round, so that rounds can be printed between them.
        with console.progress(f"round {number}") as advance:
            done = loop.next_round(lambda note, advance=advance, number=number: advance(number - 1, rounds, note))
        if done is None:
            break
        if not json:
            _print_round(done, loop.rounds[-2].plan if number > 1 else None)
    return _Ended(loop.result(), here.profile, output, profile_out, json)


@functools.wraps(_go, assigned=("__module__", "__doc__", "__annotations__"))
def tune_loop(**values: Any) -> None:
    values["profile"] = profile_here(values["profile"])
    ended = _go(**values)
    tuned, best = ended.tuned, ended.tuned.best
    # Caps on memory are this loop's, not the machine's.
    refitted = carried_over(ended.before, tuned.profile, load_profile(values["profile"]))
    write_plan(ended.plan, best.plan, reasons=best.planned.reasons, heading=_heading(best))
    files.write(ended.profile, refitted)
    if ended.json:
        written = {"plan_file": str(ended.plan), "profile_file": str(ended.profile)}
        console.print_json(tuned.as_dict() | written)
        return
    _print_end(tuned)
    for path in (ended.plan, ended.profile):
        console.out.print(f"Written: {path}", style="dim")


def _print_round(done: Round, before: Plan | None) -> None:
    step = done.found.step
    plan = pages.plan_table(done.plan) if before is None else Text(_differences(before, done.plan))
    _row(f"Round {done.number}", plan)
    _row(
        "",
        Text.assemble(
            f"predicted {format_seconds(step.predicted)}, measured {format_seconds(step.measured)} a step: ",
            signed(step.error),
            f"  {done.tokens_per_s:,.0f} tokens/s",
        ),
    )
    for place, lesson in enumerate(done.lessons[:_SHOWN]):
        _row("" if place else "learned", Text(f"{lesson.text} {_changed(lesson)}"))
    if len(done.lessons) > _SHOWN:
        _row("", Text(f"and {len(done.lessons) - _SHOWN} smaller ones", style="dim"))
    for note in done.found.notes:
        _row("", Text(f"Note: {note}", style="yellow"))


def _print_end(tuned: Tuned) -> None:
    best = tuned.best
    console.out.print()
    if tuned.stopped:
        _row("Stopped", Text(f"{tuned.stopped}."))
    of = f"of {len(tuned.rounds)} measured" if len(tuned.rounds) > 1 else "measured"
    _row("Best", Text(f"round {best.number} {of}: {best.tokens_per_s:,.0f} tokens/s"))
    first = tuned.rounds[0]
    if best is not first:
        gain = best.tokens_per_s / first.tokens_per_s - 1.0
        _row("", Text(f"{gain:+.1%} against the first, which was planned from the profile as it was"))


def _row(name: str, text: Text) -> None:
    label = Text(f"{name:<{_INDENT}}", style="bold" if name[:1].isupper() else "")
    # The name stands in the margin of the first line; further ones are indented like it.
    lines = text.wrap(console.out, max(20, console.out.width - _INDENT))
    for place, line in enumerate(lines):
        console.out.print(Text.assemble(label, line) if place == 0 else Padding(line, (0, 0, 0, _INDENT)))


def _changed(lesson: Lesson) -> str:
    change = lesson.change
    if change.figure == "gpu.times":
        return f"({format_seconds(lesson.seconds)} a step)"
    return f"({change.figure} {change.before:.4g} -> {change.after:.4g})"


def _differences(before: Plan, after: Plan) -> str:
    old = knobs(before)
    changed = [f"{name} {old[name]} -> {value}" for name, value in knobs(after).items() if value != old[name]]
    return " · ".join(changed)


def _heading(best: Round) -> list[str]:
    step = best.found.step
    return [
        f"slidetune: {best.planned.model.name} on {best.planned.profile.name}.",
        f"Measured: {best.tokens_per_s:,.0f} tokens/s, {format_seconds(step.measured)} a step; "
        f"predicted {format_seconds(step.predicted)} ({step.error:+.1%}).",
        "Edit what you like, then `slidetune validate` this file.",
    ]
