"""A measured profile is one that the simulator takes."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch")

from slidetune.builder import build
from slidetune.files import read, write
from slidetune.hardware import HardwareProfile
from slidetune.models import load_model
from slidetune.plans import Plan
from slidetune.runtime.measure import MIXES, PASSES, Effort, _Bench, measure_machine
from slidetune.simulator.predict import predict
from slidetune.units import MIB

from .reference import DEVICE

QUICK = Effort(seconds=0.02, copy_bytes=MIB, params=MIB, matrix=512, nvme_bytes=4 * MIB)


def test_a_profile_of_this_machine(tmp_path):
    found = measure_machine(DEVICE, nvme_folder=tmp_path, effort=QUICK)
    for path, figure in found.figures():
        # Copies within the CPU's caches may have no latency to speak of.
        assert figure.value > 0 or path in ("gpu.context_gib", "link.latency_us"), path
        assert figure.kind in ("measured", "guess", "derived")
        assert figure.source
        assert (figure.measured_spread is not None) == (figure.kind == "measured")
    write(tmp_path / "profile.yaml", found)
    assert read(tmp_path / "profile.yaml", HardwareProfile) == found
    model = load_model("qwen2.5-0.5b")
    assert predict(build(model, Plan(model=model.name, optimizer_nvme=4)), found).step_s > 0


def test_no_drive_unless_asked():
    assert measure_machine(DEVICE, effort=QUICK).nvme is None


@pytest.mark.parametrize("drive", [True, False])
def test_progress_counts_every_measurement(tmp_path, drive):
    told = []
    measure_machine(
        DEVICE, nvme_folder=tmp_path if drive else None, effort=QUICK, progress=lambda *now: told.append(now)
    )
    total = len(told) - 1
    assert [done for done, _, _ in told] == list(range(total + 1))
    assert {of for _, of, _ in told} == {total}
    assert total > PASSES * len(MIXES)
    assert len({what for _, _, what in told}) > len(MIXES)


def bench():
    return _Bench(torch.device(DEVICE), QUICK, lambda *now: None, drive=False)


def test_side_by_side_runs_all_of_them_at_least_once():
    ends = bench()._side_by_side(lambda: time.sleep(0.05), lambda: time.sleep(0.001))
    assert len(ends[0]) == 2
    assert len(ends[1]) > 2
    assert all(list(times) == sorted(times) for times in ends)


@pytest.mark.parametrize("fails_on_call", [1, 2])
def test_an_action_that_fails_side_by_side_ends_them_all(fails_on_call):
    calls = []

    def fail():
        calls.append(1)
        if len(calls) == fails_on_call:
            raise ValueError("no such copy")

    with pytest.raises(ValueError, match="no such copy"):
        bench()._side_by_side(fail, lambda: None)
