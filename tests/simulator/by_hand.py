"""Schedules small enough to work out by hand, on a machine of round numbers."""

from __future__ import annotations

from itertools import pairwise

from slidetune.hardware import Figure, Gpu, HardwareProfile, Host, Link, Nvme
from slidetune.schedule import CPU_ADAM, D2H, GPU, H2D, LANES, NVME_READ, NVME_WRITE, Hold, Pool, Schedule, Task, Work
from slidetune.simulator.engine import Executed, Run


def unit_machine(**figures: float) -> HardwareProfile:
    """1 TFLOP/s, 1 GB/s of everything else, 1 G parameters/s a core, 10 cores; nothing launches or lingers, and
    nothing is short. `figures` exchanges some: `duplex_gbs=1.0` makes the link's directions share 1 GB/s."""

    def figure(name: str, value: float) -> Figure:
        return Figure(figures.get(name, value))

    plenty = 1e6
    return HardwareProfile(
        name="unit",
        gpu=Gpu(
            name="unit",
            bf16_tflops=figure("bf16_tflops", 1.0),
            matmul_efficiency=Figure(1.0),
            memory_gib=figure("memory_gib", 16.0),
            memory_gbs=Figure(1.0),
            memory_efficiency=Figure(1.0),
            launch_us=Figure(0.0),
            context_gib=Figure(0.0),
        ),
        link=Link(
            name="unit",
            h2d_gbs=figure("h2d_gbs", 1.0),
            d2h_gbs=figure("d2h_gbs", 1.0),
            duplex_gbs=figure("duplex_gbs", plenty),
            latency_us=Figure(0.0),
        ),
        host=Host(
            name="unit",
            cores=figure("cores", 10.0),
            ram_gib=Figure(64.0),
            dram_gbs=figure("dram_gbs", plenty),
            dram_efficiency=Figure(1.0),
            adam_gparams_per_core=Figure(1.0),
            upload_dram_weight=Figure(1.0),
            download_dram_weight=Figure(1.0),
            process_gib=Figure(0.0),
            upload_priority=Figure(1.0),
            download_priority=Figure(1.0),
        ),
        nvme=Nvme(size_gb=Figure(100.0), read_gbs=Figure(1.0), write_gbs=Figure(1.0), mixed_share=Figure(2.0)),
    )


def lasting(lane: str, seconds: float, op: str = "", working_bytes: int = 0) -> Work:
    """Work that takes so long alone on the unit machine."""
    if lane == GPU:
        return Work(op=op or "forward", lane=GPU, flops=seconds * 1e12, working_bytes=working_bytes)
    if lane == CPU_ADAM:
        # One parameter of one byte: with one thread, a core's rate.
        return Work(op=op or "adam", lane=lane, params=round(seconds * 1e9), param_bytes=1.0, threads=1)
    names = {H2D: "fetch", D2H: "store", NVME_READ: "read state", NVME_WRITE: "write state"}
    return Work(op=op or names[lane], lane=lane, bytes=round(seconds * 1e9))


def schedule_of(
    *tasks: tuple[Work, tuple[int, ...], tuple[int, ...]],
    pools: tuple[Pool, ...] = (),
    holds: tuple[Hold, ...] = (),
) -> Schedule:
    """A schedule of (work, tasks of this step it waits for, tasks of the step before)."""
    return Schedule(
        name="by hand",
        lanes=LANES,
        tasks=tuple(
            Task(work, index, -1, -1, after, after_previous)
            for index, (work, after, after_previous) in enumerate(tasks)
        ),
        pools=pools,
        holds=holds,
        tokens=1,
        visits=(0,),
    )


def last_step(run: Run) -> dict[int, Executed]:
    """The tasks of the steady step of a recorded run."""
    return {done.task: done for done in run.executed if done.step == len(run.boundaries) - 1}


def settled(run: Run) -> bool:
    """Whether a recorded run's last step took as long as the one before, and left the lanes as that one had: what the
    GPU's end found unfinished ended as long after it."""
    last, tolerance = len(run.boundaries) - 1, 1e-3 * run.step_s
    before, now = (
        {done.task: done.end_s - run.boundaries[step] for done in run.executed if done.step == step}
        for step in (last - 1, last)
    )
    unfinished = {task for ends in (before, now) for task, after_s in ends.items() if after_s > 0}
    lasted = [end - start for start, end in pairwise(run.boundaries)][-2:]
    return max(lasted) - min(lasted) <= tolerance and all(
        task in before and abs(now[task] - before[task]) <= tolerance for task in unfinished
    )
