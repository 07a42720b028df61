"""slidetune beside the plain PyTorch loop and published systems, all on the machine it runs on.

    python benchmarks/against_plain.py --model qwen3-4b --profile h200.yaml --gpu-memory 24 --plain --json OUT.jsonl
    python benchmarks/against_plain.py --table OUT.jsonl

For every model, batch, kernels and cap (`--gpu-memory` GiB, `--no-cap`, or both): the tuner's plan is made and priced,
then run in a process of its own, as `slidetune validate` runs it. `--record DIR` keeps each run as validate does, for
`slidetune validate --recorded DIR`; rows that are there already have none made. With `--plain` the plain loop is run
beside it, on the whole card.

The plain loop is transformers' own model and loss in bf16, fp32 masters and moments on the GPU, torch's fused AdamW. It
runs with and without activation checkpointing, each with the largest micro-batch that fits; "plain" is the faster. One
process measures all batches of a model and its kernels, small ones first, each from the same weights. Rows that differ
in the cap alone share its figures, if they came from one machine.
Both sides start from the same random weights and train on the same three batches of random ids in turn: as in
training, a step reads other embedding rows than the one before; and the losses fall, and can be compared.

Rows go to OUT.jsonl as they come; those that are there already are not measured again, failed ones are. The plain
loop's figures of a batch go to OUT.plain.jsonl at once, and from there to the rows when its process has ended, or been
ended, or in the next run of this script. After `--budget-s` no further run is started, and no further batch of the
plain loop; after `--run-s` a process is ended.

Times are medians of the steps after two warm-up ones. RAM is the process's high-water mark; RAM bytes a parameter are
without saved activations, beside what they may be: 12.5 and 2 GiB for the process. Other systems' times come from
data/peers_h200.yaml.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from slidetune import apart, api, files, provenance
from slidetune.errors import SlidetuneError
from slidetune.grid import file_name, model_name
from slidetune.machines import adapted, load_profile
from slidetune.plans import Plan
from slidetune.traces.recorded import SUFFIX, save_run
from slidetune.units import GIB
from slidetune.validating import run_recorded

Row = dict[str, Any]

PEERS = Path(__file__).parent / "data" / "peers_h200.yaml"
SHOWN_PEERS = ("slideformer", "megatrain", "deepspeed_zero3")
CASE = ("model", "batch", "kernels", "cap_gib", "seq_len")
# The plain loop knows no cap.
PLAIN_CASE = ("model", "batch", "kernels", "seq_len")
# RAM pools whose size goes with the batch: saved activations.
ACTIVATIONS = (
    "embedding rows",
    "saved inputs (RAM)",
    "saved middles (RAM)",
    "inner activations (RAM)",
    "input staging",
)
RAM_BYTES_PER_PARAM, PROCESS_BYTES = 12.5, 2 * GIB
SEED, BATCHES = 0, 3
BOTH = ("plain", "checkpointed")
# Parameters that the plain loop updates at a time, about a layer's: bounds the fp32 copies of gradients.
GROUP = 16
NOT_IN_TIME = "not measured before its process ended"


# --- One run, in a process of its own


def some_batches(vocabulary: int, plan: Plan) -> list[dict[str, Any]]:
    """What both sides train on, in turn."""
    from slidetune.runtime.data import synthetic

    return list(itertools.islice(synthetic(vocabulary, plan, SEED), BATCHES))


def run_slidetune(job: Row, plan: Plan) -> Row:
    """Train by a plan, and record it where the job says so."""
    from slidetune.runtime.skeleton import skeleton

    ran = run_recorded(
        plan,
        job["kernels"],
        batches=lambda vocabulary: itertools.cycle(some_batches(vocabulary, plan)),
        device=job["device"],
        nvme_dir=job["nvme_dir"],
        seed=SEED,
        steps=job["steps"],
        name=job["name"],
    )
    if job["record"]:
        profile = job["profile"]
        path = Path(job["record"]) / f"{job['name']}{SUFFIX}"
        save_run(path, ran.run, load_profile(profile), Path(profile).stem)
    measured, room = ran.measured, ran.working_bytes // 2
    return {
        "step_s": ran.run.measured.median_step_s,
        "all_step_s": measured.step_s,
        "losses": measured.losses,
        "loading_s": ran.loading_s,
        "gpu_gib": measured.peaks["gpu"] / GIB or None,
        "ram_gib": measured.peaks["ram"] / GIB,
        "nvme_written_bytes": measured.nvme_written_bytes,
        "room_bytes": room,
        "drawn_on_host": drawn_on_host(skeleton(plan.model), room),
        "machine": ran.run.machine,
        "versions": ran.run.versions,
    }


def drawn_on_host(model: Any, room_bytes: int) -> list[str]:
    """Modules whose random weights the CPU draws, since they are too large for the device's room."""
    return [
        path
        for path, module in model.named_modules()
        if 2 * sum(p.numel() for p in module.parameters(recurse=False)) > room_bytes
    ]


def plain_model(ref: str, kernels: str, device: Any, room_bytes: int) -> Any:
    """transformers' model on the device, with the weights that slidetune starts with."""
    import torch

    from slidetune.runtime.adam import AdamW
    from slidetune.runtime.binding import Parts
    from slidetune.runtime.counted_spec import spec_of
    from slidetune.runtime.kernels import apply_kernels, choose_kernels
    from slidetune.runtime.loading import RandomWeights
    from slidetune.runtime.skeleton import skeleton
    from slidetune.runtime.trainer import decay_where_it_belongs
    from slidetune.runtime.unit_layouts import unit_layouts

    model = skeleton(ref).train()
    units = unit_layouts(Parts(model, spec_of(model, ref)), decay_where_it_belongs(AdamW()))
    apply_kernels(choose_kernels(kernels, model, device), model)
    empty = dict(model.named_parameters(remove_duplicate=False))
    homes = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None]
    source, values = RandomWeights(model, SEED, device, room_bytes), {}
    for entry, pieces in itertools.chain.from_iterable(source.unit(unit) for unit in units):
        flat = torch.cat([piece.to(device) for _, piece in pieces])
        values[id(empty[entry.name])] = torch.nn.Parameter(flat.view(entry.shape))
    # By what was there: tied matrices have two homes.
    for module, name, parameter in homes:
        module._parameters[name] = values[id(parameter)]
    return model.to(device)


class PlainLoop:
    """What people write: forward, backward, AdamW over fp32 masters, weights rounded to bf16."""

    def __init__(self, model: Any, device: Any) -> None:
        import torch

        self.model, self.device, self.updates, self.groups = model, device, 0, []
        # On the host, so that the device has no less room.
        self.initial = [p.detach().to("cpu", copy=True) for p in model.parameters()]
        parameters = list(model.parameters())
        for start in range(0, len(parameters), GROUP):
            weights = parameters[start : start + GROUP]
            masters = [p.detach().float() for p in weights]
            moments = [[torch.zeros_like(p) for p in masters] for _ in range(2)]
            self.groups.append((weights, masters, *moments, [torch.zeros((), device=device) for _ in weights]))

    def restart(self) -> None:
        """Be as it was before the first step."""
        import torch

        self.updates = 0
        initial = iter(self.initial)
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for weights, masters, first, second, steps in self.groups:
                for p, master in zip(weights, masters, strict=True):
                    p.copy_(next(initial))
                    master.copy_(p)
                torch._foreach_zero_([*first, *second, *steps])

    def checkpointing(self, on: bool) -> None:
        if on:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def step(self, ids: Any, micro_batch: int) -> float:
        """One optimizer step; returns its mean loss a label."""
        total, items = 0.0, ids.shape[0] * (ids.shape[1] - 1)
        for part in ids.split(micro_batch):
            loss = self.model(input_ids=part, labels=part, num_items_in_batch=items, use_cache=False).loss
            loss.backward()
            total = total + loss.detach()
        self.update()
        return float(total)

    def update(self) -> None:
        import torch

        from slidetune.runtime.adam import AdamW

        how = dataclasses.asdict(AdamW())
        self.updates += 1
        with torch.no_grad():
            for weights, masters, first, second, steps in self.groups:
                gradients = [p.grad.float() for p in weights]
                for p in weights:
                    p.grad = None
                torch._foreach_add_(steps, 1)
                torch._fused_adamw_(masters, gradients, first, second, [], steps, amsgrad=False, maximize=False, **how)
                torch._foreach_copy_(weights, masters)

    def timed(self, batches: Sequence[Any], micro_batch: int, steps: int) -> tuple[list[float], list[float]]:
        """Times from one step's loss to the next one's, and the losses; reading one waits for the device."""
        times, losses, before = [], [], time.perf_counter()
        for ids in itertools.islice(itertools.cycle(batches), steps):
            losses.append(self.step(ids, micro_batch))
            now = time.perf_counter()
            times.append(now - before)
            before = now
        return times, losses


def run_plain(job: Row) -> None:
    """Train the plain way with each of the job's batches, and append what each gave to the job's file."""
    import torch

    began = time.perf_counter()
    device = torch.device(job["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
    about = {"machine": provenance.machine(str(device)), "drawn_on_host": job["drawn_on_host"]}
    loop = if_it_fits(lambda: PlainLoop(plain_model(job["model"], job["kernels"], device, job["room_bytes"]), device))
    at_most: dict[bool, int] = {}
    for batch in sorted(job["batches"]):
        if time.perf_counter() - began > job["seconds"]:
            return
        try:
            found = {"variants": []} if loop is None else both_ways(loop, job | {"batch": batch}, at_most)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        line = {key: job[key] for key in PLAIN_CASE if key != "batch"} | {"batch": batch, "found": about | found}
        with open(job["results"], "a", encoding="utf-8") as file:
            # A line before it may have been cut off.
            file.write("\n" + json.dumps(line) + "\n")


def both_ways(loop: PlainLoop, job: Row, at_most: dict[bool, int]) -> Row:
    """Train with one batch, with and without checkpointing; there are no variants where neither fits.

    `at_most` are the largest micro-batches that fitted, with and without checkpointing, where larger ones didn't; what
    is found out is added.
    """
    if loop.updates:
        loop.restart()
    like = Plan(model=job["model"], seq_len=job["seq_len"], micro_batch=job["batch"])
    batches = [batch["input_ids"].to(loop.device) for batch in some_batches(loop.model.config.vocab_size, like)]
    losses: list[float] = []
    variants: list[Row] = []
    for checkpointing in (False, True):
        loop.checkpointing(checkpointing)
        variant = largest_that_fits(loop, batches, job["plain_steps"], at_most.get(checkpointing, job["batch"]))
        fitted = variant["micro_batch"] if variant else 0
        if fitted < job["batch"]:
            at_most[checkpointing] = fitted
        if variant:
            # Later ones go on from trained weights.
            if loop.updates == len(variant["losses"]):
                losses = variant["losses"]
            variants.append({"checkpointing": checkpointing} | variant)
    return {"variants": variants, "losses": losses}


def largest_that_fits(loop: PlainLoop, batches: Sequence[Any], steps: int, at_most: int) -> Row | None:
    """Times, losses and GPU peak with the largest micro-batch that fits: all sequences, half of them, ...; of those
    that are not larger than `at_most`."""
    import torch

    from slidetune.runtime.run import WARM_UP

    micro_batch, cuda = batches[0].shape[0], loop.device.type == "cuda"
    while micro_batch > at_most:
        micro_batch //= 2
    while micro_batch:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(loop.device)
        before = loop.updates
        if ran := if_it_fits(partial(loop.timed, batches, micro_batch, WARM_UP + steps)):
            times, losses = ran
            return {
                "micro_batch": micro_batch,
                "step_s": statistics.median(times[WARM_UP:]),
                "all_step_s": times,
                "losses": losses,
                "gpu_gib": torch.cuda.max_memory_allocated(loop.device) / GIB if cuda else None,
            }
        loop.model.zero_grad(set_to_none=True)
        gc.collect()
        if loop.updates != before:
            # An update may have been broken off half-way.
            loop.restart()
        micro_batch //= 2
    return None


def if_it_fits(work: Callable[[], Any]) -> Any:
    """What it returns; None if the device's memory is too small for it. Other errors are raised."""
    try:
        return work()
    except RuntimeError as error:
        # torch's own and CUDA's words for it, and cuBLAS's.
        if not any(words in str(error) for words in ("out of memory", "ALLOC_FAILED")):
            raise
        return None


# --- All runs


class Bench:
    """What was asked for, and the rows so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows = {case(row): row for row in read_rows(options.json)}
        self.plain_file = options.json.with_suffix(".plain.jsonl")
        self.until = time.perf_counter() + options.budget_s

    def measure(self) -> None:
        """Measure what is missing of every case, while there is time."""
        given = self.options
        caps = [*([given.gpu_memory] if given.gpu_memory else []), *([None] if given.no_cap else [])]
        for model, kernels in itertools.product(given.model, given.kernels):
            rows = [
                dict(zip(CASE, (model, batch, kernels, cap, given.seq_len), strict=True))
                for batch, cap in itertools.product(given.batch, caps)
            ]
            for number, row in enumerate(rows, start=1):
                known = self.rows.get(case(row))
                if (known is None or known["error"]) and self._in_time(f"{words(row)} ({number} of {len(rows)})"):
                    self._write(self._slidetune(row))
            if given.plain:
                self._plain([self.rows[case(row)] for row in rows if case(row) in self.rows])

    def _in_time(self, name: str) -> bool:
        if time.perf_counter() <= self.until:
            return True
        note(f"{name}: not started, the time is over")
        return False

    def _write(self, row: Row) -> None:
        self.rows[case(row)] = row
        with open(self.options.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(row | figures(row)) + "\n")

    def _slidetune(self, row: Row) -> Row:
        given = self.options
        row |= {"steps": given.steps, "date": provenance.today(), "profile": str(given.profile), "error": None}
        row |= {"predicted": None, "slidetune": None, "plain": None}
        # Its imports are done while the plan is made.
        apart.get_ready()
        try:
            here = load_profile(given.profile)
            here = adapted(here, ram_gib=given.ram, gpu_memory_gib=row["cap_gib"], kernels=row["kernels"])
            planned = api.plan(row["model"], here, seq_len=row["seq_len"], batch=row["batch"])
        except SlidetuneError as error:
            note(f"{words(row)}: {error}")
            return row | {"error": str(error)}
        row["predicted"] = foreseen(planned)
        note(f"{words(row)}: predicted {planned.prediction.step_s:.3f} s")
        job = {key: row[key] for key in ("kernels", "steps", "profile")} | {"device": given.device}
        job |= {"name": record_name(row), "record": given.record and str(given.record)}
        with tempfile.TemporaryDirectory() as folder:
            job["nvme_dir"] = given.nvme_dir or folder
            ended = apart.run(run_slidetune, job, planned.plan, timeout_s=given.run_s)
        note(f"{words(row)}: slidetune {ended.error or format(ended.result['step_s'], '.3f') + ' s'}")
        return row | {"error": ended.error or None, "slidetune": ended.result}

    def _plain(self, rows: list[Row]) -> None:
        """Give the rows the plain loop's figures, measured earlier or now."""
        earlier = plain_results(self.plain_file)
        earlier += [one | {"found": one["plain"]} for one in self.rows.values() if one["plain"]]
        waiting: dict[tuple[str, ...], list[Row]] = {}
        for row in (row for row in rows if "variants" not in (row["plain"] or {})):
            ours = row["slidetune"]
            if ours and (known := [one["found"] for one in earlier if is_of(one, row) and alike(one["found"], ours)]):
                self._write(row | {"plain": known[-1]})
            else:
                # Weights that the CPU draws are others: such rows need runs of their own.
                waiting.setdefault(tuple(ours["drawn_on_host"]) if ours else (), []).append(row)
        for group in waiting.values():
            name = f"{group[0]['model']} {group[0]['kernels']}: plain"
            if self._in_time(name):
                self._plain_group(name, group)

    def _plain_group(self, name: str, rows: list[Row]) -> None:
        """Measure the plain loop for rows that differ in batch and cap alone."""
        given = self.options
        weights = rows[0]["slidetune"] or {"room_bytes": 1 << 62, "drawn_on_host": []}
        job = {key: rows[0][key] for key in PLAIN_CASE if key != "batch"}
        job |= {key: weights[key] for key in ("room_bytes", "drawn_on_host")} | {"plain_steps": given.plain_steps}
        job |= {"batches": sorted({row["batch"] for row in rows}), "results": str(self.plain_file.resolve())}
        job |= {"device": given.device, "seconds": self.until - time.perf_counter()}
        before = len(plain_results(self.plain_file))
        ended = apart.run(run_plain, job, timeout_s=given.run_s)
        new = plain_results(self.plain_file)[before:]
        for row in rows:
            found = next((one["found"] for one in new if is_of(one, row)), None)
            if found is None and not ended.error:
                note(f"{words(row)}: plain not started, the time is over")
                continue
            found = found or {"error": f"{NOT_IN_TIME}: {ended.error}"}
            times = ", ".join(f"{each['step_s']:.3f} s" for each in found.get("variants", []))
            note(f"{words(row)}: plain {found.get('error') or times or 'does not fit'}")
            self._write(row | {"plain": found})


def words(row: Row) -> str:
    return " ".join(f"{key} {row[key]}" for key in CASE)


def record_name(row: Row) -> str:
    """The name of a row's recorded run, as qwen3-4b-b8-s1024-liger-24gib."""
    cap = "nocap" if row["cap_gib"] is None else f"{row['cap_gib']:g}gib"
    return file_name([model_name(row["model"]), f"b{row['batch']}", f"s{row['seq_len']}", row["kernels"], cap])


def plain_results(path: Path) -> list[Row]:
    """What the plain loop gave, by PLAIN_CASE. A line that was cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def is_of(one: Row, row: Row) -> bool:
    """Whether a result of the plain loop is for a row's model, batch, kernels and length."""
    return all(one[key] == row[key] for key in PLAIN_CASE)


def alike(plain: Row, ours: Row) -> bool:
    """Whether a result of the plain loop is one, from the same machine and with the same weights."""
    return "variants" in plain and all(plain[key] == ours[key] for key in ("machine", "drawn_on_host"))


def case(row: Row) -> tuple:
    return tuple(row[key] for key in CASE)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, the last of each case; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return list({case(row): row for row in map(json.loads, filter(None, lines))}.values())


def foreseen(planned: api.Planned) -> Row:
    prediction = planned.prediction
    in_ram = [pool for pool in prediction.schedule.pools_of("ram") if pool.name in ACTIVATIONS]
    return {
        "step_s": prediction.step_s,
        "bound_s": prediction.bound_s,
        "limiter": prediction.limiter,
        "params": planned.model.params,
        "peak_gib": {tier: memory.peak_bytes / GIB for tier, memory in prediction.memory.items()},
        "ram_activations_gib": sum(pool.bytes for pool in in_ram) / GIB,
        "plan": files.dump(planned.plan),
    }


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- The table

COLUMNS = (
    ("model", "model", ""),
    ("batch", "batch", "d"),
    ("kernels", "kernels", ""),
    ("cap GiB", "cap_gib", "g"),
    ("step s", "slidetune_s", ".3f"),
    ("predicted", "predicted_s", ".3f"),
    ("bound", "bound_s", ".3f"),
    ("of bound", "share_of_bound", ".1%"),
    ("plain s", "plain_s", ".3f"),
    ("its micro-batch", "plain_micro_batch", "d"),
    ("of plain", "plain_over_slidetune", ".1%"),
    ("checkpointed plain s", "checkpointed_s", ".3f"),
    ("of it", "checkpointed_over_slidetune", ".1%"),
    ("GPU GiB", "gpu_gib", ".2f"),
    ("RAM GiB", "ram_gib", ".2f"),
    ("RAM B/param", "ram_bytes_per_param", ".2f"),
    ("may be", "ram_bytes_per_param_allowed", ".2f"),
    ("SlideFormer s", "slideformer_s", ".2f"),
    ("over SlideFormer", "over_slideformer", ".2f"),
    ("over MegaTrain", "over_megatrain", ".2f"),
    ("over ZeRO-3", "over_deepspeed_zero3", ".2f"),
    ("loss apart", "max_loss_difference", ".1e"),
)


def figures(row: Row) -> Row:
    """What the table shows of a row beside its case; what is not known is left out."""
    ours, plain, predicted = row["slidetune"] or {}, row["plain"] or {}, row["predicted"] or {}
    step_s, params = ours.get("step_s"), predicted.get("params")
    found = {"slidetune_s": step_s, "gpu_gib": ours.get("gpu_gib"), "ram_gib": ours.get("ram_gib")}
    found |= {"predicted_s": predicted.get("step_s"), "bound_s": predicted.get("bound_s")}
    variants = sorted(plain.get("variants", []), key=lambda each: each["step_s"])
    for name, among in (("plain", variants), ("checkpointed", [v for v in variants if v["checkpointing"]])):
        if among:
            found |= {f"{name}_s": among[0]["step_s"], f"{name}_micro_batch": among[0]["micro_batch"]}
    others = peers(row)
    found |= {f"{name}_s": seconds for name, seconds in others.items()}
    if step_s:
        found |= {f"{name}_over_slidetune": found[f"{name}_s"] / step_s for name in BOTH if f"{name}_s" in found}
        found |= {f"over_{name}": seconds / step_s for name, seconds in others.items()}
        found["share_of_bound"] = predicted["bound_s"] / step_s
        found["ram_bytes_per_param"] = (ours["ram_gib"] - predicted["ram_activations_gib"]) * GIB / params
        found["ram_bytes_per_param_allowed"] = RAM_BYTES_PER_PARAM + PROCESS_BYTES / params
        if plain.get("losses") and plain["drawn_on_host"] == ours["drawn_on_host"]:
            # One side may have made more steps.
            both = zip(ours["losses"], plain["losses"], strict=False)
            found["max_loss_difference"] = max(abs(a - b) for a, b in both)
    return found


def peers(row: Row) -> dict[str, float]:
    """Other systems' seconds for the row's model, batch and length."""
    known = yaml.safe_load(PEERS.read_text(encoding="utf-8"))
    systems = known["models"].get(row["model"], {}) if row["seq_len"] == known["seq_len"] else {}
    steps = {name: systems.get(name, {}).get("step_s", {}).get(row["batch"]) for name in SHOWN_PEERS}
    return {name: seconds for name, seconds in steps.items() if seconds}


def table(rows: Iterable[Row]) -> str:
    """Rows as a Markdown table: above it machines, versions and dates, below it what went wrong."""
    titles = [title for title, _, _ in COLUMNS]
    lines = ["| " + " | ".join(titles) + " |", "|" + "".join(" ---: |" if how else " --- |" for _, _, how in COLUMNS)]
    facts, wrong = {}, []
    for row in sorted(rows, key=lambda row: (row["model"], row["cap_gib"] is None, row["kernels"], row["batch"])):
        ours, plain, shown = row["slidetune"], row["plain"] or {}, row | figures(row)
        cells = ["–" if shown.get(key) is None else format(shown[key], how) for _, key, how in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
        if ours:
            about = {"date": row["date"], "profile": row["profile"]} | ours["machine"] | ours["versions"]
            facts[", ".join(f"{key} {value}" for key, value in about.items())] = None
        ends = [f"slidetune: {row['error']}"] if row["error"] else []
        ends += [f"plain: {plain['error']}"] if "error" in plain else []
        ends += ["plain: does not fit"] if plain.get("variants") == [] else []
        ends += ["plain: another machine"] if ours and plain.get("machine", ours["machine"]) != ours["machine"] else []
        name = f"{row['model']}, batch {row['batch']}, {row['kernels']}, cap {cells[3]}"
        wrong += [f"* {name}: {end}" for end in ends]
    return "\n".join([*facts, "", *lines, "", *wrong])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", help="catalog names, directories or config.json files")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64], help="sequences a step")
    parser.add_argument("--kernels", nargs="+", choices=("eager", "liger"), default=["liger"])
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="cap slidetune at so much of the GPU")
    parser.add_argument("--ram", type=float, metavar="GIB", help="plan for so much RAM; all there is unless given")
    parser.add_argument("--no-cap", action="store_true", help="also, or only, without a cap")
    parser.add_argument("--profile", help="this machine's, for planning")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4, help="measured ones, after the warm-up")
    parser.add_argument("--plain", action="store_true", help="run the plain loop too")
    parser.add_argument("--plain-steps", type=int, default=3, help="measured ones of it, after the warm-up")
    parser.add_argument("--record", type=Path, metavar="DIR", help="keep slidetune's runs here, as validate does")
    parser.add_argument("--device", help="cuda or cpu; the first GPU unless given")
    parser.add_argument("--nvme-dir", help="where the NVMe tier's file goes, if a plan has one")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start no run after so many seconds")
    parser.add_argument("--run-s", type=float, default=400, help="end a run after so many seconds")
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the rows go, and come from")
    parser.add_argument("--table", type=Path, metavar="OUT", help="print the table of recorded rows, run nothing")
    options = parser.parse_args()
    if not options.table:
        if not (options.model and options.profile and options.json):
            parser.error("--model, --profile and --json are needed (or --table)")
        if not (options.gpu_memory or options.no_cap):
            parser.error("give --gpu-memory, --no-cap or both")
        if options.record:
            options.record.mkdir(parents=True, exist_ok=True)
        Bench(options).measure()
    print(table(read_rows(options.table or options.json)))


if __name__ == "__main__":
    main()
