"""What would help: each change is a machine with one more of something, planned again."""

import dataclasses

import pytest

from slidetune.hardware import Figure
from slidetune.machines import capped, machine
from slidetune.models import load_model
from slidetune.plans import Plan
from slidetune.tuner.evaluate import Evaluator
from slidetune.tuner.whatif import AS_IT_IS, changes, whatif

from .small_spaces import MACHINES, a_machine, alone

PLAN = Plan(model="llama-3.2-1b", micro_batch=4)


def rows_for(plan, profile):
    return whatif(profile, plan, alone(Evaluator(load_model(plan.model), profile)))


@pytest.mark.parametrize("name", MACHINES)
def test_each_change_is_what_its_name_says(name):
    profile = a_machine(name)
    before = dict(profile.figures())
    ratios = {}
    for change, changed in changes(profile):
        after = dict(changed.figures())
        ratios[change] = {
            path: after[path].value / before[path].value for path in before if after[path].value != before[path].value
        }
        assert list(after) == list(before)
    ram, memory, cores = (before[path].value for path in ("host.ram_gib", "gpu.memory_gib", "host.cores"))
    assert ratios == {
        "+32 GiB RAM": {"host.ram_gib": (ram + 32) / ram},
        "+8 GiB GPU memory": {"gpu.memory_gib": (memory + 8) / memory},
        "a GPU twice as fast": {"gpu.bf16_tflops": 2, "gpu.memory_gbs": 2},
        "Liger's fused kernels": {},
        f"twice the link ({profile.link.name})": {"link.h2d_gbs": 2, "link.d2h_gbs": 2, "link.duplex_gbs": 2},
        "8 more cores": {"host.cores": (cores + 8) / cores},
        "twice the DRAM bandwidth": {"host.dram_gbs": 2},
        "an NVMe drive twice as fast": {"nvme.read_gbs": 2, "nvme.write_gbs": 2},
    }


def test_a_drive_where_there_is_none_and_no_kernels_that_are_there():
    profile = machine("rtx4090", "desktop", kernels="liger")
    found = dict(changes(profile))
    assert found["a 2 TB NVMe drive (7/5 GB/s)"].capacity_bytes("nvme") == 2 * 10**12
    assert not any("Liger" in change or "twice as fast" in change for change in found if "GPU" not in change)


@pytest.mark.parametrize("name", MACHINES)
def test_every_row_is_a_plan_that_runs_there_at_that_speed(name):
    profile = a_machine(name)
    model = load_model("llama-3.2-1b")
    machines = {**dict(changes(profile)), AS_IT_IS: profile}
    rows = rows_for(PLAN, profile)
    assert {row.change for row in rows} - {AS_IT_IS} == set(machines) - {AS_IT_IS}
    assert [row.gain for row in rows] == sorted((row.gain for row in rows), reverse=True)
    for row in rows:
        there = Evaluator(model, machines[row.change])
        assert there.fits(row.plan)
        assert row.plan.batch == PLAN.batch
        assert row.tokens_per_s == pytest.approx(there.worth(row.plan).tokens_per_s)


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("change", [{}, {"optimizer_nvme": 12}, {"update": "forward", "chunk_bytes": 2**22}])
def test_more_of_anything_is_never_a_loss(name, change):
    # Not even against a better plan for the machine as it is.
    rows = rows_for(dataclasses.replace(PLAN, **change), a_machine(name))
    assert all(row.gain >= -1e-9 for row in rows), [(row.change, row.gain) for row in rows]


def test_a_poor_plan_is_told_from_a_poor_machine():
    # A quarter of the layers on the drive for nothing.
    rows = {row.change: row for row in rows_for(dataclasses.replace(PLAN, optimizer_nvme=12), a_machine("workstation"))}
    here = rows[AS_IT_IS]
    assert here.gain > 0.05
    assert here.plan.optimizer_nvme == 0
    # What more RAM adds is reckoned from that better plan.
    assert rows["+32 GiB RAM"].gain < here.gain
    assert rows["+32 GiB RAM"].tokens_per_s == pytest.approx(here.tokens_per_s * (1 + rows["+32 GiB RAM"].gain))


def test_what_limits_a_machine_is_what_helps():
    # With so slow a link, nothing else matters.
    profile = machine("rtx4090", link="2/2")
    plan = dataclasses.replace(PLAN, model="llama-3.1-8b")
    best = next(row for row in rows_for(plan, profile) if row.change != AS_IT_IS)
    assert best.change.startswith("twice the link")
    assert best.gain > 0.2


def test_a_cap_on_gpu_memory_grows_with_it():
    profile = machine("rtx4090")
    profile = dataclasses.replace(profile, gpu=capped(profile.gpu, 8.0))
    rows = {row.change: row for row in rows_for(dataclasses.replace(PLAN, gpu_memory_gib=8.0), profile)}
    assert rows["+8 GiB GPU memory"].plan.gpu_memory_gib == 16.0
    assert rows["+32 GiB RAM"].plan.gpu_memory_gib == 8.0
    assert profile.gpu.memory_gib == Figure(8.0, "given", "command line")
