"""`slidetune tune-loop` on the CPU, end to end."""

from __future__ import annotations

import json

import pytest

from slidetune import files
from slidetune.hardware import HardwareProfile
from slidetune.machines import load_profile, machine
from slidetune.plan_file import read_plan

from .commands import refused, slidetune
from .test_run import CONFIG

ASKED = ("--model", "small", "--seq-len", 32, "--batch", 2, "--trials", 10, "--device", "cpu", "--steps", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and a profile of a machine that this one is not."""
    folder = tmp_path_factory.mktemp("tune")
    (folder / "small").mkdir()
    (folder / "small" / "config.json").write_text(json.dumps(CONFIG))
    files.write(folder / "profile.yaml", machine("rtx4090", cores=2))
    return folder


def test_rounds_are_run_and_the_best_plan_and_the_refitted_profile_written(folder):
    ran = slidetune("tune-loop", *ASKED, "--rounds", 2, "--gpu-memory", 2, "--json", cwd=folder)
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    first = found["rounds"][0]
    assert first["error"] == pytest.approx(first["predicted_s"] / first["measured_s"] - 1)
    assert first["learned"]
    assert all("profiled" in lesson["text"] for lesson in first["learned"])
    best = found["rounds"][found["best_round"] - 1]
    assert best["tokens_per_s"] >= 0.97 * max(one["tokens_per_s"] for one in found["rounds"])
    plan = read_plan(folder / "plan.yaml")
    assert files.dump(plan) == found["plan"] == best["plan"]
    assert (plan.batch, plan.seq_len, plan.gpu_memory_gib) == (2, 32, 2)
    refitted = load_profile(folder / "tuned-profile.yaml")
    assert isinstance(refitted, HardwareProfile)
    assert {time.op for time in refitted.gpu.times} >= {"forward", "backward"}
    # The cap was this loop's; the machine has what it had.
    assert refitted.gpu.memory_gib == load_profile(folder / "profile.yaml").gpu.memory_gib


def test_a_page_for_people(folder):
    ran = slidetune("tune-loop", *ASKED, "--rounds", 1, "-o", "other.yaml", "--profile-out", "new.yaml", cwd=folder)
    assert ran.code == 0, ran.err
    assert "Round 1" in ran.out
    assert "learned" in ran.out
    assert "predicted" in ran.words
    assert "Best round 1 measured" in ran.words
    assert "Measured:" in (folder / "other.yaml").read_text()
    again = slidetune("simulate", "other.yaml", "--profile", "new.yaml", "--json", cwd=folder)
    assert again.code == 0, again.err


def test_what_must_be_said(folder, tmp_path):
    refused("tune-loop", cwd=tmp_path, saying="`slidetune profile` measures the machine")
    refused("tune-loop", *ASKED, "-o", "nowhere/plan.yaml", cwd=folder, saying="no directory nowhere")
    refused("tune-loop", *ASKED, "--objective", "fame", cwd=folder, saying="unknown objective")
    refused("tune-loop", *ASKED, "--profile-out", "small", cwd=folder, saying="is a directory")
