"""What each task of a schedule does: one function a task, bound once to the buffers its holds give it."""

from __future__ import annotations

from slidetune.runtime import gpu_tasks, row_tasks, transfer_tasks, update_tasks
from slidetune.runtime.steps import Step
from slidetune.runtime.walk import Machine, Operation, Walk
from slidetune.schedule import CPU_ADAM, D2H, GPU, H2D, NVME_READ, NVME_WRITE, Schedule, Task


class Operations:
    """`run[i](step)` carries out task i of the schedule."""

    def __init__(self, schedule: Schedule, machine: Machine) -> None:
        self.machine = machine
        walk = Walk(schedule, machine)
        self.run = [_bound(walk, index, task) for index, task in enumerate(schedule.tasks)]


def _bound(walk: Walk, index: int, task: Task) -> Operation:
    op, lane = task.work.op, task.work.lane
    run = _BINDERS[op, lane](walk, index, task)
    updates = op.startswith("adam") or op in ("read state", "write state")
    return run if updates else _skipped_if_only_update(run)


def _skipped_if_only_update(run: Operation) -> Operation:
    def skipping(step: Step) -> None:
        if not step.only_update:
            run(step)

    return skipping


_BINDERS = {
    ("gather", H2D): row_tasks.gather,
    ("fetch", H2D): transfer_tasks.fetch,
    ("load", H2D): transfer_tasks.load,
    ("load middle", H2D): transfer_tasks.load_middle,
    ("load inner", H2D): transfer_tasks.load_inner,
    ("forward", GPU): gpu_tasks.forward,
    ("recompute", GPU): gpu_tasks.recompute,
    ("backward", GPU): gpu_tasks.backward,
    ("head", GPU): gpu_tasks.head,
    ("loss", GPU): gpu_tasks.loss,
    ("adam", GPU): update_tasks.adam_gpu,
    ("save", D2H): transfer_tasks.save,
    ("save middle", D2H): transfer_tasks.save_middle,
    ("save inner", D2H): transfer_tasks.save_inner,
    ("store", D2H): update_tasks.store,
    ("store rows", D2H): row_tasks.store_rows,
    ("adam", CPU_ADAM): update_tasks.adam,
    ("adam rows", CPU_ADAM): row_tasks.adam_rows,
    ("adam other rows", CPU_ADAM): row_tasks.adam_other_rows,
    ("adam rest", CPU_ADAM): row_tasks.adam_rest,
    ("read weights", NVME_READ): transfer_tasks.read_weights,
    ("read state", NVME_READ): update_tasks.read_state,
    ("read input", NVME_READ): transfer_tasks.read_input,
    ("write state", NVME_WRITE): update_tasks.write_state,
    ("write input", NVME_WRITE): transfer_tasks.write_input,
}
