"""What would help: the machine with one more of something, planned again around the plan at hand."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from slidetune.hardware import Figure, HardwareProfile, Nvme
from slidetune.plans import Plan
from slidetune.tuner.evaluate import Evaluator
from slidetune.tuner.heuristics import starting_points
from slidetune.tuner.space import full_space
from slidetune.tuner.workers import Workers

# Plans tried on each changed machine beside the one at hand.
_TRIES = 3
MORE_RAM_GIB, MORE_GPU_GIB, MORE_CORES = 32, 8, 8
_ROUNDING = 1e-9
_ASSUMED = "what if"
AS_IT_IS = "another plan, same machine"
_DRIVE = Nvme(
    size_gb=Figure(2000.0, "given", _ASSUMED),
    read_gbs=Figure(7.0, "given", _ASSUMED),
    write_gbs=Figure(5.0, "given", _ASSUMED),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """What one change of the machine would do to an optimizer step of the same batch."""

    change: str
    """Such as "+32 GiB RAM"."""
    tokens_per_s: float
    gain: float
    """Share by which that is more than the best plan found on the machine as it is."""
    plan: Plan
    """The best plan found there."""


def changes(profile: HardwareProfile) -> Iterator[tuple[str, HardwareProfile]]:
    """One more of each resource, with the name a person would give it."""
    gpu, link, host, nvme = profile.gpu, profile.link, profile.host, profile.nvme
    yield (
        f"+{MORE_RAM_GIB} GiB RAM",
        profile.replaced("host.ram_gib", _more(host.ram_gib, MORE_RAM_GIB)),
    )
    yield (
        f"+{MORE_GPU_GIB} GiB GPU memory",
        profile.replaced("gpu.memory_gib", _more(gpu.memory_gib, MORE_GPU_GIB)),
    )
    yield "a GPU twice as fast", _twice(profile, "gpu.bf16_tflops", "gpu.memory_gbs")
    if gpu.kernels == "eager":
        yield "Liger's fused kernels", dataclasses.replace(profile, gpu=dataclasses.replace(gpu, kernels="liger"))
    yield f"twice the link ({link.name})", _twice(profile, "link.h2d_gbs", "link.d2h_gbs", "link.duplex_gbs")
    yield f"{MORE_CORES} more cores", profile.replaced("host.cores", _more(host.cores, MORE_CORES))
    yield "twice the DRAM bandwidth", _twice(profile, "host.dram_gbs")
    if nvme is None:
        yield "a 2 TB NVMe drive (7/5 GB/s)", dataclasses.replace(profile, nvme=_DRIVE)
    else:
        yield "an NVMe drive twice as fast", _twice(profile, "nvme.read_gbs", "nvme.write_gbs")


def whatif(profile: HardwareProfile, plan: Plan, workers: Workers) -> list[WhatIf]:
    """Every change, the most helpful first. The batch stays the same, so that only speed is compared.

    A plan that isn't the best must not make every change look helpful: the first case is the machine as it is, and
    where another plan is faster there, that is a row too.
    """
    cases = [(AS_IT_IS, profile, plan), *((change, changed, plan) for change, changed in changes(profile))]
    (now, (base, better)), *reached = workers.map(_after, cases)
    found = {change: best for (change, _, _), (_, best) in zip(cases[1:], reached, strict=True)}
    # The better plan may not be among those tried on a changed machine, where it would do no worse.
    behind = [(change, changed, better) for change, changed, _ in cases[1:] if found[change][0] < base]
    for (change, _, _), (_, best) in zip(behind, workers.map(_after, behind), strict=True):
        found[change] = max(found[change], best, key=lambda pair: pair[0])
    rows = [
        WhatIf(change=change, tokens_per_s=tokens, gain=_gain(tokens, base), plan=best)
        for change, (tokens, best) in found.items()
    ]
    if base > now:
        rows.append(WhatIf(change=AS_IT_IS, tokens_per_s=base, gain=_gain(base, now), plan=better))
    return sorted(rows, key=lambda row: -row.gain)


def _after(here: Evaluator, case: tuple[str, HardwareProfile, Plan]) -> tuple[float, tuple[float, Plan]]:
    """Tokens/s of the plan at hand, and of the best among it and a few that put the change to use."""
    _, changed, plan = case
    model, evaluator = here.model, Evaluator(here.model, changed)
    if plan.gpu_memory_gib is not None:
        # A cap on GPU memory is part of the machine: with more of it, the cap is higher.
        plan = dataclasses.replace(plan, gpu_memory_gib=changed.gpu.memory_gib.value)
    space = full_space(model, changed, plan, plan.batch)
    # Adam may use cores that were not there before.
    threads = max(plan.adam_threads, *next(axis.values for axis in space.axes if axis.name == "adam_threads"))
    near = space.restricted(
        micro_batch=(plan.micro_batch,),
        update=(plan.update,),
        prefetch=(plan.prefetch,),
        chunk_bytes=(plan.chunk_bytes,),
        adam_threads=(threads,),
    )
    fresh = [near.plan(point) for point in itertools.islice(starting_points(near, evaluator), _TRIES)]
    candidates = dict.fromkeys([plan, dataclasses.replace(plan, adam_threads=threads), *fresh])
    best = max(filter(evaluator.fits, candidates), key=lambda p: evaluator.worth(p).tokens_per_s)
    return evaluator.worth(plan).tokens_per_s, (evaluator.worth(best).tokens_per_s, best)


def _gain(tokens_per_s: float, base: float) -> float:
    """The share gained; what is only rounding is none."""
    gain = tokens_per_s / base - 1.0
    return gain if abs(gain) > _ROUNDING else 0.0


def _more(figure: Figure, amount: float) -> Figure:
    return Figure(figure.value + amount, "given", _ASSUMED)


def _twice(profile: HardwareProfile, *paths: str) -> HardwareProfile:
    for path in paths:
        profile = profile.scaled(path, 2.0)
    return profile
