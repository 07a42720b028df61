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
            upload_duplex_priority=Figure(1.0),
            download_duplex_priority=Figure(1.0),
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


def even(run: Run) -> bool:
    """Whether the last two steps took as long, so that they don't alternate."""
    lasted = [end - start for start, end in pairwise(run.boundaries)][-2:]
    return max(lasted) - min(lasted) <= 1e-3 * run.step_s


def settled(run: Run) -> bool:
    """Whether a recorded run repeats itself: its last two steps took as long, and on every lane, what ended after the
    first of them, or was run ahead of the second, came one step later again."""
    return even(run) and max(map(abs, _drift_s(run)), default=0.0) <= 1e-3 * run.step_s


def keeps_pace(run: Run) -> bool:
    """The same, but lanes may still get further ahead: that leaves the step as long as it is."""
    return even(run) and max(_drift_s(run), default=0.0) <= 1e-3 * run.step_s


def _drift_s(run: Run) -> list[float]:
    """How much later than after a step tasks came again."""
    last = len(run.boundaries) - 1
    ends = {(done.step, done.task): done.end_s for done in run.executed}
    return [
        ends[step + 1, task] - end_s - run.step_s
        for (step, task), end_s in ends.items()
        if (step + 1, task) in ends and (step == last or (step == last - 1 and end_s > run.boundaries[step]))
    ]
