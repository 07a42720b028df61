"""A measured profile is one that the simulator takes."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from slidetune.builder import build
from slidetune.files import read, write
from slidetune.hardware import HardwareProfile
from slidetune.models import load_model
from slidetune.plans import Plan
from slidetune.runtime.measure import Effort, measure_machine
from slidetune.simulator.predict import predict
from slidetune.units import MIB

from .reference import DEVICE

QUICK = Effort(seconds=0.02, copy_bytes=MIB, params=MIB, matrix=512, nvme_bytes=4 * MIB)


def test_a_profile_of_this_machine(tmp_path):
    found = measure_machine(DEVICE, nvme_folder=tmp_path, effort=QUICK)
    for path, figure in found.figures():
        assert figure.value > 0 or path == "gpu.context_gib", path
        assert figure.kind in ("measured", "guess", "derived")
        assert figure.source
    write(tmp_path / "profile.yaml", found)
    assert read(tmp_path / "profile.yaml", HardwareProfile) == found
    model = load_model("qwen2.5-0.5b")
    assert predict(build(model, Plan(model=model.name, optimizer_nvme=4)), found).step_s > 0


def test_no_drive_unless_asked():
    assert measure_machine(DEVICE, effort=QUICK).nvme is None
