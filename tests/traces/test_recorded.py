"""Recorded runs: what is written comes back, small, and predicts itself."""

import dataclasses
import gzip
import json
import subprocess
import sys

import pytest

from slidetune import files
from slidetune.builder import build
from slidetune.errors import BadFile
from slidetune.machines import machine
from slidetune.models import load_model
from slidetune.plans import Plan
from slidetune.traces.recorded import digest, load_run, recorded_runs, run_name, save_run, typical_step
from slidetune.validating import compare_with, measured_rows, predict_again, validate_recorded

from .runs import as_if_run

PROFILE = machine("rtx4090")


def test_a_run_comes_back_as_it_was(spilled, tmp_path):
    path = tmp_path / "one.json.gz"
    written = save_run(path, as_if_run(spilled), PROFILE, "here")
    assert load_run(path) == written
    assert written.profile == "here.yaml"
    assert run_name(path) == "one"
    assert {file.name for file in tmp_path.iterdir()} == {"one.json.gz", "here.yaml"}


def test_the_same_run_is_the_same_file(plain, tmp_path):
    for name in "ab":
        save_run(tmp_path / f"{name}.json.gz", as_if_run(plain), PROFILE, "here")
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()


def test_thousands_of_tasks_are_small(deep, tmp_path):
    path = tmp_path / "deep.json.gz"
    save_run(path, as_if_run(deep), PROFILE, "here")
    assert len(deep.trace) > 5000
    assert path.stat().st_size < 60_000


def test_profiles_are_shared_and_never_overwritten(plain, tmp_path):
    other = machine("rtx3090")

    def saved(name, profile):
        return save_run(tmp_path / f"{name}.json.gz", as_if_run(plain), profile, "here").profile

    assert saved(1, PROFILE) == saved(2, PROFILE) == "here.yaml"
    third = saved(3, other)
    assert saved(4, other) == third != "here.yaml"
    assert files.read(tmp_path / third, type(other)) == other


def test_recorded_runs_are_predicted_again_from_their_files_alone(plain, tmp_path):
    for stretch in (1.0, 1.25):
        save_run(tmp_path / f"{stretch}.json.gz", as_if_run(plain, stretch=stretch), PROFILE, "here")
    first, second = validate_recorded(tmp_path).runs
    assert first.step.error == pytest.approx(0, abs=1e-9)
    assert second.step.error == pytest.approx(-0.2)
    assert second.lanes["gpu"].error == pytest.approx(-0.2, abs=1e-3)
    assert first.memory["gpu"].error == 0


def test_predicting_again_needs_no_torch(plain, tmp_path):
    save_run(tmp_path / "run.json.gz", as_if_run(plain), PROFILE, "here")
    code = "import sys, slidetune; slidetune.validate_recorded('.'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60, check=False).returncode == 0


def test_rows_come_back_to_the_microsecond(spilled):
    run = as_if_run(spilled)
    rows = {row.task: row for row in measured_rows(spilled.schedule, run.measured)}
    assert len(rows) == len(spilled.trace)
    for row in spilled.trace:
        back = rows[row.task]
        assert (back.op, back.unit, back.lane, back.bytes) == (row.op, row.unit, row.lane, row.bytes)
        assert back.start_s == pytest.approx(row.start_s, abs=2e-6)
        assert back.end_s == pytest.approx(row.end_s, abs=2e-6)
        assert back.ready_s <= back.start_s


def test_kernels_and_cap_of_the_run_count(plain):
    run = as_if_run(plain, Plan(model="llama-3.1-8b", micro_batch=8, gpu_memory_gib=20))
    capped = predict_again(run, PROFILE)
    assert capped.memory["gpu"].capacity_bytes < PROFILE.capacity_bytes("gpu")
    fused = predict_again(dataclasses.replace(run, kernels="liger"), PROFILE)
    assert fused.step_s < capped.step_s


def test_a_schedule_that_has_changed_leaves_lanes_out(plain, spilled):
    found = compare_with(spilled, as_if_run(plain))
    assert found.lanes == {}
    assert "lanes are not compared" in found.notes[0]
    assert found.step.error is not None


def test_the_digest_is_of_the_tasks_names():
    model = load_model("gpt2")
    one, other = (build(model, Plan(model="gpt2", micro_batch=batch)) for batch in (1, 2))
    assert digest(one) == digest(other)
    assert digest(one) != digest(build(model, Plan(model="gpt2", accumulation=2)))


def test_the_typical_step_is_the_nearest_to_the_median(plain):
    rows = [
        row._replace(step=step, start_s=k * row.start_s, end_s=k * row.end_s)
        for step, k in enumerate([1.0, 1.1, 5.0], start=3)
        for row in plain.trace
    ]
    starts, ends = typical_step(plain.schedule, rows, 1.12 * plain.step_s)
    last = max(task for task, t in enumerate(plain.schedule.tasks) if t.work.lane == "gpu")
    assert ends[last] == pytest.approx(1.1e6 * plain.step_s, abs=1)
    assert len(starts) == len(ends) == len(plain.schedule.tasks)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no archive", "no recorded run"),
        (gzip.compress(b"[1]"), "version 1"),
        (gzip.compress(json.dumps({"version": 2}).encode()), "version 1"),
        (gzip.compress(json.dumps({"version": 1, "name": 3}).encode()), "name"),
    ],
    # An archive holds the time it was made: no two test processes would give it one name.
    ids=["no archive", "no mapping", "another version", "a field of another type"],
)
def test_what_is_no_recorded_run_says_so(tmp_path, content, says):
    path = tmp_path / "bad.json.gz"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=says):
        load_run(path)


def test_a_folder_without_runs(tmp_path):
    with pytest.raises(BadFile, match="no recorded runs"):
        recorded_runs(tmp_path)
    with pytest.raises(BadFile, match="no such folder"):
        recorded_runs(tmp_path / "nowhere")
