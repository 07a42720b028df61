"""`slidetune validate`: predict, run, compare; one plan, a grid of them, or runs recorded earlier."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from slidetune import grid as grids
from slidetune import validating
from slidetune.cli import console
from slidetune.cli.options import Json
from slidetune.cli.results import check_writable
from slidetune.cli.run import PROFILE_HERE, SYNTHETIC, batches_of, check_weights_folder, torch_is_there
from slidetune.cli.validation_pages import grid_page, summary_page, validation_page
from slidetune.errors import BadFile, DoesNotFit, SlidetuneError
from slidetune.machines import adapted, load_profile
from slidetune.models import load_model
from slidetune.plan_file import read_plan
from slidetune.reporting import validation_report
from slidetune.traces.recorded import SUFFIX, run_name, save_run
from slidetune.traces.validation import Summary, Validation

BEYOND_LIMITS = CASES_FAILED = 1


def validate(
    plan: Annotated[
        Path | None, typer.Argument(metavar="[PLAN]", help="A plan file, as `slidetune plan` writes it.")
    ] = None,
    *,
    grid: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="In place of a plan, a YAML file with a list `cases:` of models or plans."),
    ] = None,
    recorded: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run nothing: predict the runs recorded in this folder again, and compare."),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="This machine's profile; by default profile.yaml, if it is here.", show_default=False
        ),
    ] = None,
    kernels: Annotated[
        str | None,
        typer.Option(help="eager (transformers' own) or liger; by default the profile's.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A directory with weights; without it the plan's model with random ones.", show_default=False
        ),
    ] = None,
    data: Annotated[
        str, typer.Option(metavar="FILE|synthetic", help="A text file, a .jsonl file, or random tokens.")
    ] = SYNTHETIC,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are measured, after a warm-up of two.")] = 6,
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, cpu; by default the first GPU, else cpu.", show_default=False)
    ] = None,
    nvme_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the NVMe tier's file goes, if the plan has one.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights and tokens.")] = 0,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE|DIR", help="Keep the run in NAME.json.gz; with --grid, the runs in this folder."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Write pictures and an HTML page here.")
    ] = None,
    budget_s: Annotated[
        float | None, typer.Option(metavar="S", help="With --grid: start no case after so many seconds.")
    ] = None,
    max_median: Annotated[
        float | None, typer.Option(metavar="SHARE", help="With --recorded: fail if the step time is off by more.")
    ] = None,
    max_p95: Annotated[
        float | None, typer.Option(metavar="SHARE", help="The same for the 95th percentile of the runs.")
    ] = None,
    json: Json = False,
) -> None:
    """Predict a plan, run it, and show how far the prediction was off: step, lanes, kinds of tasks, memory."""
    _one_of(plan, grid, recorded)
    _only_with("--recorded", recorded, {"--max-median": max_median, "--max-p95": max_p95})
    _only_with("--grid", grid, {"--budget-s": budget_s})
    _only_with("PLAN", plan, {"--output": output, "--model": model, "--kernels": kernels})
    how: dict[str, Any] = {"steps": steps, "device": device, "nvme_dir": nvme_dir, "seed": seed}
    if recorded is not None:
        _recorded(recorded, max_median, max_p95, json)
    elif grid is not None:
        _grid(grid, profile_here(profile), record, budget_s, how, json)
    else:
        _one(plan, profile_here(profile), kernels, model, data, record, output, how, json)


def _one(
    path: Path,
    profile_ref: str,
    kernels: str | None,
    model: str | None,
    data: str,
    record: Path | None,
    output: Path | None,
    how: dict[str, Any],
    json: bool,
) -> None:
    chosen, machine = read_plan(path), load_profile(profile_ref)
    if record is not None and not record.name.endswith(SUFFIX):
        raise SlidetuneError(f"--record {record}: a recorded run is a file NAME{SUFFIX}.")
    check_writable(record)
    torch_is_there()
    if model is not None:
        check_weights_folder(model)
    ref = model or chosen.model
    batches = batches_of(data, ref, chosen, load_model(ref).vocab_size, how["seed"])
    with console.progress("validating") as advance:
        try:
            found = validating.validate(
                path,
                adapted(machine, kernels=kernels),
                model=model,
                batches=lambda _: batches,
                name=run_name(record) if record else "",
                progress=advance,
                **how,
            )
        except DoesNotFit as error:
            raise DoesNotFit(error.message, _as_measured(error.hint)) from None
    if record is not None:
        save_run(record, found.run, machine, Path(profile_ref).stem)
    page = None if output is None else _write_report(output, found)
    if json:
        console.print_json(found.as_dict())
        return
    console.out.print(validation_page(found))
    for written in (record, page):
        if written is not None:
            console.out.print(f"Written: {written}", style="dim")


def _as_measured(hint: str) -> str:
    """A hint on what would fit, without the option for drives that only planning has."""
    return re.sub(r"--nvme ([\d.]+TB):[\w/]+", r"\1 of NVMe, which `slidetune profile --nvme-dir DIR` measures", hint)


def _grid(
    path: Path, profile: str, record: Path | None, budget_s: float | None, how: dict[str, Any], json: bool
) -> None:
    if record is None:
        raise SlidetuneError("where the runs are to be recorded was not said.", "Give --record DIR.")
    torch_is_there()
    with console.progress("validating") as advance:
        result = grids.validate_grid(
            path,
            profile,
            record,
            budget_s=budget_s,
            progress=advance,
            note=lambda line: console.err.print(line, soft_wrap=True, markup=False),
            **how,
        )
    summary = Summary(result.runs)
    if json:
        failed = [{"name": failure.name, "error": failure.error} for failure in result.failures]
        console.print_json(summary.as_dict() | {"failures": failed, "not_started": list(result.not_started)})
    else:
        console.out.print(grid_page(summary, result.failures, result.not_started))
    if result.failures:
        raise typer.Exit(CASES_FAILED)


def _recorded(directory: Path, max_median: float | None, max_p95: float | None, json: bool) -> None:
    summary = validating.validate_recorded(directory)
    if json:
        console.print_json(summary.as_dict())
    else:
        console.out.print(summary_page(summary))
    _keep_limits(summary, max_median, max_p95)


def _keep_limits(summary: Summary, max_median: float | None, max_p95: float | None) -> None:
    found = summary.step_time
    limits = (("median", found.median, max_median), ("95th percentile", found.p95, max_p95))
    beyond = [
        f"step time: {name} of the errors {value:.2%}, at most {limit:.2%} allowed."
        for name, value, limit in limits
        if limit is not None and value > limit
    ]
    for line in beyond:
        console.err.print(f"[bold red]Beyond the limit:[/] {line}")
    if beyond:
        raise typer.Exit(BEYOND_LIMITS)


def _write_report(directory: Path, found: Validation) -> Path:
    try:
        return validation_report(directory, found)
    except OSError as error:
        raise BadFile(f"{error.filename or directory}: {error.strerror}.") from None


def profile_here(given: str | None) -> str:
    """The profile named, or else the one in this folder. Raises SlidetuneError if there is none."""
    if given is not None:
        return given
    if not PROFILE_HERE.is_file():
        raise SlidetuneError(
            "there is no profile of this machine to predict from.",
            f"`slidetune profile` measures the machine and writes {PROFILE_HERE}; or name one with --profile.",
        )
    return str(PROFILE_HERE)


def _one_of(plan: Path | None, grid: Path | None, recorded: Path | None) -> None:
    given = [what for what, value in (("PLAN", plan), ("--grid", grid), ("--recorded", recorded)) if value is not None]
    if len(given) != 1:
        both = f"{' and '.join(given)} can't be given together." if given else "nothing to validate."
        raise SlidetuneError(both, "Give a plan file, --grid FILE, or --recorded DIR.")


def _only_with(flag: str, there: object, options: dict[str, object]) -> None:
    for name, value in options.items():
        if value is not None and there is None:
            raise SlidetuneError(f"{name} goes with {flag}.")
