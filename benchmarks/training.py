"""One real training on the machine it runs on: speed, and what saving, evaluating and reading data cost of it.

    python benchmarks/training.py --profile h200.yaml --gpu-memory 8 --json OUT.json
    python benchmarks/training.py --table OUT.json

Nothing is fetched: weights are random, rows are the sources of Python's standard library, and a byte-level BPE
tokenizer is trained on them. They are made in a process of their own, so that this one's peak of RAM is training's, and
stay in `--folder` for the next run; plan and checkpoints there are made anew. `slidetune.Trainer` then trains by a
recipe, as `slidetune train` does, by `--plan` or by the tuner's plan for `--profile`.

Steps fall into groups. Not counted are the first ones, and those on either side of a pause for saving or evaluating:
the step before it has all of its backward pass in its time, and the one after it has none of it. Of the others, a step
is beside a checkpoint if that was being written all through it, alone if none was at any time of it, else neither.

* Speed is that of the median step alone; the prediction is the one that training says at its start.
* A step beside a checkpoint may take 10 % longer than one alone: medians.
* Saving in all: the time from the first steady step to the last, pauses for saving included but neither evaluations nor
  the steps on either side of one, over as many median steps alone. What a checkpoint costs is the difference, each.
* Evaluations: batches held out, times their tokens (padding included), over `Evaluated.seconds`, in which their batches
  are made too. The median of those after the first, which gets its passes ready, and with no checkpoint beside them.
  The bar is 90 % of what the simulator predicts for the same plan's forward pass, one after the other.
* Waits for data are those of all steps after the first ones.

A dash is a figure that there was no step or event for; in brackets is the number of those that a median is of.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from shutil import rmtree
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import machine

import slidetune
from slidetune import apart, api, files, provenance
from slidetune.builder import build_forward
from slidetune.errors import SlidetuneError
from slidetune.hardware import HardwareProfile
from slidetune.machines import PROFILE_HERE, adapted, load_profile
from slidetune.models import in_catalog, load_model
from slidetune.plan_file import read_plan, write_plan
from slidetune.plans import Plan
from slidetune.recipe import Data, Recipe
from slidetune.simulator.predict import predict
from slidetune.units import GIB, format_bytes, format_seconds

Row = dict[str, Any]

SEED = 0
# A step beside a checkpoint over one alone; an evaluation's throughput over the predicted one.
SAVING_LIMIT, EVALUATION_LEAST = 1.10, 0.90
# Steps before the steady state: allocators fill up, passes are recorded, the cap is checked.
WARM_UP = 5
# Losses of so many steps are averaged at either end.
ENDS = 5
# A step that waits longer than this for its batch is one that data held up.
WAIT_S = 1e-3
VOCABULARY, END_OF_TEXT = 16384, "<|endoftext|>"
# All bytes, the end of a text, and some merges.
LEAST_VOCABULARY = 300
# Batches and rows that are held out, about; Python's sources have so many bytes a token of this tokenizer.
HELD_OUT_BATCHES, HELD_OUT_ROWS, BYTES_A_TOKEN = 8, 12, 3.5
MOST_HELD_OUT = 0.3


# --- What is trained, made in a process of its own


def prepare(model: str, folder: str, device: str | None, data_bytes: float) -> None:
    """Make rows, model and tokenizer in a folder, each unless it is there."""
    home, data = Path(folder) / "model", Path(folder) / "data.jsonl"
    if not data.exists():
        write_whole(data, "".join(f"{json.dumps({'text': text})}\n" for text in sources(data_bytes)))
    if not (home / "model.safetensors.index.json").exists():
        make_model(model, home, device)
    if not (home / "tokenizer.json").exists():
        make_tokenizer(texts(data), load_model(str(home)).vocab_size, home)


def sources(most_bytes: float) -> Iterator[str]:
    """Files of the standard library, in the order of their names, together of no more than so many bytes."""
    root, taken = Path(sysconfig.get_path("stdlib")), 0
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(path.parts):
            continue
        # Some of its tests are not UTF-8 on purpose.
        with contextlib.suppress(UnicodeDecodeError, OSError):
            text = path.read_text(encoding="utf-8")
            size = path.stat().st_size
            if text.strip() and taken + size <= most_bytes:
                taken += size
                yield text


def texts(data: Path) -> list[str]:
    return [json.loads(line)["text"] for line in data.read_text(encoding="utf-8").splitlines()]


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def make_model(ref: str, home: Path, device: str | None) -> None:
    """Write a model with random weights, drawn on the GPU where there is one."""
    import torch

    from slidetune.runtime.adam import AdamW
    from slidetune.runtime.binding import Parts
    from slidetune.runtime.counted_spec import spec_of
    from slidetune.runtime.loading import RandomWeights
    from slidetune.runtime.saving import save_units
    from slidetune.runtime.skeleton import skeleton
    from slidetune.runtime.trainer import chosen_device, decay_where_it_belongs
    from slidetune.runtime.unit_layouts import unit_layouts

    model = skeleton(ref)
    units = unit_layouts(Parts(model, spec_of(model, ref)), decay_where_it_belongs(AdamW()))
    source = RandomWeights(model, SEED, chosen_device(device), room_bytes=1 << 62)

    def weights(unit: Any) -> dict[str, Any]:
        return {
            entry.name: torch.cat([piece.cpu() for _, piece in pieces]).view(entry.shape)
            for entry, pieces in source.unit(unit)
        }

    save_units(home, model, map(weights, units))


def make_tokenizer(rows: Sequence[str], vocab_size: int, home: Path) -> None:
    """Train a byte-level BPE on the rows, with no more tokens than the model has, and save it beside the model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < LEAST_VOCABULARY:
        raise SlidetuneError(f"a model with a vocabulary of {vocab_size} is too small.", f"{LEAST_VOCABULARY} will do.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    how = trainers.BpeTrainer(
        vocab_size=min(VOCABULARY, vocab_size),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(rows, how)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(home)


# --- Plan and recipe


def known_profile(options: argparse.Namespace) -> HardwareProfile | None:
    """The machine's profile, with the cap; None where no profile is here."""
    ref = options.profile or (PROFILE_HERE if PROFILE_HERE.is_file() else None)
    if ref is None:
        return None
    # A plan of our own uses no drive that nobody named.
    drive = None if options.nvme_dir or options.plan else "none"
    return adapted(load_profile(ref), gpu_memory_gib=options.gpu_memory, nvme=drive)


def plan_for(options: argparse.Namespace, folder: Path, profile: HardwareProfile | None) -> Plan:
    """The plan that was given or that the tuner finds, also written to the folder."""
    if options.plan:
        plan = read_plan(options.plan)
        write_plan(folder / "plan.yaml", plan, heading=[f"The plan of {options.plan}."])
        return plan
    # By its catalog name, as `slidetune plan` would have it.
    model = options.model if in_catalog(options.model) else str(folder / "model")
    planned = api.plan(model, profile, seq_len=options.seq_len, batch=options.batch, trials=options.trials)
    write_plan(folder / "plan.yaml", planned.plan, reasons=planned.reasons)
    return planned.plan


def recipe_for(options: argparse.Namespace, folder: Path, plan: Plan) -> Recipe:
    """A recipe that saves and evaluates some times on its way."""
    steps = options.steps
    return Recipe(
        model=str(folder / "model"),
        data=Data(source=str(folder / "data.jsonl"), held_out=share_held_out(folder / "data.jsonl", plan)),
        plan=str(folder / "plan.yaml"),
        lr=3e-4,
        schedule="cosine",
        warm_up_steps=min(10, steps // 4),
        steps=steps,
        evaluate_every=options.evaluate_every or max(1, steps // 3),
        save_every=options.save_every or max(1, steps // 4),
        keep=1,
        seed=SEED,
        output=str(folder / "trained"),
        device=options.device,
        nvme_dir=options.nvme_dir,
    )


def share_held_out(data: Path, plan: Plan) -> float:
    """The share of the rows that makes some batches; rows are whole files, so that their number varies."""
    sizes = [len(text) for text in texts(data)]
    batches = HELD_OUT_BATCHES * plan.tokens * BYTES_A_TOKEN / sum(sizes)
    return round(min(MOST_HELD_OUT, max(batches, HELD_OUT_ROWS / len(sizes))), 4)


# --- The training, watched


class Watch(slidetune.Callback):
    """Keeps what happens, and when: seconds since it was made."""

    def __init__(self) -> None:
        self.seen: Row = {"prepared": [], "steps": [], "evaluations": [], "saves": [], "notes": []}
        self._start = time.perf_counter()

    def on_prepare(self, doing: str) -> None:
        note(doing)
        self._keep("prepared", doing=doing)

    def on_start(self, started: Any) -> None:
        predicted = started.predicted
        self.seen["started"] = {
            "at_s": self._now(),
            "device": started.device,
            "kernels": started.kernels,
            "data": list(started.data),
            "tokens": started.plan.tokens,
            "total_steps": started.total_steps,
            "save_every": started.recipe.save_every,
            "evaluate_every": started.recipe.evaluate_every,
            "predicted_step_s": None if predicted is None else predicted.step_s,
            "predicted_from": None if predicted is None else predicted.machine,
        }

    def on_step(self, done: Any) -> None:
        self._keep("steps", step=done.step, step_s=done.step_s, waited_s=done.waited_s, loss=done.loss, lr=done.lr)

    def on_evaluate(self, found: Any) -> None:
        self._keep("evaluations", step=found.step, loss=found.loss, labels=found.labels, seconds=found.seconds)
        note(f"step {found.step}: held out {found.loss:.3f}, {format_seconds(found.seconds)}")

    def on_save(self, saved: Any) -> None:
        self._keep("saves", step=saved.step, nbytes=saved.nbytes, paused_s=saved.paused_s, seconds=saved.seconds)
        note(f"step {saved.step}: saved in {format_seconds(saved.seconds)}")

    def on_note(self, found: Any) -> None:
        self._keep("notes", step=found.step, kind=found.kind, text=found.text)
        note(found.text)

    def on_end(self, trained: Any) -> None:
        self.seen["ended"] = {"at_s": self._now(), "why": trained.ended, "peak_bytes": dict(trained.peak_bytes)}

    def _keep(self, what: str, **values: Any) -> None:
        self.seen[what].append({"at_s": self._now()} | values)

    def _now(self) -> float:
        return time.perf_counter() - self._start


def measure(options: argparse.Namespace, folder: Path) -> Row:
    """Prepare, plan, train; everything that is known then."""
    # Its imports are done while the profile is read.
    apart.get_ready()
    profile = known_profile(options)
    note("model, tokenizer, rows")
    ended = apart.run(prepare, options.model, str(folder), options.device, options.data_mb * 1e6)
    if ended.error:
        raise SlidetuneError(f"nothing to train: {ended.error}")
    plan = plan_for(options, folder, profile)
    recipe = recipe_for(options, folder, plan)
    # What an earlier run left: a training that begins anew refuses it.
    rmtree(recipe.output, ignore_errors=True)
    watch = Watch()
    slidetune.Trainer(recipe, callbacks=[watch], profile=profile).fit()
    started = watch.seen["started"]
    return {
        "date": provenance.today(),
        "machine": machine.describe() | provenance.machine(started["device"]) | provenance.versions(),
        "profile": None if profile is None else profile.name,
        "model": options.model,
        "params": load_model(plan.model).params,
        "recipe": files.dump(recipe),
        "plan": files.dump(plan),
        "forward": forward(recipe, plan, started, profile),
        "seen": watch.seen,
    }


def forward(recipe: Recipe, plan: Plan, started: Row, profile: HardwareProfile | None) -> Row:
    """Batches that are held out, the seconds that making them takes, and what the simulator predicts for a pass."""
    from slidetune.runtime.counted_spec import spec_of
    from slidetune.runtime.skeleton import skeleton
    from slidetune.runtime.training.pretrained import tokens_for
    from slidetune.runtime.training.setup import data_for

    home = Path(recipe.model)
    # Once more, to time it.
    tokens = tokens_for(home, load_model(str(home)).vocab_size)
    held_out = data_for(recipe, plan, home, tokens, store=Path(recipe.output)).held_out
    begin = time.perf_counter()
    batches = sum(1 for _ in held_out.epoch())
    found: Row = {"batches": batches, "made_s": time.perf_counter() - begin, "predicted_s": None}
    # Where a step can't be predicted (a drive that nobody measured), a pass can't either.
    if started["predicted_step_s"] is not None:
        here = api.within_cap(adapted(profile, kernels=started["kernels"]), plan)
        schedule = build_forward(spec_of(skeleton(home), plan.model), plan, started["kernels"])
        found["predicted_s"] = predict(schedule, here).step_s
    return found


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- What it comes to


def figures(found: Row) -> Row:
    """What the table shows, from what was seen; None where there was nothing to take a figure from."""
    seen, tokens = found["seen"], found["seen"]["started"]["tokens"]
    steps = seen["steps"]
    writing = written(seen)
    alone, beside = grouped(seen, writing)
    step_s, saving_s = median(row["step_s"] for row in alone), median(row["step_s"] for row in beside)
    predicted_s = seen["started"]["predicted_step_s"]
    result = {
        "step_s": step_s,
        "steps_alone": len(alone),
        "tokens_per_s": over(tokens, step_s),
        "predicted_tokens_per_s": over(tokens, predicted_s),
        "share_of_predicted": over(predicted_s, step_s),
        "all_tokens_per_s": over(tokens * len(steps), steps[-1]["at_s"] - begin_s(steps[0])),
        "saving_step_s": saving_s,
        "steps_saving": len(beside),
        "saving_over_alone": over(saving_s, step_s),
        "checkpoint_bytes": next((save["nbytes"] for save in seen["saves"]), None),
    }
    result |= saving_in_all(seen, step_s) | evaluating(found, writing)
    waits = [row["waited_s"] for row in steady(steps)]
    losses = [row["loss"] for row in steps]
    return result | {
        "waited_s": sum(waits) if waits else None,
        "most_waited_s": max(waits, default=None),
        "waited_share": over(sum(waits), sum(row["step_s"] for row in steady(steps))),
        "steps_that_waited": sum(wait > WAIT_S for wait in waits) if waits else None,
        "first_loss": statistics.fmean(losses[:ENDS]),
        "last_loss": statistics.fmean(losses[-ENDS:]),
        "held_out_losses": [one["loss"] for one in seen["evaluations"]],
        "peak_bytes": seen["ended"]["peak_bytes"],
        "prepared_s": seen["started"]["at_s"],
    }


def steady(steps: Sequence[Row]) -> list[Row]:
    return [row for row in steps if row["step"] > WARM_UP]


def begin_s(step: Row) -> float:
    """When a step began: at the loss before it, or at the end of the pause before it."""
    return step["at_s"] - step["step_s"]


def paused_after(seen: Row, what: str) -> list[int]:
    """The steps after which training paused to save ("save_every") or to evaluate ("evaluate_every"), and went on."""
    every = seen["started"][what]
    return list(range(every, len(seen["steps"]), every))


def written(seen: Row) -> list[tuple[float, float]]:
    """From when to when each checkpoint was written beside the training; the last one never is."""
    after = {row["step"] - 1: row for row in seen["steps"]}
    found = []
    for save in seen["saves"]:
        if save["step"] in after:
            # The pause ends as the next step begins; its seconds count from its own start.
            resumed = begin_s(after[save["step"]])
            found.append((resumed, resumed - save["paused_s"] + save["seconds"]))
    return found


def grouped(seen: Row, writing: Sequence[tuple[float, float]]) -> tuple[list[Row], list[Row]]:
    """Steady steps alone, and beside a checkpoint."""
    alone, beside = [], []
    pauses = {step for what in ("save_every", "evaluate_every") for step in paused_after(seen, what)}
    for row in steady(seen["steps"]):
        begin, end = begin_s(row), row["at_s"]
        if {row["step"] - 1, row["step"]} & pauses:
            continue
        if any(since <= begin and end <= until for since, until in writing):
            beside.append(row)
        elif not any(begin < until and since < end for since, until in writing):
            alone.append(row)
    return alone, beside


def saving_in_all(seen: Row, step_s: float | None) -> Row:
    """Pauses for saving, and what saving costs: of all the time, and each time."""
    pauses = pauses_s(seen)
    left_out = {n for step in paused_after(seen, "evaluate_every") if step not in pauses for n in (step, step + 1)}
    # Of a pause both sides count, or neither.
    left_out |= {n for step in pauses if {step, step + 1} & left_out for n in (step, step + 1)}
    counted = [row for row in steady(seen["steps"]) if row["step"] not in left_out]
    among = {row["step"] for row in counted}
    saved = [pause for step, pause in pauses.items() if {step, step + 1} <= among]
    lost_s = None
    if saved and step_s:
        lost_s = sum(row["step_s"] for row in counted) + sum(saved) - len(counted) * step_s
    on_the_way = [save for save in seen["saves"] if save["step"] in pauses]
    return {
        "pauses_s": list(pauses.values()),
        "told_pauses_s": [save["paused_s"] for save in on_the_way],
        "saving_s": [save["seconds"] for save in on_the_way],
        "last_saving_s": next((save["seconds"] for save in seen["saves"] if save["step"] not in pauses), None),
        "saves_counted": len(saved),
        "saving_share": None if lost_s is None else lost_s / (len(counted) * step_s),
        "save_costs_s": None if lost_s is None else lost_s / len(saved),
    }


def pauses_s(seen: Row) -> dict[int, float]:
    """How long training paused to save, by the step before it, as its steps show it, waiting for the checkpoint before
    it included. Evaluations are not."""
    steps = {row["step"]: row for row in seen["steps"]}
    evaluations = {one["step"]: one["seconds"] for one in seen["evaluations"]}
    return {
        step: begin_s(steps[step + 1]) - steps[step]["at_s"] - evaluations.get(step, 0.0)
        for step in paused_after(seen, "save_every")
    }


def evaluating(found: Row, writing: Sequence[tuple[float, float]]) -> Row:
    """Throughput of evaluations, and that of the predicted forward pass."""
    seen, about = found["seen"], found["forward"]
    tokens = seen["started"]["tokens"]
    rates, counted = [], []
    for number, one in enumerate(seen["evaluations"]):
        begin, end = one["at_s"] - one["seconds"], one["at_s"]
        rates.append(tokens * about["batches"] / one["seconds"])
        if number and not any(begin < until and since < end for since, until in writing):
            counted.append(rates[-1])
    rate, predicted = median(counted), over(tokens, about["predicted_s"])
    return {
        "evaluation_tokens_per_s": rate,
        "evaluations_counted": len(counted),
        "all_evaluation_tokens_per_s": rates,
        "predicted_forward_tokens_per_s": predicted,
        "evaluation_share": over(rate, predicted),
        "evaluation_batches": about["batches"],
        "batches_made_s": about["made_s"],
    }


def median(values: Iterator[float] | Sequence[float]) -> float | None:
    values = list(values)
    return statistics.median(values) if values else None


def over(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


# --- The record


def record(found: Row) -> str:
    """Machine, recipe and plan in short, and the table, in Markdown."""
    got, recipe, plan = figures(found), found["recipe"], found["plan"]
    about = [f"{key}: {value}" for key, value in {"date": found["date"], **found["machine"]}.items()]
    how = (
        f"{found['model']}: {found['params']:,} parameters. {recipe['steps']} steps of {plan['micro_batch']} x "
        f"{plan['accumulation']} sequences of {plan['seq_len']} tokens, {recipe['schedule']}, lr {recipe['lr']:g}, "
        f"warm-up {recipe['warm_up_steps']}; evaluated every {recipe['evaluate_every']}, saved every "
        f"{recipe['save_every']}. Kernels: {found['seen']['started']['kernels']}."
    )
    lines = ["| what | measured | beside it | |", "| --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows(found, got)]
    notes = [f"* step {one['step']}, {one['kind']}: {' '.join(one['text'].split())}" for one in found["seen"]["notes"]]
    knobs = f"Plan: {', '.join(f'{name} {value}' for name, value in knob_values(plan))}."
    said = f"{' '.join(found['seen']['started']['data'])} Predicted from {found['profile'] or 'no profile'}."
    return "\n".join(["```", *about, "```", "", how, knobs, said, "", *lines, *([""] if notes else []), *notes])


def knob_values(plan: Row) -> Iterator[tuple[str, Any]]:
    """A plan's knobs, those of its parts as recompute.keep."""
    for name, value in plan.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{part}", number) for part, number in value.items())
        elif name not in ("model", "version"):
            yield name, format_bytes(value) if name.endswith("bytes") else value


def rows(found: Row, got: Row) -> Iterator[tuple[str, str, str, str]]:
    """What, measured, what stands beside it, and how the two compare."""
    peaks, cap = got["peak_bytes"], found["plan"].get("gpu_memory_gib")
    of = "{:.1%} of it".format
    yield (
        "training, steps alone",
        f"{speed(got['tokens_per_s'])}, {shown(got['step_s'], format_seconds)} a step ({got['steps_alone']})",
        f"predicted {speed(got['predicted_tokens_per_s'])}",
        shown(got["share_of_predicted"], of),
    )
    yield "training, from the first step to the last", speed(got["all_tokens_per_s"]), "", ""
    yield (
        "a step beside a checkpoint",
        f"{shown(got['saving_step_s'], format_seconds)} ({got['steps_saving']})",
        f"at most {SAVING_LIMIT - 1:.0%} longer",
        verdict(got["saving_over_alone"], lambda ratio: ratio <= SAVING_LIMIT, lambda ratio: f"{ratio - 1:+.1%}"),
    )
    yield (
        "saving in all",
        shown(got["saving_share"], "{:+.1%} time".format),
        f"{got['saves_counted']} of {len(got['pauses_s'])} pauses counted",
        shown(got["save_costs_s"], lambda value: f"{seconds(value)} each"),
    )
    yield "pauses for saving", several(got["pauses_s"]), f"of them told: {several(got['told_pauses_s'])}", ""
    yield (
        "a checkpoint",
        shown(got["checkpoint_bytes"], format_bytes),
        f"complete after {several(got['saving_s'])}",
        f"after the last step {shown(got['last_saving_s'], seconds)}",
    )
    yield (
        "evaluation",
        f"{speed(got['evaluation_tokens_per_s'])} ({got['evaluations_counted']})",
        f"at least {EVALUATION_LEAST:.0%} of {speed(got['predicted_forward_tokens_per_s'])} predicted",
        verdict(got["evaluation_share"], lambda share: share >= EVALUATION_LEAST, of),
    )
    yield (
        "each evaluation",
        f"{', '.join(f'{rate:,.0f}' for rate in got['all_evaluation_tokens_per_s']) or '–'} tokens/s",
        f"{got['evaluation_batches']} batches, made in {seconds(got['batches_made_s'])}",
        "",
    )
    yield (
        "waits for data",
        f"{shown(got['waited_s'], seconds)}, the longest {shown(got['most_waited_s'], seconds)}",
        f"longer than {format_seconds(WAIT_S)}: {shown(got['steps_that_waited'], '{} steps'.format)}",
        shown(got["waited_share"], "{:.2%} of the time".format),
    )
    yield (
        "loss",
        f"{got['first_loss']:.3f} to {got['last_loss']:.3f}",
        f"held out {', '.join(f'{loss:.3f}' for loss in got['held_out_losses']) or '–'}",
        "falls" if got["last_loss"] < got["first_loss"] else "**does not fall**",
    )
    yield (
        "GPU memory",
        f"{peaks['gpu'] / GIB:.2f} GiB" if peaks["gpu"] else "–",
        f"cap {shown(cap, '{:g} GiB'.format)}",
        "",
    )
    locked = f"page-locked {format_bytes(peaks['page_locked'])}" if peaks["page_locked"] else ""
    yield "RAM, copies for checkpoints included", f"{peaks['ram'] / GIB:.2f} GiB", locked, ""
    yield "ready for the first step", f"after {format_seconds(got['prepared_s'])}", "", ""


def shown(value: Any, how: Callable[[Any], str]) -> str:
    return "–" if value is None else how(value)


def seconds(value: float) -> str:
    """Also what is below zero, as a difference may be."""
    return f"-{format_seconds(-value)}" if value < 0 else format_seconds(value)


def several(values: Sequence[float]) -> str:
    return ", ".join(map(seconds, values)) or "–"


def speed(tokens_per_s: float | None) -> str:
    return shown(tokens_per_s, "{:,.0f} tokens/s".format)


def verdict(value: float | None, met: Callable[[float], bool], how: Callable[[float], str]) -> str:
    """A figure that has a bar, and whether it is met."""
    return "–" if value is None else f"{how(value)}, {'met' if met(value) else '**missed**'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b", help="a catalog name, a directory or a config.json file")
    parser.add_argument("--profile", help=f"this machine's, for planning; {PROFILE_HERE} unless given")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="follow this one; it decides batch, length and cap")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="cap at so much of the GPU")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--trials", type=int, default=150, help="plans to simulate")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--save-every", type=int, metavar="STEPS", help="a quarter of the steps unless given")
    parser.add_argument("--evaluate-every", type=int, metavar="STEPS", help="a third of the steps unless given")
    parser.add_argument("--data-mb", type=float, default=16, help="most of the standard library's sources to take")
    parser.add_argument("--folder", type=Path, help="where all of it lies; a temporary one unless given")
    parser.add_argument("--device", help="cuda or cpu; the first GPU unless given")
    parser.add_argument("--nvme-dir", help="where the NVMe tier's file goes; without it no drive is planned with")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the record of such a file, run nothing")
    options = parser.parse_args()
    if options.table:
        print(record(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    if not (options.plan or options.profile or PROFILE_HERE.is_file()):
        parser.error(f"--profile, --plan or a {PROFILE_HERE} here is needed")
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            found = measure(options, folder.resolve())
        except SlidetuneError as error:
            sys.exit(str(error))
    if options.json:
        options.json.write_text(json.dumps(found | {"figures": figures(found)}, indent=1), encoding="utf-8")
    print(record(found))


if __name__ == "__main__":
    main()
