"""`SlidingTrainer`: train a Hugging Face decoder-only model by a plan, inside anyone's loop.

with SlidingTrainer(model, plan, optimizer=AdamW(lr=1e-5)) as trainer:
    for batch in batches:
        loss = trainer.step(batch)
    model_weights = trainer.state_dict()
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn

from slidetune import buffers
from slidetune.builder import build
from slidetune.errors import DoesNotFit, SlidetuneError
from slidetune.model import ModelSpec, with_frozen
from slidetune.models import in_catalog, load_model
from slidetune.plan_file import read_plan
from slidetune.plans import Placement, Plan, captured, place_layers
from slidetune.runtime import arena, batches, clipping
from slidetune.runtime.adam import AdamW
from slidetune.runtime.again import has_hooks
from slidetune.runtime.binding import Parts
from slidetune.runtime.captured import Passes, cuda_passes
from slidetune.runtime.counted_spec import spec_of
from slidetune.runtime.evaluation import Evaluation
from slidetune.runtime.gpu_adam import check_gpu_adam
from slidetune.runtime.kernels import apply_kernels, choose_kernels
from slidetune.runtime.lanes import Course, Lanes
from slidetune.runtime.layout import Layout
from slidetune.runtime.loading import FromModel, FromSafetensors, RandomWeights, Source
from slidetune.runtime.masters import Master, OnDrive, place_masters, unit_weights, write_master
from slidetune.runtime.measured import Recorded, trace_rows
from slidetune.runtime.nvme import NvmeFile, aligned
from slidetune.runtime.operations import Operations
from slidetune.runtime.pointing import Pointed
from slidetune.runtime.pools import Pools
from slidetune.runtime.randomness import Randomness, draws_random_numbers
from slidetune.runtime.rows import RowTables
from slidetune.runtime.saving import save_extras, save_units
from slidetune.runtime.skeleton import skeleton
from slidetune.runtime.steps import Step
from slidetune.runtime.unit_layouts import Rule, UnitLayout, frozen_counts, unit_layouts
from slidetune.runtime.walk import Machine
from slidetune.schedule import Schedule
from slidetune.trace import TraceRow
from slidetune.units import format_bytes, format_count

_log = logging.getLogger(__name__)
# Steps whose losses somebody may still ask for: of the one under way, the one before, and their late updates.
_LOSSES = 8
# What a plan will ever use is in use after so many.
_CAP_CHECKED_STEPS = 3
_LESS_GPU = "`slidetune plan --gpu-memory GIB` finds a plan that needs less; so does a smaller window or micro_batch."
_LESS_RAM = "`slidetune plan --ram GIB` finds a plan that needs less; so does a larger optimizer_nvme, given a drive."


class NonFiniteLoss(SlidetuneError):
    """A step's loss was NaN or infinite: the step was refused, the weights are as before it."""


def decay_where_it_belongs(optimizer: AdamW) -> Rule:
    """The default rule: weight decay for matrices, none for norms and biases."""
    without = dataclasses.replace(optimizer, weight_decay=0.0)

    def rule(name: str, parameter: Tensor) -> AdamW | None:
        if not parameter.requires_grad:
            return None
        return optimizer if parameter.dim() > 1 and not name.endswith("bias") else without

    return rule


class SlidingTrainer:
    """Trains `model` as `plan` says. A context manager; `close` gives all memory, threads and files back.

    Args:
        model: a transformers causal language model on the CPU: its modules are used and its weights taken, it
            can't compute on its own any more afterwards. Or a directory of safetensors files, which are read
            tensor by tensor.
        random_weights: `model` is a directory, config.json, hub id or catalog name, of which only the config is
            read; the weights are what the model's own initialisation makes of `seed`.
        plan: for this model, or a plan's file; every knob is honoured, or refused here.
        optimizer: AdamW's hyper-parameters.
        rule: (name, parameter) -> hyper-parameters of this parameter, None to freeze it. By default `optimizer`,
            without weight decay for norms and biases; parameters with `requires_grad=False` are frozen.
        device: a CUDA device, or the CPU, which runs the same lanes without streams. By default the first GPU.
        nvme_folder: where the NVMe tier's file goes; needed if the plan uses that tier.
        seed: of dropout and of random weights.
        trace: record when each task ran in the last so many steps; see `trace`.
        kernels: eager (transformers' own), liger, or auto: Liger's on CUDA if they are installed.
        accept_non_finite: make updates of steps whose loss, or whose norm where gradients are clipped, is NaN or
            infinite too. (Without clipping nobody looks at gradients: NaN in them, with a finite loss, is applied.)
        loss_chunk_tokens: tokens whose logits exist at a time; by default what the schedule assumes.
        checkpoint: a checkpoint to go on from, as `checkpoint.load_into` takes it; of a directory's model nothing but
            the config is read then (`<checkpoint>/model` has it).

    Raises:
        BadFile: for a checkpoint that is damaged.
        SlidetuneError: for a plan, model or machine that don't go together, naming what is in the way.
        DoesNotFit: if the plan needs more GPU memory than its cap or the device has, or more RAM than is available.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        plan: Plan | str | Path,
        *,
        random_weights: bool = False,
        optimizer: AdamW | None = None,
        rule: Rule | None = None,
        device: torch.device | str | None = None,
        nvme_folder: str | Path | None = None,
        seed: int = 0,
        trace: int = 0,
        kernels: str = "auto",
        accept_non_finite: bool = False,
        loss_chunk_tokens: int | None = None,
        checkpoint: str | Path | None = None,
    ) -> None:
        self.plan = plan = _plan(plan)
        if loss_chunk_tokens is not None and loss_chunk_tokens < 1:
            raise SlidetuneError(f"loss_chunk_tokens must be at least 1, not {loss_chunk_tokens}.")
        self._accept_non_finite = accept_non_finite
        self.device = chosen_device(device)
        self._recorded: deque[Recorded] = deque(maxlen=trace + 1 if trace else 0)
        self._pools: Pools | None = None
        self._nvme: NvmeFile | None = None
        self._lanes: Lanes | None = None
        self._dropped: weakref.finalize | None = None
        self._closed = False
        self._evaluation: Evaluation | None = None
        self._directory = None if isinstance(model, nn.Module) else _directory(model)
        ref, model = model, _causal_model(model) if isinstance(model, nn.Module) else skeleton(model)
        whole = spec_of(model, plan.model)
        if ref != plan.model:
            _check_same_model(plan, whole)
        self.parts = Parts(model, whole)
        model.train()
        self._draws = draws_random_numbers(model)
        if self._draws and (plan.recompute.middle or plan.recompute.products):
            raise SlidetuneError(
                "recompute.middle and recompute.products can't be honoured in a model with dropout: recomputation has "
                "to make all of a layer.",
                "Set them to 0, or the model's dropout.",
            )
        units = unit_layouts(self.parts, rule or decay_where_it_belongs(optimizer or AdamW()))
        _check_rates(units)
        self.spec: ModelSpec = with_frozen(whole, frozen_counts(units))
        self.kernels = choose_kernels(kernels, model, self.device)
        apply_kernels(self.kernels, model)
        self.schedule: Schedule = build(self.spec, plan, self.kernels)
        self._head_task = max(i for i, task in enumerate(self.schedule.tasks) if task.work.op == "head")
        self._check_memory()
        if plan.resident_layers:
            check_gpu_adam(self.device)
        # Loading may use on the device what computing will.
        source = None
        if checkpoint is None:
            source = _weights(ref, model, random_weights, seed, self.device, self.schedule.working_bytes() // 2)
        try:
            self._set_up(model, source, units, nvme_folder, seed, loss_chunk_tokens)
        except BaseException:
            self.close()
            raise
        # Its threads would keep a trainer that was dropped without `close` alive for good.
        self._dropped = weakref.finalize(self, _let_go, self._lanes, self._pools, self._nvme)
        self.steps = 0
        """Steps so far, refused ones included."""
        self.updates = 0
        """Optimizer updates made, or due to be made by the step under way."""
        self._last: Step | None = None
        self._owed: Step | None = None
        if checkpoint is not None:
            from slidetune.runtime.checkpoint import load_into

            try:
                load_into(self, checkpoint)
            except BaseException:
                self.close()
                raise

    # ---- the loop -----------------------------------------------------------------------------------------

    def step(self, batch: Mapping[str, Any], *, lr_scale: float = 1.0) -> float:
        """One optimizer step; returns its mean loss a label as soon as it is known.

        Backward pass and update go on while the caller prepares the next batch. `batch`: input_ids, and if wanted
        attention_mask, position_ids and labels, each [micro_batch * accumulation, tokens]. `lr_scale` multiplies
        every learning rate.

        Raises:
            NonFiniteLoss: the step is refused, and the trainer goes on from the weights before it.
            TaskFailed: a task failed, in this step or in what was left of the one before. The trainer has stopped.
            SlidetuneError: for a batch that doesn't fit the plan.
        """
        self._check_open()
        if not _is_rate(lr_scale):
            raise SlidetuneError(f"lr_scale must be a finite number of at least 0, not {lr_scale!r}.")
        tensors = batches.checked(batch, self.plan, self.spec.vocab_size, self.spec.max_seq_len)
        step = self._new_step(**self._taken_apart(tensors), lr_scale=lr_scale)
        sequence = self._submit(step)
        # This step applies what was owed; it owes nothing itself unless its loss is good.
        self._last, self._owed = step, None
        self._wait(sequence, self._head_task)
        loss = float(step.losses.sum())
        if not step.good:
            raise NonFiniteLoss(
                f"step {step.number}: the loss is {loss}. The step was refused: the weights are as before it.",
                "Lower the learning rate, or look at this batch.",
            )
        _warn_if_refused(step.owed)
        self.updates += 1
        self._owed = step
        self._check_cap()
        return loss

    def evaluate(self, batch: Mapping[str, Any]) -> float:
        """Mean loss a label of a batch by the weights after the last step's update, whose end it waits for.

        Forward only, without dropout, in the memory that training has. Without dropout in the model it is, bit for bit,
        the loss that `step` would return for this batch. Nothing is trained: steps after it give what they would have
        given without it. So a loss that is not finite harms nothing, and is returned as it is. `batch`: as for `step`.

        Raises:
            TaskFailed: a task failed, in this pass or in what was left of the last step. The trainer has stopped.
            SlidetuneError: for a batch that doesn't fit the plan.
        """
        return self.evaluate_all([batch])[0]

    def evaluate_all(self, of: Iterable[Mapping[str, Any]]) -> list[float]:
        """What `evaluate` returns for each of several batches, faster: while a pass computes, the next batch is made
        ready. Raises as that does; also what the iterable raises."""
        self._check_open()
        self.finish()
        if self._evaluation is None:
            self._evaluation = Evaluation(self._operations.machine, self.kernels, self._lanes)
        found: list[float] = []
        before: tuple[Step, int] | None = None
        with self._evaluation.without_dropout():
            try:
                for batch in of:
                    tensors = batches.checked(batch, self.plan, self.spec.vocab_size, self.spec.max_seq_len)
                    step = Step(number=self.steps, **self._taken_apart(tensors, trained=False))
                    now = step, self._submit(step, self._evaluation.course)
                    if before is not None:
                        found.append(self._evaluated(*before))
                    before = now
                if before is not None:
                    found.append(self._evaluated(*before))
            except BaseException:
                # A pass under way must not find dropout on.
                with contextlib.suppress(SlidetuneError):
                    self._lanes.drain()
                raise
        return found

    def _evaluated(self, step: Step, sequence: int) -> float:
        self._wait(sequence, self._evaluation.last_task)
        return float(step.losses.sum())

    def finish(self) -> None:
        """Wait until the last step's update is complete, the late parts included. Training may go on after it."""
        if self._closed or self._lanes is None:
            return
        owed = self._owed
        if owed is not None:
            self._submit(self._new_step())
            self._owed = None
        try:
            self._lanes.drain()
        except BaseException:
            self._lanes.stop()
            raise
        _warn_if_refused(owed)

    def state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """All parameters by their names in the model, on the host: the fp32 masters, or rounded to `dtype`."""
        self._check_open()
        self.finish()
        found: dict[str, Tensor] = {}
        slot = self._staging()
        for master in self._masters:
            found |= unit_weights(master, slot, dtype)
        return found

    def save(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write config and weights as transformers' `from_pretrained` takes them, a safetensors file a unit.

        The tokenizer of a model that was read from a directory goes with them. Raises SlidetuneError if the folder
        can't be written to.
        """
        self._check_open()
        self.finish()
        slot = self._staging()
        save_units(folder, self.parts.model, (unit_weights(master, slot, dtype) for master in self._masters))
        if self._directory is not None:
            save_extras(self._directory, folder)

    def save_config(self, folder: str | Path) -> None:
        """Write what `save` writes beside the weights. Raises SlidetuneError if the tokenizer can't be copied."""
        self.parts.model.config.save_pretrained(folder)
        if self._directory is not None:
            save_extras(self._directory, folder)

    def settled(self) -> tuple[list[Master], Tensor | None]:
        """Every unit's master and moments once the last step's update is complete, and the buffer (bytes) through
        which those on NVMe are read and written; both the caller's until the next step."""
        self._check_open()
        self.finish()
        return self._masters, self._staging()

    def count_from(self, *, steps: int, updates: int, seed: int) -> None:
        """Go on as after so many steps and updates with this seed; masters and moments were set from elsewhere."""
        self.steps, self.updates, self._randomness.seed = steps, updates, seed
        self._last = None

    @property
    def seed(self) -> int:
        """Of dropout."""
        return self._randomness.seed

    def grad_norm(self) -> float | None:
        """Norm of all gradients of the last step, before clipping; None if the plan doesn't clip. Waits for the
        step."""
        self._check_open()
        if self.plan.clip_norm is None or self._last is None:
            return None
        self._lanes.drain()
        return clipping.gradient_norm(self._last)

    @property
    def nvme_written_bytes(self) -> int:
        """Bytes written to the NVMe tier so far: what the disk's endurance is spent on."""
        return 0 if self._nvme is None else self._nvme.bytes_written

    @property
    def page_locked_bytes(self) -> int:
        """Bytes of page-locked arenas; 0 without a GPU."""
        return 0 if self._pools is None else self._pools.page_locked_bytes

    @property
    def trace(self) -> list[TraceRow]:
        """When each task ran, in the last steps; how many was said at the start. Waits for them to finish."""
        self._check_open()
        if not self._recorded.maxlen:
            raise SlidetuneError("no trace was recorded.", "Say at the start how many steps to record: trace=8.")
        self.finish()
        timed = [Recorded(number, self._lanes.seconds(times)) for number, times in self._recorded]
        rows = trace_rows(self.schedule, timed)
        full = len(timed) == self._recorded.maxlen
        return [row for row in rows if row.step != timed[0].step] if full else rows

    def close(self) -> None:
        """End all threads and give all memory and files back; may be called again. What the last step still owes
        is dropped: call `finish` first, or leave a `with` block, to have it."""
        self._closed = True
        if self._dropped is not None:
            self._dropped.detach()
        if self._lanes is not None:
            self._lanes.let_go()
        if self.device.type == "cuda":
            # After a device error this raises it once more: the first one is what the caller should see.
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize(self.device)
            if self.plan.gpu_memory_bytes is not None:
                torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        for pointed in getattr(self, "_pointed", []):
            if pointed is not None:
                pointed.release()
        self._masters = []
        self._operations = self._evaluation = self._last = self._owed = None
        if self._pools is not None:
            self._pools.close()
        if self._nvme is not None:
            self._nvme.close()

    def __enter__(self) -> SlidingTrainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    # ---- plumbing -----------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise SlidetuneError("this trainer is closed.")

    def _new_step(self, **known: Any) -> Step:
        self.steps += bool(known)
        step = Step(
            number=self.steps,
            update=self.updates + 1,
            owed=self._owed,
            accepts_non_finite=self._accept_non_finite,
            **known,
        )
        step.squares = torch.zeros((), dtype=torch.float64, device=self.device)
        if self._recorded.maxlen and known:
            if not self._recorded:
                self._lanes.set_clock()
            step.times = [None] * len(self.schedule.tasks)
            self._recorded.append(Recorded(step.number, step.times))
        return step

    def _taken_apart(self, tensors: Mapping[str, Tensor], *, trained: bool = True) -> dict[str, Any]:
        """What a Step knows of its batch, and a place for its losses."""
        micro, rows, items = batches.micro_batches(tensors, self.plan, self.parts, self.device, trained=trained)
        on_cuda = self.device.type == "cuda"
        prepared = torch.cuda.Event() if on_cuda else None
        if on_cuda:
            prepared.record()
        losses = next(self._losses).fill_(math.nan)
        return {"micro_batches": micro, "rows": rows, "items": items, "losses": losses, "prepared": prepared}

    def _submit(self, step: Step, course: Course | None = None) -> int:
        try:
            return self._lanes.submit(step, course)
        except BaseException:
            self._lanes.stop()
            raise

    def _wait(self, sequence: int, task: int) -> None:
        try:
            self._lanes.wait(sequence, task)
        except BaseException:
            # Also Ctrl-C: workers end between two tasks.
            self._lanes.stop()
            raise

    def _check_memory(self) -> None:
        peaks = buffers.peak_bytes(self.spec, self.plan, self.kernels)
        needed = peaks["gpu"]
        cap = self.plan.gpu_memory_bytes
        if cap is not None and needed > cap:
            raise DoesNotFit(
                f"the plan needs {format_bytes(needed)} of GPU memory; its gpu_memory_gib allows {format_bytes(cap)}.",
                _LESS_GPU,
            )
        # Before anything is touched: the system may promise memory that isn't there, and kill whoever uses it.
        on_host = peaks["ram"] + (needed if self.device.type == "cpu" else 0)
        free = arena.available_bytes()
        if on_host > free:
            raise DoesNotFit(
                f"the plan needs {format_bytes(on_host)} of RAM; {format_bytes(free)} are available.", _LESS_RAM
            )
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            if needed > free:
                raise DoesNotFit(
                    f"the plan needs {format_bytes(needed)} of GPU memory; {format_bytes(free)} of "
                    f"{format_bytes(total)} are free.",
                    f"End what else uses the GPU, or: {_LESS_GPU}",
                )
            _without_gaps()
            if cap is not None:
                torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), self.device)

    def _check_cap(self) -> None:
        """In the first steps, whether memory has stayed below the plan's cap: the allocator's own limit doesn't count
        what is mapped piece by piece."""
        cap = self.plan.gpu_memory_bytes
        if cap is None or self.device.type != "cuda" or self.updates > _CAP_CHECKED_STEPS:
            return
        reserved = torch.cuda.memory_reserved(self.device)
        if reserved > cap:
            self._lanes.stop()
            raise DoesNotFit(
                f"{format_bytes(reserved)} of GPU memory are in use; gpu_memory_gib allows {format_bytes(cap)}.",
                _LESS_GPU,
            )

    def _make_pools(self) -> Pools:
        try:
            return Pools(self.schedule, self.device)
        # Of RAM the arenas say so; torch's allocators raise RuntimeError.
        except (MemoryError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise DoesNotFit(
                f"the plan's buffers could not be allocated: {reason}.",
                f"End what else uses the memory. For RAM: {_LESS_RAM} For the GPU: {_LESS_GPU}",
            ) from error

    def _set_up(
        self,
        model: nn.Module,
        source: Source | None,
        units: list[UnitLayout],
        folder: str | Path | None,
        seed: int,
        loss_chunk: int | None,
    ) -> None:
        spec, plan, parts = self.spec, self.plan, self.parts
        places: list[Placement] = place_layers(plan, len(spec.layers))
        layouts = [unit.owned for unit in units]
        chunk = min(buffers.chunk_params(plan), max(max(u.params for u in spec.layers), 1))
        self._nvme, inputs_at, offset = self._open_nvme(folder, layouts, places, chunk)
        self._pools = self._make_pools()
        unit_places = [None, *places, None]
        self._masters: list[Master] = place_masters(layouts, unit_places, self._pools, self._nvme, chunk, offset)
        slot = self._staging()
        if source is not None:
            for unit, master in zip(units, self._masters, strict=True):
                write_master(master, source.unit(unit), slot)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._pointed = [Pointed(unit.computed, unit.targets) if unit.targets else None for unit in units]
        self._randomness = Randomness(seed, self.device, self._draws)
        # Not made anew in each step: torch marks page-locked memory that is freed by an event in the stream that wrote
        # to it, and that stream may be recording at that moment.
        places_of_losses = torch.empty(_LOSSES, plan.accumulation, pin_memory=self.device.type == "cuda")
        self._losses = itertools.cycle(places_of_losses)
        tokens = plan.micro_batch * plan.seq_len
        machine = Machine(
            spec=spec,
            plan=plan,
            places=places,
            device=self.device,
            pools=self._pools,
            parts=parts,
            pointed=self._pointed,
            masters=self._masters,
            tables=self._tables(layouts[0]),
            randomness=self._randomness,
            passes=self._passes(),
            nvme=self._nvme,
            inputs_at=inputs_at,
            loss_chunk=loss_chunk or spec.loss_chunk_tokens(tokens),
        )
        # The model's own copies are not needed any more.
        for pointed in self._pointed:
            if pointed is not None:
                pointed.release()
        for table in parts.tables:
            getattr(parts.base, table.name)._parameters["weight"] = None
        model.to(self.device)
        self._operations = Operations(self.schedule, machine)
        if self.device.type == "cuda":
            # What was written here must be there for the lanes' streams.
            torch.cuda.synchronize(self.device)
        self._lanes = Lanes(self.schedule, self._operations.run, self.device, awaited=[self._head_task])

    def _passes(self) -> Passes:
        """How passes of layers run. Random numbers are seeded pass by pass, a user's hooks want to be called, and other
        kinds of attention than torch's look at their masks on the host."""
        attention = getattr(self.parts.model.config, "_attn_implementation", None)
        as_they_are = (
            self._randomness.active or has_hooks(self.parts.layers) or attention not in (None, "eager", "sdpa")
        )
        recorded = captured(self.plan, self.spec) and _records(self.device) and not as_they_are
        return cuda_passes(self.device) if recorded else Passes()

    def _tables(self, layout: Layout) -> RowTables:
        master = self._masters[0]
        state = master.state
        return RowTables(
            state._replace(high=master.high),
            self.spec.hidden_size,
            [(entry.shape[0], entry.hyper) for entry in layout.entries],
        )

    def _staging(self) -> Tensor | None:
        return self._pools.slot("state staging", 0, torch.uint8) if "state staging" in self._pools else None

    def _open_nvme(
        self, folder: str | Path | None, layouts: list[Layout], places: list[Placement], chunk: int
    ) -> tuple[NvmeFile | None, dict[tuple[int, int], int], int]:
        """The file of the NVMe tier, where saved inputs are in it, and where the units' state begins."""
        plan = self.plan
        hidden = aligned(self.spec.hidden_bytes(plan.micro_batch, plan.seq_len))
        inputs = [
            (i, m) for i, place in enumerate(places) if place.saved_input == "nvme" for m in range(plan.accumulation)
        ]
        offset = len(inputs) * hidden
        size = offset + sum(
            OnDrive.nbytes(layout, chunk, place.weights == "nvme")
            for layout, place in zip(layouts[1:-1], places, strict=True)
            if place.optimizer == "nvme"
        )
        if not size:
            return None, {}, 0
        if folder is None:
            raise SlidetuneError(
                "the plan uses the NVMe tier; where its file goes was not said.",
                "Give a folder on a disk: nvme_folder, or --nvme-dir DIR on the command line.",
            )
        if plan.weights_nvme and (2 * chunk) % 4096 and chunk < max(layout.trained for layout in layouts[1:-1]):
            raise SlidetuneError(f"with weights_nvme, chunk_bytes ({plan.chunk_bytes}) must be a multiple of 4096.")
        return NvmeFile(folder, size), {key: n * hidden for n, key in enumerate(inputs)}, offset


def _plan(plan: Plan | str | Path) -> Plan:
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, str | Path):
        return read_plan(plan)
    raise SlidetuneError(
        f"{type(plan).__name__} is no plan.", "Give a slidetune.plans.Plan, or the file that `slidetune plan` writes."
    )


def _causal_model(model: nn.Module) -> nn.Module:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise SlidetuneError(
            f"{type(model).__name__} is no causal language model of transformers.",
            "Give what AutoModelForCausalLM.from_pretrained returns, unwrapped, or a directory of safetensors files.",
        )
    return model


def _warn_if_refused(step: Step | None) -> None:
    """Tell the caller's caller of a step whose gradients clipping has found not to be finite."""
    if step is not None and step.refused:
        warnings.warn(f"step {step.number}: its gradients are not finite. Its update was refused.", stacklevel=3)


def _records(device: torch.device) -> bool:
    return device.type == "cuda"


def _is_rate(value: object) -> bool:
    return isinstance(value, SupportsFloat) and math.isfinite(float(value)) and float(value) >= 0


def _check_rates(units: list[UnitLayout]) -> None:
    """Raise SlidetuneError for a learning rate that would make weights NaN, or climb the loss."""
    for unit in units:
        for entry in unit.owned.entries:
            if entry.hyper is not None and not _is_rate(entry.hyper.lr):
                raise SlidetuneError(
                    f"the learning rate of {entry.name} must be a finite number of at least 0, not {entry.hyper.lr!r}."
                )


def _let_go(lanes: Lanes, pools: Pools, nvme: NvmeFile | None) -> None:
    """End the threads and give memory and files back."""
    lanes.let_go()
    pools.close()
    if nvme is not None:
        nvme.close()


def _check_same_model(plan: Plan, model: ModelSpec) -> None:
    """Raise SlidetuneError where the plan names another model; warn where what it names can't be looked up."""
    if not in_catalog(plan.model) and not Path(plan.model).expanduser().exists():
        _log.warning(
            "The plan is for %s, which is neither in the catalog nor a path here: whether it is for this model is not "
            "checked.",
            plan.model,
        )
        return
    planned = load_model(plan.model)
    if (
        [u.params for u in planned.units] != [u.params for u in model.units]
        or planned.tied != model.tied
        or planned.family != model.family
    ):
        raise SlidetuneError(
            f"the plan is for {plan.model}, {_in_words(planned)}; this model has {_in_words(model)}.",
            "Make a plan for this model: `slidetune plan --model`.",
        )


def _in_words(model: ModelSpec) -> str:
    return f"{len(model.layers)} layers and {format_count(model.params)} parameters of family {model.family}"


def _directory(ref: str | Path) -> Path | None:
    """The directory that a model is read from, if it is one."""
    path = Path(ref).expanduser()
    path = path.parent if path.name == "config.json" else path
    return path if path.is_dir() else None


def _weights(
    ref: nn.Module | str | Path, model: nn.Module, random: bool, seed: int, device: torch.device, room_bytes: int
) -> Source:
    """Where the weights come from: the model that was given, a seed, or a directory."""
    if isinstance(ref, nn.Module):
        return FromModel(model)
    return RandomWeights(model, seed, device, room_bytes) if random else FromSafetensors(ref, model)


def _without_gaps() -> None:
    """Let torch's allocator map device memory piece by piece, unless the user has configured it: plans fill the card to
    the last GiB, and blocks of fixed sizes leave gaps that the next one doesn't fit."""
    if any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        return
    older = torch.cuda.memory._set_allocator_settings
    getattr(torch._C, "_accelerator_setAllocatorSettings", older)("expandable_segments:True")


def chosen_device(device: torch.device | str | None) -> torch.device:
    """The device that is meant, the first GPU or the CPU if none is said. Raises SlidetuneError if it isn't here."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        chosen = torch.device(device or ("cuda" if count else "cpu"))
    except (RuntimeError, TypeError):
        chosen = None
    if chosen is not None and chosen.type == "cuda" and chosen.index is None and count:
        chosen = torch.device("cuda", torch.cuda.current_device())
    here = [torch.device("cpu"), torch.device("cpu", 0), *(torch.device("cuda", n) for n in range(count))]
    if chosen not in here:
        choices = ", ".join(["cpu", *(["cuda"] if count else []), *(f"cuda:{n}" for n in range(count))])
        # A GPU that torch doesn't see is the driver's or the installation's fault.
        none = "" if count else " torch sees no CUDA device: look at `nvidia-smi`, and for a torch made for CUDA."
        raise SlidetuneError(f"device {device} is not here.", f"There is {choices}.{none}")
    return chosen
