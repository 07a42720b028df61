"""`slidetune run`: train by a plan."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slidetune.cli import console
from slidetune.cli.results import check_writable
from slidetune.errors import BadFile, SlidetuneError
from slidetune.installed import check_runtime
from slidetune.machines import PROFILE_HERE, load_profile
from slidetune.models import load_model
from slidetune.plan_file import read_plan
from slidetune.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from slidetune.hardware import HardwareProfile
    from slidetune.plans import Plan
    from slidetune.runtime.run import Measured
    from slidetune.runtime.trainer import SlidingTrainer
    from slidetune.schedule import Schedule

SYNTHETIC = "synthetic"
INTERRUPTED = 130
# Validation and reports want a few steady steps, not a file as long as the training.
_TRACED_STEPS = 8


def run(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file, as `slidetune plan` writes it.")],
    *,
    model: Annotated[
        str | None,
        typer.Option(
            help="Its directory; with --random-weights also a hub id or catalog name.  \\[default: the plan's]",
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
        str | None, typer.Option(help="cuda, cuda:1, cpu.  \\[default: the first GPU, else cpu]", show_default=False)
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
    ref = model or chosen.model
    check_writable(trace)
    _check_trace_name(trace)
    _check_folder(output)
    torch_is_there()
    # Whatever can be refused is, before a model is loaded for minutes.
    machine = _machine_here(profile)
    if not random_weights:
        check_weights_folder(ref)
    batches = batches_of(data, ref, chosen, load_model(ref).vocab_size, seed)
    from slidetune.runtime.adam import AdamW
    from slidetune.runtime.run import run as train
    from slidetune.runtime.trainer import NonFiniteLoss, SlidingTrainer

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
        predicted = predicted_tokens_per_s(trainer.schedule, machine)
        try:
            with console.progress("training") as advance, _ctrl_c_after_the_step() as stop_if_asked:

                def after_step(number: int, so_far: Measured) -> None:
                    advance(number, steps, _note(so_far, predicted))
                    if number < steps:
                        stop_if_asked()

                measured = train(
                    trainer,
                    batches,
                    steps,
                    lr_scale=lambda step: min(1.0, step / warm_up) if warm_up else 1.0,
                    on_step=after_step,
                )
        except _AskedToStop:
            console.err.print(_save_what_is_there(trainer, output), markup=False)
            raise typer.Exit(INTERRUPTED) from None
        except KeyboardInterrupt:
            # Some units are updated and some are not.
            console.err.print(f"Stopped in the middle of step {trainer.steps}; nothing saved.")
            raise typer.Exit(INTERRUPTED) from None
        except NonFiniteLoss as error:
            raise NonFiniteLoss(error.message, f"{error.hint}\n{_save_what_is_there(trainer, output)}") from error
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


class _AskedToStop(Exception):
    """Ends training after a step, when Ctrl-C has asked for it."""


@contextmanager
def _ctrl_c_after_the_step() -> Iterator[Callable[[], None]]:
    """Have Ctrl-C wait for the end of a step, so that the weights are those of one step; a second one doesn't wait.

    Yields what raises `_AskedToStop` if that was asked.
    """
    asked = False

    def note(*_: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)
        console.err.print("Stopping after this step; Ctrl-C again stops at once.")

    def stop_if_asked() -> None:
        if asked:
            raise _AskedToStop

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop_if_asked
    finally:
        signal.signal(signal.SIGINT, before)


def _save_what_is_there(trainer: SlidingTrainer, output: Path | None) -> str:
    """Save the weights of a training that ended early; returns what to say about it."""
    done = f"Stopped after {trainer.updates} steps"
    if output is None or not trainer.updates:
        return f"{done}; nothing saved."
    trainer.save(output)
    return f"{done}; the weights are as the last one left them. Written: {output}"


def _check_trace_name(path: Path | None) -> None:
    if path is not None and not path.name.endswith((".csv", ".csv.gz", ".json", ".json.gz")):
        raise SlidetuneError(
            f"--trace {path}: what kind of file it is to be can't be told.",
            "Name it .csv or .csv.gz for a table, .json or .json.gz for ui.perfetto.dev.",
        )


def _check_folder(path: Path | None) -> None:
    """Make the folder that the model will be saved to, and write to it: a day's training may hang on it."""
    if path is None:
        return
    if path.exists() and not path.is_dir():
        raise BadFile(f"--output {path}: is a file.", "Give a directory; it is made if it is not there.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise BadFile(f"--output {path}: can't be written to ({error.strerror}).", "Give another directory.") from None


def _machine_here(profile: str | None) -> HardwareProfile | None:
    """The machine's profile, if one is named or lies here."""
    if profile is None and not PROFILE_HERE.is_file():
        return None
    return load_profile(profile or str(PROFILE_HERE))


def check_weights_folder(ref: str) -> None:
    """Raise BadFile unless a model's directory, or the config.json in it, is there: no hub is asked for weights."""
    if not Path(ref).expanduser().exists():
        raise BadFile(
            f"{ref}: there is no such directory.",
            "Give the directory that holds the model's safetensors files: --model DIR. "
            "Without one, random weights need its config only: --random-weights.",
        )


def torch_is_there() -> None:
    """Raise SlidetuneError where the runtime's libraries are not installed. Loads nothing."""
    check_runtime("running a plan")


def predicted_tokens_per_s(schedule: Schedule, machine: HardwareProfile | None) -> float | None:
    """The speed the simulator foresees on this machine, if its profile is known."""
    if machine is None:
        return None
    if machine.nvme is None and any(schedule.pools_of("nvme")):
        console.err.print(f"No prediction: {machine.name} has no NVMe drive, and the plan uses one.", markup=False)
        return None
    from slidetune.simulator.predict import predict

    return predict(schedule, machine).tokens_per_s


def batches_of(data: str, ref: str, plan: Plan, vocab_size: int, seed: int) -> Iterator[Any]:
    """Batches of a file, or of random tokens. The file is read at once: its faults show before a model is loaded."""
    from slidetune.runtime.data import read_samples, synthetic

    if data == SYNTHETIC:
        return synthetic(vocab_size, plan, seed)
    if not Path(data).is_file():
        raise BadFile(f"{data}: no such file.", "Give a text or .jsonl file, or synthetic.")
    encode, end = encoder_of(ref, vocab_size)
    samples = read_samples(data, encode, plan.seq_len, vocab_size=vocab_size, end=end)
    if samples.truncated:
        rows = samples.input_ids.shape[0]
        console.err.print(
            f"{samples.truncated:,} of {rows:,} rows have more than {plan.seq_len:,} tokens: their ends are cut off."
        )
    return samples.batches(plan, seed)


def encoder_of(ref: str, vocab_size: int) -> tuple[Callable[[str], Any], int | None]:
    """The model's tokenizer and its end token; bytes for a model that has none."""
    from slidetune.runtime.data import as_bytes

    folder = Path(ref).expanduser()
    # A plan names a model without weights by its config.json.
    folder = folder.parent if folder.name == "config.json" else folder
    if _has_tokenizer(folder):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        # Of a broken file each tokenizer raises something else, the fast ones a plain Exception.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SlidetuneError(
                f"{folder}: its tokenizer can't be read ({reason}).",
                "Copy its tokenizer files there anew, or give rows of input_ids and remove them.",
            ) from None
        return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
    if vocab_size < 256:
        raise SlidetuneError(f"{ref} has no tokenizer, and a vocabulary of {vocab_size} can't hold bytes.")
    console.err.print(f"{ref} has no tokenizer: the data are read as bytes.", style="dim", markup=False)
    return as_bytes, None


def _has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*")) or all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))


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
