"""What to say when a plan doesn't fit: which tier, by how much, because of what, and the nearest change that fits."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

from slidetune import buffers
from slidetune.errors import DoesNotFit
from slidetune.hardware import HardwareProfile
from slidetune.model import ModelSpec
from slidetune.plans import Activations, Plan, problems
from slidetune.schedule import TIERS, Pool
from slidetune.traces.labels import TIER_LABELS
from slidetune.units import GB, GIB, format_bytes

_BUFFERS_NAMED = _PLANS_NAMED = 3
# Machines are bought in steps of this many GiB.
_RAM_STEP, _GPU_STEP = 16, 4


def does_not_fit(model: ModelSpec, profile: HardwareProfile, plan: Plan, what: str) -> DoesNotFit:
    """The error for a plan that overflows some tier of the machine. `what` begins the sentence."""
    kernels = profile.gpu.kernels
    pools = [pool for pool in buffers.pools(model, plan, kernels) if not pool.transient]
    # With what is kept beside it.
    on_gpu = sum(pool.bytes for pool in pools if pool.tier == "gpu")
    working = buffers.peak_bytes(model, plan, kernels)["gpu"] - on_gpu
    gentlest = itertools.islice(_changes_of_the_plan(model, profile, plan), _PLANS_NAMED)
    hint = [*gentlest, *_changes_of_the_machine(model, profile, plan)]
    return overflow_error(what, profile, pools, working, hint)


def overflow_error(
    what: str, profile: HardwareProfile, pools: Iterable[Pool], working_bytes: int, remedies: list[str]
) -> DoesNotFit:
    """The error for pools, and a GPU working set beside them, that overflow some tier."""
    pools = list(pools)
    parts = []
    for tier in TIERS:
        owners = {pool.name: pool.bytes for pool in pools if pool.tier == tier}
        if tier == "gpu":
            owners["working set"] = working_bytes
        needed, size = sum(owners.values()), profile.capacity_bytes(tier)
        if needed > size:
            largest = sorted(owners.items(), key=lambda item: -item[1])[:_BUFFERS_NAMED]
            named = ", ".join(f"{name} {format_bytes(held)}" for name, held in largest)
            parts.append(
                f"{TIER_LABELS[tier]} by {format_bytes(needed - size)} ({needed - size:,} bytes): it needs "
                f"{format_bytes(needed)} of {format_bytes(size)} usable, most of it {named}"
            )
    hint = "Nearest changes that fit: " + "; ".join(remedies) + "." if remedies else ""
    return DoesNotFit(f"{what} overflows " + "; and ".join(parts) + ".", hint or "No single change of it fits.")


def _changes_of_the_plan(model: ModelSpec, profile: HardwareProfile, plan: Plan) -> Iterator[str]:
    """Single changes of the plan after which it fits, in words, the gentlest first."""
    for text, candidates in _candidates(model, profile, plan):
        fitting = next((c for c in candidates if not problems(c, model) and _fits(model, profile, c)), None)
        if fitting is not None:
            yield text(fitting)


def _candidates(model: ModelSpec, profile: HardwareProfile, plan: Plan) -> Iterator[tuple]:
    """(how to say it, plans to try in order) for each knob that saves memory somewhere."""
    layers = len(model.layers)
    sliding = layers - plan.resident_layers

    def changed(**knobs: object) -> Plan:
        return dataclasses.replace(plan, **knobs)

    def down(start: int) -> range:
        return range(start - 1, -1, -1)

    yield (
        lambda p: f"recompute.keep: {p.recompute.keep}",
        (changed(recompute=dataclasses.replace(plan.recompute, keep=k)) for k in down(plan.recompute.keep)),
    )
    yield (
        lambda p: f"recompute.products: {p.recompute.products}",
        (changed(recompute=dataclasses.replace(plan.recompute, products=n)) for n in down(plan.recompute.products)),
    )
    yield (
        lambda p: f"recompute.middle: {p.recompute.middle}",
        (changed(recompute=dataclasses.replace(plan.recompute, middle=n)) for n in down(plan.recompute.middle)),
    )
    yield (
        lambda p: f"activations.gpu: {p.activations.gpu}",
        (changed(activations=Activations(gpu=n, nvme=plan.activations.nvme)) for n in down(plan.activations.gpu)),
    )
    yield (
        lambda p: f"resident_layers: {p.resident_layers}",
        (changed(resident_layers=n) for n in down(plan.resident_layers)),
    )
    yield (
        lambda p: f"resident_weights: {p.resident_weights}",
        (changed(resident_weights=n) for n in down(plan.resident_weights)),
    )
    yield (
        lambda p: f"resident_layers: {p.resident_layers}",
        (changed(resident_layers=n) for n in range(plan.resident_layers + 1, layers + 1)),
    )
    yield (
        lambda p: f"activations.gpu: {p.activations.gpu}",
        (
            changed(activations=Activations(gpu=n, nvme=plan.activations.nvme))
            for n in range(plan.activations.gpu + 1, layers - plan.activations.nvme + 1)
        ),
    )
    smaller = [d for d in range(plan.batch, 0, -1) if plan.batch % d == 0 and d < plan.micro_batch]
    yield (
        lambda p: f"micro_batch: {p.micro_batch} with accumulation: {p.accumulation} (the same batch)",
        (changed(micro_batch=d, accumulation=plan.batch // d) for d in smaller),
    )
    yield (
        lambda p: f"activations.nvme: {p.activations.nvme}",
        (changed(activations=Activations(gpu=plan.activations.gpu, nvme=n)) for n in down(plan.activations.nvme)),
    )
    yield (
        lambda p: f"optimizer_nvme: {p.optimizer_nvme}",
        (changed(optimizer_nvme=n) for n in down(plan.optimizer_nvme)),
    )
    if profile.nvme is not None:
        yield (
            lambda p: f"activations.nvme: {p.activations.nvme}",
            (
                changed(activations=Activations(gpu=plan.activations.gpu, nvme=n))
                for n in range(plan.activations.nvme + 1, layers - plan.activations.gpu + 1)
            ),
        )
        yield (
            lambda p: f"optimizer_nvme: {p.optimizer_nvme}",
            (changed(optimizer_nvme=n) for n in range(plan.optimizer_nvme + 1, sliding + 1)),
        )
        yield (
            lambda p: f"optimizer_nvme: {p.optimizer_nvme} with weights_nvme: {p.weights_nvme}",
            (changed(optimizer_nvme=sliding, weights_nvme=n) for n in range(1, sliding + 1)),
        )
    yield (
        lambda p: f"a batch of {p.batch} (micro_batch: {p.micro_batch}, accumulation: {p.accumulation})",
        (changed(micro_batch=m, accumulation=a) for m, a in _smaller_batches(plan)),
    )
    yield (
        lambda p: f"seq_len: {p.seq_len}",
        (changed(seq_len=plan.seq_len >> k) for k in range(1, 8) if plan.seq_len >> k >= 128),
    )


def _smaller_batches(plan: Plan) -> list[tuple[int, int]]:
    """Micro-batches and accumulations that make a smaller batch, the largest first."""
    cuts = itertools.product(range(1, plan.micro_batch + 1), range(1, plan.accumulation + 1))
    return sorted((cut for cut in cuts if cut[0] * cut[1] < plan.batch), key=lambda cut: (-cut[0] * cut[1], -cut[0]))


def _changes_of_the_machine(model: ModelSpec, profile: HardwareProfile, plan: Plan) -> Iterator[str]:
    """The machine on which the plan fits as it is, and the drive that would do instead."""
    needs = buffers.peak_bytes(model, plan, profile.gpu.kernels)
    yield machine_that_holds(profile, needs)
    if profile.nvme is None and needs["ram"] > profile.capacity_bytes("ram"):
        yield from _with_a_drive(model, profile, plan)


def machine_that_holds(profile: HardwareProfile, needs: Mapping[str, int]) -> str:
    """What the machine must have in place of what is too small for so many bytes of each tier."""
    texts = []
    if needs["gpu"] > profile.capacity_bytes("gpu"):
        texts.append(f"a GPU of {_up(needs['gpu'] / GIB + profile.gpu.context_gib.value, _GPU_STEP)} GiB")
    if needs["ram"] > profile.capacity_bytes("ram"):
        texts.append(f"--ram {_up(needs['ram'] / GIB + profile.host.process_gib.value, _RAM_STEP)}")
    if needs["nvme"] > profile.capacity_bytes("nvme"):
        texts.append(f"--nvme {math.ceil(needs['nvme'] / GB / 100) / 10:g}TB:READ/WRITE")
    return "a machine with " + " and ".join(texts)


def _with_a_drive(model: ModelSpec, profile: HardwareProfile, plan: Plan) -> Iterator[str]:
    """The least a drive must hold so that the plan fits with its state, or weights too, on it."""
    sliding = len(model.layers) - plan.resident_layers
    for weights in (0, sliding):
        moved = {"optimizer_nvme": sliding} | ({"weights_nvme": sliding} if weights else {})
        if weights and plan.resident_weights:
            moved["resident_weights"] = 0
        needs = buffers.peak_bytes(model, dataclasses.replace(plan, **moved), profile.gpu.kernels)
        if all(needs[tier] <= profile.capacity_bytes(tier) for tier in ("gpu", "ram")):
            said = ", ".join(f"{knob}: {value}" for knob, value in moved.items())
            yield f"an NVMe drive (--nvme {math.ceil(needs['nvme'] / GB / 100) / 10:g}TB:7/5) with {said}"
            return


def _fits(model: ModelSpec, profile: HardwareProfile, plan: Plan) -> bool:
    needs = buffers.peak_bytes(model, plan, profile.gpu.kernels)
    return all(needs[tier] <= profile.capacity_bytes(tier) for tier in TIERS)


def _up(value: float, step: int) -> int:
    return math.ceil(value / step) * step
