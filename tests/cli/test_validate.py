"""`slidetune validate`: one plan and a grid of them on the CPU, end to end; recorded runs without running anything."""

from __future__ import annotations

import json

import pytest

from slidetune import files
from slidetune.builder import build
from slidetune.machines import machine
from slidetune.models import load_model
from slidetune.plan_file import write_plan
from slidetune.plans import Plan
from slidetune.simulator.predict import predict
from slidetune.traces.recorded import load_run, save_run

from ..traces.runs import as_if_run
from .commands import slidetune
from .test_run import CONFIG

PROFILE = machine("rtx4090", cores=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tiny models, a plan for one of them, and a profile of a machine."""
    folder = tmp_path_factory.mktemp("validate")
    for name, layers in (("small", 3), ("smaller", 2)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    write_plan(folder / "plan.yaml", Plan(model="small", seq_len=32, adam_threads=1))
    files.write(folder / "profile.yaml", PROFILE)
    return folder


def refused(*arguments, cwd, saying):
    ran = slidetune("validate", *arguments, cwd=cwd)
    assert ran.code == 2, ran.out
    assert saying in ran.words


# --- One plan


def test_a_plan_is_predicted_run_recorded_and_drawn(folder):
    pytest.importorskip("torch")
    asked = ("validate", "plan.yaml", "--device", "cpu", "--steps", 2)
    asked += ("--record", "run.json.gz", "--output", "page", "--json")
    ran = slidetune(*asked, cwd=folder)
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert len(found["step_s"]) == 2
    assert len(found["losses"]) == 5  # Two to warm up and one after.
    step = found["step_time"]
    assert step["error"] == pytest.approx(step["predicted_s"] / step["measured_s"] - 1)
    for lane, beside in found["lanes"].items():
        kinds = [kind for kind in found["kinds"] if kind["lane"] == lane]
        assert beside["measured_s"] == pytest.approx(sum(kind["measured_s"] for kind in kinds))
    assert found["memory"]["gpu"]["measured_bytes"] is None
    assert found["memory"]["ram"]["measured_bytes"] > 10**8
    assert (folder / "page" / "validation.png").exists()
    assert "Predicted and measured" in (folder / "page" / "index.html").read_text()

    run = load_run(folder / "run.json.gz")
    assert (run.name, run.device, run.profile) == ("run", "cpu", "profile.yaml")
    again = slidetune("validate", "--recorded", ".", "--json", cwd=folder)
    assert again.code == 0, again.err
    (one,) = json.loads(again.out)["runs"]
    assert one["step_time"]["error"] == pytest.approx(step["error"])
    assert one["lanes"].keys() == found["lanes"].keys()
    for lane, beside in one["lanes"].items():
        assert beside == pytest.approx(found["lanes"][lane])


def test_a_page_for_people(folder):
    pytest.importorskip("torch")
    ran = slidetune("validate", "plan.yaml", "--device", "cpu", "--steps", 1, cwd=folder)
    assert ran.code == 0, ran.err
    assert "GPU compute: backward" in ran.words
    assert "not measured" in ran.words
    assert "GPU memory, peak" in ran.words


def test_what_must_be_said(folder, tmp_path):
    refused(cwd=folder, saying="nothing to validate")
    refused("plan.yaml", "--recorded", ".", cwd=folder, saying="can't be given together")
    refused("plan.yaml", "--max-median", 0.1, cwd=folder, saying="--max-median goes with --recorded")
    refused("--grid", "grid.yaml", cwd=folder, saying="--record DIR")
    refused("plan.yaml", "--record", "run.txt", cwd=folder, saying="NAME.json.gz")
    refused(folder / "plan.yaml", cwd=tmp_path, saying="`slidetune profile` measures the machine")


def test_what_would_fit_is_said_in_this_commands_words(folder):
    pytest.importorskip("torch")
    plan = Plan(model="small", seq_len=32, adam_threads=1, window=2, optimizer_nvme=1)
    write_plan(folder / "nvme.yaml", plan)
    files.write(folder / "no-drive.yaml", machine("rtx4090", cores=2, nvme="none"))
    ran = slidetune("validate", "nvme.yaml", "--profile", "no-drive.yaml", cwd=folder)
    assert ran.code == 2
    assert "slidetune profile --nvme-dir DIR" in ran.words
    assert "--nvme 0" not in ran.words


def test_a_model_that_is_not_there(folder):
    pytest.importorskip("torch")
    refused("plan.yaml", "--model", "m/nope", cwd=folder, saying="m/nope: there is no such directory")


# --- A grid


def test_a_grid_runs_to_its_end_whatever_fails(folder):
    pytest.importorskip("torch")
    (folder / "grid.yaml").write_text(
        """
        cases:
        - {model: small, batch: 2, seq_len: 32, name: tuned}
        - {model: smaller, seq_len: 32, batch: 2, accumulation: 2, window: 2, activations: {gpu: 1}, adam_threads: 1}
        - {model: small, seq_len: 100, name: too-long}
        - {model: small, seq_len: 32, batch: 1, kernels: liger, name: crashes}
        """
    )
    asked = ("validate", "--grid", "grid.yaml", "--record", "runs", "--device", "cpu", "--steps", 1)
    ran = slidetune(*asked, "--json", cwd=folder)
    assert ran.code == 1
    found = json.loads(ran.out)
    second = "smaller-seq_len-32-batch-2-accumulation-2-window-2-activations-gpu-1-adam_threads-1"
    assert [run["name"] for run in found["runs"]] == ["tuned", second]
    assert found["step_time_error"]["runs"] == 2
    failures = {failure["name"]: failure["error"] for failure in found["failures"]}
    assert "64 positions" in failures["too-long"]
    assert "CUDA" in failures["crashes"]
    assert json.loads((folder / "runs" / "failures.json").read_text()) == found["failures"]

    plan = load_run(folder / "runs" / f"{second}.json.gz").plan
    assert (plan.micro_batch, plan.accumulation, plan.window, plan.prefetch <= 1) == (1, 2, 2, True)
    assert plan.activations.gpu == 1
    predictions = {one["name"]: one for one in json.loads((folder / "runs" / "predictions.json").read_text())}
    assert predictions.keys() == {"tuned", second, "crashes"}
    for run in found["runs"]:
        assert predictions[run["name"]]["step_s"] == pytest.approx(run["step_time"]["predicted_s"])

    # What is recorded is not run again, and without time nothing is started.
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "runs").glob("*.json.gz")}
    ran = slidetune(*asked, "--budget-s", 0, cwd=folder)
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "runs").glob("*.json.gz")} == before
    assert "Not started, for want of time: crashes" in ran.words
    assert "tuned" in ran.words


def test_a_case_that_hangs_is_ended_and_a_slow_one_is_not(folder, monkeypatch):
    from slidetune import apart, grid

    limits = []

    def run(*_, timeout_s):
        limits.append(timeout_s)
        return apart.Ended(error="ended after a while")

    monkeypatch.setattr(apart, "run", run)
    monkeypatch.setattr(apart, "get_ready", lambda: None)
    monkeypatch.chdir(folder)
    (folder / "hangs.yaml").write_text("cases: [{plan: plan.yaml, name: hangs}]")
    found = grid.validate_grid("hangs.yaml", "profile.yaml", "hung", steps=1)
    assert found.failures == [grid.Failure("hangs", "ended after a while")]
    (foreseen,) = json.loads((folder / "hung" / "predictions.json").read_text())
    assert limits == [pytest.approx(grid.CASE_S + 4 * grid.MOST_TIMES_PREDICTED * foreseen["step_s"])]


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ("cases: []", "has no cases"),
        ("cases:\n- {model: small, windw: 3}", "case 1: windw is not a known field. Did you mean window?"),
        ("cases:\n- {batch: 3}", "case 1: give either a model or a plan"),
        ("cases:\n- {plan: plan.yaml, batch: 3}", "batch goes with model"),
        ("cases:\n- {model: small, micro_batch: many}", "case 1: micro_batch is 'many'"),
        ("cases:\n- {model: small, ram_gib: much}", "case 1: ram_gib is 'much'"),
        ("cases:\n- {model: small, batch: 5, micro_batch: 2}", "micro_batch (2) times accumulation (2) is not"),
        ("cases:\n- {model: small}\n- {model: small}", "two cases are called small"),
    ],
)
def test_a_grid_with_a_fault_names_it_before_anything_runs(tmp_path, grid, says):
    from slidetune.errors import BadFile
    from slidetune.grid import read_grid

    (tmp_path / "grid.yaml").write_text(grid)
    with pytest.raises(BadFile) as caught:
        read_grid(tmp_path / "grid.yaml")
    assert says in " ".join(str(caught.value).split())


# --- Recorded runs


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Three runs whose steps took 2, 4 and 10 % longer than predicted."""
    folder = tmp_path_factory.mktemp("recorded")
    plan = Plan(model="gpt2", micro_batch=2)
    prediction = predict(build(load_model("gpt2"), plan), PROFILE)
    for percent in (2, 4, 10):
        run = as_if_run(prediction, plan, stretch=1 + percent / 100, name=f"longer-by-{percent}")
        save_run(folder / f"{run.name}.json.gz", run, PROFILE, "there")
    return folder


def test_recorded_runs_are_summed_up(recorded):
    ran = slidetune("validate", "--recorded", recorded, "--json", cwd=recorded)
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["step_time_error"]["median"] == pytest.approx(1 - 1 / 1.04)
    assert found["step_time_error"]["worst"] == pytest.approx(1 - 1 / 1.1)
    assert {run["name"]: round(run["step_time_error"], 3) for run in found["runs"]} == {
        "longer-by-10": -0.091,
        "longer-by-2": -0.020,
        "longer-by-4": -0.038,
    }
    assert found["gpu_peak_error"]["worst"] == found["ram_error"]["worst"] == 0
    assert found["lane_errors"]["gpu"]["worst"] == pytest.approx(1 - 1 / 1.1, abs=1e-3)
    assert all(run["lanes"]["gpu"]["error"] < 0 for run in found["runs"])


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ((), 0),
        (("--max-median", 0.05, "--max-p95", 0.1), 0),
        (("--max-median", 0.03), 1),
        (("--max-median", 0.05, "--max-p95", 0.08), 1),
    ],
)
def test_beyond_a_limit_the_command_fails(recorded, limits, code):
    ran = slidetune("validate", "--recorded", recorded, *limits, cwd=recorded)
    assert ran.code == code, ran.err
    assert ("Beyond the limit" in ran.err) == bool(code)
    assert "longer-by-4" in ran.words
    assert "step time" in ran.words


def test_no_recorded_runs(tmp_path):
    refused("--recorded", "nowhere", cwd=tmp_path, saying="no such folder")
