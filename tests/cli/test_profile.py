"""`slidetune profile`: what it refuses and what it prints; tests/runtime has its measurements."""

from __future__ import annotations

import dataclasses
import json

import pytest

pytest.importorskip("torch")

from slidetune.cli.profile import _catalog, page
from slidetune.files import dump
from slidetune.hardware import Figure, KernelTime
from slidetune.machines import load_profile, machine

from .commands import refused, slidetune

CARD = machine("rtx4090")
MEASURED = CARD.replaced("link.h2d_gbs", Figure(0.88 * CARD.link.h2d_gbs.value, "measured", "bench", 0.02))
NOISY = CARD.replaced("link.d2h_gbs", Figure(20.0, "measured", "bench", 0.25))
TIME = KernelTime(
    model="llama-3.1-8b",
    kernels="eager",
    op="forward",
    micro_batch=4,
    seq_len=1024,
    flops=1e12,
    traffic_bytes=1e9,
    launches=45,
    seconds=2e-3,
    spread=0.02,
    model_s=1e-3,
)


def line_of(path, profile):
    return next(line for line in page(profile) if line.startswith(f"{path} "))


def test_a_measured_figure_stands_beside_the_catalogs():
    line = line_of("link.h2d_gbs", MEASURED)
    assert "±2%" in line
    assert f"catalog {CARD.link.h2d_gbs.value:.4g}, -12%" in line
    assert "noisy" not in line
    # Whose kind is the catalog's own guess has nothing to be compared with.
    assert "catalog" not in line_of("gpu.launch_us", MEASURED)
    found = _catalog(MEASURED)
    assert found["card"] == "rtx4090"
    assert found["figures"]["link.h2d_gbs"] == dump(CARD.link.h2d_gbs) | {"difference": -0.12}
    assert "gpu.launch_us" not in found["figures"]


def test_a_card_that_is_not_in_the_catalog():
    here = dataclasses.replace(MEASURED, gpu=dataclasses.replace(MEASURED.gpu, name="CPU as device"))
    assert _catalog(here) is None
    assert "catalog" not in line_of("link.h2d_gbs", here)


def test_noise_is_named_and_said_what_to_do_about():
    assert "±25% noisy" in line_of("link.d2h_gbs", NOISY)
    last = list(page(NOISY))[-1]
    assert "link.d2h_gbs" in last
    assert "Let the machine idle" in last
    assert not any("noisy" in line.casefold() for line in page(MEASURED))


@pytest.mark.parametrize("spread", [0.02, 0.2])
def test_a_measured_layer_has_its_line(spread):
    gpu = dataclasses.replace(CARD.gpu, times=(dataclasses.replace(TIME, spread=spread),))
    lines = list(page(dataclasses.replace(CARD, gpu=gpu)))
    line = next(line for line in lines if line.startswith("llama-3.1-8b"))
    assert " 2 ms " in line
    assert f"±{spread:.0%}" in line
    assert "2.00 of the figures'" in line
    assert ("noisy" in line) == ("Noisy" in lines[-1]) == (spread > 0.1)


def test_a_quick_profile_of_this_machine(tmp_path):
    ran = slidetune("profile", "--quick", "--device", "cpu", "--json", cwd=tmp_path)
    assert ran.code == 0, ran.err
    printed = json.loads(ran.out)
    assert printed.pop("catalog") is None
    written = load_profile(tmp_path / "profile.yaml")
    assert printed == dump(written)
    assert written.link.h2d_gbs.measured_spread is not None


def test_a_device_that_is_not_here(tmp_path):
    for device in ("cuda:99", "foo"):
        refused(
            "profile", "--quick", "--device", device, cwd=tmp_path, saying=rf"device {device} is not here\. There is"
        )


def test_a_drive_that_is_not_there(tmp_path):
    (tmp_path / "file").touch()
    options = ("profile", "--quick", "--device", "cpu")
    refused(*options, "--nvme-dir", "nowhere", cwd=tmp_path, saying=r"No such file .*--nvme-dir")
    refused(*options, "--nvme-dir", "file", cwd=tmp_path, saying=r"Not a directory .*--nvme-dir")
    assert not (tmp_path / "profile.yaml").exists()
