"""Machines, and spaces with few enough points to try them all."""

from __future__ import annotations

from functools import cache

from slidetune.hardware import HardwareProfile
from slidetune.machines import machine
from slidetune.models import load_model
from slidetune.plans import Plan
from slidetune.tuner.evaluate import Evaluator
from slidetune.tuner.space import Space, full_space
from slidetune.tuner.workers import Workers

MACHINES = ("workstation", "desktop", "server")


@cache
def a_machine(name: str) -> HardwareProfile:
    if name == "workstation":
        return machine("rtx4090")
    if name == "desktop":
        return machine("rtx3060-12g", "desktop", ram_gib=48, nvme="1TB:3.5/3")
    return machine("h100-sxm", "server")


def an_evaluator(model: str = "qwen3-0.6b", machine: str = "workstation") -> Evaluator:
    return Evaluator(load_model(model), a_machine(machine))


def whole_space(evaluator: Evaluator, batch: int | None = None, **knobs: object) -> Space:
    return full_space(evaluator.model, evaluator.profile, Plan(model=evaluator.model.name, **knobs), batch)


def small_space(evaluator: Evaluator) -> Space:
    """288 points that trade the batch, GPU memory, RAM and the drive against each other."""
    space = whole_space(evaluator)
    axes = {axis.name: axis.values for axis in space.axes}
    return space.restricted(
        micro_batch=(1, 2, 4, 8),
        accumulation=(1, 4),
        prefetch=(1,),
        spare_slots=(1,),
        resident_layers=(0.0, 1 / 8, 1 / 2),
        resident_weights=(0.0,),
        optimizer_nvme=(0.0, 1.0),
        weights_nvme=(0.0,),
        activations__gpu=(0.0, 0.5),
        activations__nvme=(0.0,),
        recompute__keep=(0.0, 1 / 8, 1 / 2),
        recompute__offload=(0.0,),
        recompute__products=(0.0,),
        recompute__middle=(0.0,),
        chunk_bytes=axes["chunk_bytes"][1:2],
        adam_threads=axes["adam_threads"][:1],
        update=("backward",),
        late_updates=(0.0,),
        gradient_ring=(1,),
    )


def alone(evaluator: Evaluator) -> Workers:
    """No processes: what a test replaces stays replaced."""
    return Workers(evaluator, count=1)
