"""`slidetune run`: train by a plan."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slidetune.cli import console
from slidetune.cli.results import check_writable
from slidetune.errors import BadFile, SlidetuneError
from slidetune.plan_file import read_plan
from slidetune.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from slidetune.plans import Plan
    from slidetune.runtime.run import Measured
    from slidetune.runtime.trainer import SlidingTrainer
    from slidetune.schedule import Schedule

SYNTHETIC = "synthetic"
# Validation and reports want a few steady steps, not a file as long as the training.
_TRACED_STEPS = 8


def run(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file, as `slidetune plan` writes it.")],
    *,
    model: Annotated[
        str | None,
        typer.Option(
            help="Its directory; with --random-weights also a hub id or catalog name.  [default: the plan's]",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str, typer.Option(metavar="FILE|synthetic", help="A text file, a .jsonl file, or random tokens.")
    ] = SYNTHETIC,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 10,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Read the model's config only.")] = False,
    lr: Annotated[float, typer.Option("--lr", min=0.0, help="Learning rate.")] = 1e-5,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Decay of matrices; norms and biases have none.")] = 0.0,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps over which the learning rate rises.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, cpu.  [default: the first GPU, else cpu]", show_default=False)
    ] = None,
    nvme_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the NVMe tier's file goes, if the plan has one.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of data order, dropout and random weights.")] = 0,
    profile: Annotated[
        str | None, typer.Option(metavar="FILE", help="This machine's profile: shows the predicted speed beside.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write when each task ran: .csv or .csv.gz, or .json for ui.perfetto.dev."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Save the trained model here.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a page.")] = False,
) -> None:
    """Train by a plan, layers sliding through the GPU."""
    chosen = read_plan(plan)
    check_writable(trace)
    torch_is_there()
    from slidetune.runtime.adam import AdamW
    from slidetune.runtime.run import run as train
    from slidetune.runtime.trainer import SlidingTrainer

    ref = model or chosen.model
    with SlidingTrainer(
        ref,
        chosen,
        random_weights=random_weights,
        optimizer=AdamW(lr=lr, weight_decay=weight_decay),
        device=device,
        nvme_folder=nvme_dir,
        seed=seed,
        trace=_TRACED_STEPS if trace is not None else 0,
    ) as trainer:
        predicted = predicted_tokens_per_s(trainer.schedule, profile)
        batches = batches_of(data, ref, chosen, trainer.spec.vocab_size, seed)
        with console.progress("training") as advance:
            measured = train(
                trainer,
                batches,
                steps,
                lr_scale=lambda step: min(1.0, step / warm_up) if warm_up else 1.0,
                on_step=lambda number, so_far: advance(number, steps, _note(so_far, predicted)),
            )
        if trace is not None:
            write_measured_trace(
                trace, trainer, measured.steady_step_s, {"plan": chosen.model, "device": str(trainer.device)}
            )
        if output is not None:
            trainer.save(output)
        device_name = str(trainer.device)
    if json:
        console.print_json(_as_dict(measured, predicted, device_name))
    else:
        _print(measured, predicted, device_name, trace, output)


def torch_is_there() -> None:
    """Raise SlidetuneError where the runtime's libraries are not installed. Loads nothing."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise SlidetuneError(
                f"running a plan needs {name}, which is not installed.", 'pip install "slidetune[runtime]"'
            )


def predicted_tokens_per_s(schedule: Schedule, profile: str | None) -> float | None:
    """The speed the simulator foresees on this machine, if its profile is given."""
    if profile is None:
        return None
    from slidetune.machines import load_profile
    from slidetune.simulator.predict import predict

    return predict(schedule, load_profile(profile)).tokens_per_s


def batches_of(data: str, ref: str, plan: Plan, vocab_size: int, seed: int) -> Iterator[Any]:
    """Batches of a file, or of random tokens."""
    from slidetune.runtime.data import read_samples, synthetic

    if data == SYNTHETIC:
        return synthetic(vocab_size, plan, seed)
    if not Path(data).is_file():
        raise BadFile(f"{data}: no such file.", "Give a text or .jsonl file, or synthetic.")
    encode, end = encoder_of(ref, vocab_size)
    return read_samples(data, encode, plan.seq_len, vocab_size=vocab_size, end=end).batches(plan, seed)


def encoder_of(ref: str, vocab_size: int) -> tuple[Callable[[str], Any], int | None]:
    """The model's tokenizer and its end token; bytes for a model that has none."""
    from slidetune.runtime.data import as_bytes

    if Path(ref).is_dir() and any(Path(ref).glob("tokenizer*")):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(ref)
        return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
    if vocab_size < 256:
        raise SlidetuneError(f"{ref} has no tokenizer, and a vocabulary of {vocab_size} can't hold bytes.")
    console.err.print(f"{ref} has no tokenizer: the data are read as bytes.", style="dim")
    return as_bytes, None


def write_measured_trace(path: Path, trainer: SlidingTrainer, step_s: float, about: dict[str, Any]) -> None:
    """The last steps' tasks, as a table or for ui.perfetto.dev."""
    from slidetune.trace import to_frame

    rows = trainer.trace
    try:
        if path.suffix in (".csv",) or path.name.endswith(".csv.gz"):
            from slidetune.traces.store import save_trace

            save_trace(path, to_frame(rows), about)
            return
        from slidetune.traces.perfetto import TraceProcess, write_trace

        last = [row for row in rows if row.step == rows[-1].step]
        write_trace(path, TraceProcess(name="measured", rows=last, schedule=trainer.schedule, step_s=step_s))
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}.") from None


def _note(measured: Measured, predicted: float | None) -> str:
    beside = f" (predicted {predicted:,.0f})" if predicted else ""
    return f"loss {measured.losses[-1]:.4f}  {measured.tokens / measured.step_s[-1]:,.0f} tokens/s{beside}"


def _as_dict(measured: Measured, predicted: float | None, device: str) -> dict[str, object]:
    return {
        "device": device,
        "steps": len(measured.losses),
        "losses": measured.losses,
        "step_s": measured.step_s,
        "tokens_per_s": measured.tokens_per_s,
        "predicted_tokens_per_s": predicted,
        "peak_bytes": measured.peaks,
        "nvme_written_bytes": measured.nvme_written_bytes,
    }


def _print(measured: Measured, predicted: float | None, device: str, trace: Path | None, output: Path | None) -> None:
    out = console.out
    out.print(f"loss      {measured.losses[0]:.4f} -> {measured.losses[-1]:.4f} in {len(measured.losses)} steps")
    beside = f", predicted {predicted:,.0f}" if predicted else ""
    out.print(
        f"speed     {measured.tokens_per_s:,.0f} tokens/s{beside} "
        f"({format_seconds(measured.steady_step_s)} a step of {format_count(measured.tokens)} tokens, {device})"
    )
    peaks = "  ".join(f"{name.replace('_', '-')} {format_bytes(size)}" for name, size in measured.peaks.items() if size)
    out.print(f"memory    {peaks}")
    if measured.nvme_written_bytes:
        out.print(f"NVMe      {format_bytes(measured.nvme_written_bytes / len(measured.losses))} written a step")
    for path in (trace, output):
        if path is not None:
            out.print(f"Written: {path}")
