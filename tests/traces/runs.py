"""Runs that never were: what a prediction foresees, stretched, as if it had been measured."""

from slidetune.plans import Plan
from slidetune.process_memory import process_bytes
from slidetune.traces.recorded import MeasuredSteps, RecordedRun, digest


def as_if_run(prediction, plan=None, *, stretch=1.0, device="cuda", name="run", **other):
    """A run whose every time is the predicted one times `stretch`, and whose memory is as predicted."""
    by_task = {row.task: row for row in prediction.trace}
    rows = [by_task[task] for task in range(len(prediction.schedule.tasks))]
    peaks = {tier: prediction.memory[tier].peak_bytes for tier in ("gpu", "ram")}
    peaks["ram"] += process_bytes("cuda")
    peaks["page_locked"] = sum(pool.bytes for pool in prediction.schedule.pools_of("ram") if pool.page_locked)
    measured = {
        "step_s": (stretch * prediction.step_s,) * 3,
        "losses": (11.5, 11.25, 11.0),
        "peak_bytes": peaks,
        "nvme_written_bytes": prediction.nvme_written_bytes,
        "tasks": digest(prediction.schedule),
        "start_us": tuple(round(1e6 * stretch * row.start_s) for row in rows),
        "end_us": tuple(round(1e6 * stretch * row.end_s) for row in rows),
    }
    return RecordedRun(
        name=name,
        date="2026-11-24",
        machine={"cpu": "a CPU", "gpu": "a GPU"},
        versions={"torch": "2.11"},
        device=device,
        kernels="eager",
        plan=plan or Plan(model="llama-3.1-8b", micro_batch=8),
        recomputes_whole=False,
        measured=MeasuredSteps(**measured | other),
    )
