"""`slidetune train` on the CPU, end to end."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import typer
from typer.main import get_command
from typer.testing import CliRunner

from slidetune import files
from slidetune.cli import train as page
from slidetune.cli.app import app
from slidetune.errors import SlidetuneError
from slidetune.machines import machine
from slidetune.recipe import Data, Recipe, write_recipe
from slidetune.runtime.checkpoint import latest, read_manifest
from slidetune.runtime.training.callbacks import StepDone

from ..runtime.small_training import events, small_recipe
from .commands import refused, slidetune


@pytest.fixture
def recipe(tmp_path):
    found = small_recipe(tmp_path, steps=3)
    write_recipe(tmp_path / "recipe.yaml", found)
    return found


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def call(*arguments, code=0):
        result = CliRunner().invoke(app, ["train", *map(str, arguments)])
        if isinstance(result.exception, SlidetuneError):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    yield call
    torch.set_num_threads(threads)


def test_a_page(call, recipe):
    ran = call("recipe.yaml")
    assert "in 3 steps" in ran.stdout
    assert "held out" in ran.stdout
    assert f"Written: {recipe.output}/model" in ran.stdout
    assert "4 sequences a step (micro_batch 2 x accumulation 2), 64 tokens a step" in ran.stderr
    assert "To be written" in ran.stderr
    assert "step 3 of 3  loss" in ran.stderr


def test_flags_change_the_recipe(call, recipe, tmp_path):
    flags = ("--steps", 2, "--lr", "1e-4", "--held-out", 0, "--warm-up-steps", 0, "--output", "other", "--json")
    found = json.loads(call("recipe.yaml", *flags).stdout)
    assert (found["step"], found["model"], found["evaluations"]) == (2, "other/model", [])
    (start,) = events(dataclasses.replace(recipe, output=str(tmp_path / "other")), "start")
    assert start["recipe"]["lr"] == 1e-4


def test_without_a_file_flags_are_the_recipe(call, recipe):
    flags = ("--model", recipe.model, "--data", recipe.data.source, "--plan", recipe.plan, "--device", "cpu")
    found = json.loads(call(*flags, "--steps", 1, "--json").stdout)
    assert (found["ended"], found["model"]) == ("finished", "trained/model")


def test_again_it_is_refused_and_resumed_it_goes_on(call, recipe):
    call("recipe.yaml", "--json")
    with pytest.raises(SlidetuneError, match="holds checkpoints already"):
        call("recipe.yaml")
    assert "All 3 steps were made before" in call("recipe.yaml", "--resume").stdout
    more = json.loads(call("recipe.yaml", "--resume", "--steps", 4, "--json").stdout)
    assert (more["first_step"], more["step"]) == (4, 4)


def test_a_plan_is_made_and_a_prediction_stands_beside(call, recipe, tmp_path):
    """The machine is a GPU's; what is planned for it that a CPU can't do would be refused."""
    files.write(tmp_path / "profile.yaml", machine("rtx4090", ram_gib=16, nvme="none"))
    found = call("recipe.yaml", "--plan", "auto", "--seq-len", 16, "--batch", 2, "--clip-norm", 1, "--device", "cpu")
    assert "Predicted from rtx4090" in found.stderr
    assert "for 3 steps" in found.stderr
    assert "(predicted " in found.stderr
    assert "norm " in found.stderr
    (start,) = events(recipe, "start")
    assert start["predicted_step_s"] > 0
    assert start["plan"]["micro_batch"] * start["plan"]["accumulation"] == 2
    # A run that goes on follows the plan that was made.
    call("recipe.yaml", "--plan", "auto", "--clip-norm", 1, "--resume", "--steps", 4)
    assert events(recipe, "start")[1]["plan"] == start["plan"]


def test_the_flags_are_the_fields():
    command = get_command(app).commands["train"]
    flags = {option.name for option in command.params if not isinstance(option, typer.core.TyperArgument)}
    fields = {field.name for cls in (Recipe, Data) for field in dataclasses.fields(cls)} - {"source"}
    assert flags - {"resume", "profile", "json", "help"} == fields


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [
        ((), "there is nothing to train by.*slidetune init"),
        (("nothing.yaml",), "nothing.yaml: no such file"),
        (("recipe.yaml", "--report", "tensorboard", "--report", "pigeon"), "report is tensorboard, pigeon; allowed"),
        (("recipe.yaml", "--lr", "-1"), "lr must be a number above 0"),
        (("recipe.yaml", "--profile", "nothing"), "nothing"),
    ],
)
def test_mistakes_are_refused(recipe, tmp_path, arguments, saying):
    refused("train", *arguments, cwd=tmp_path, saying=saying)


def test_a_library_that_is_asked_for_and_missing_is_refused_first(call, recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SlidetuneError, match="reports to wandb, which can't be imported"):
        call("recipe.yaml", "--report", "wandb")
    assert latest(recipe.output) is None


def test_progress_says_what_is_known():
    done = StepDone(
        step=3,
        total_steps=9,
        epoch=0.1,
        loss=1.25,
        lr=1e-5,
        grad_norm=0.5,
        step_s=2.0,
        waited_s=0.0,
        tokens=4096,
        left_s=7300.0,
        predicted_tokens_per_s=2100.0,
        nvme_written_bytes=0,
        peak_bytes={"gpu": 2**30, "page_locked": 0, "ram": 2**31, "nvme": 2**32},
    )
    assert page.progress_text(done) == (
        "loss 1.2500  lr 1.00e-05  norm 0.5  2,048 tokens/s (predicted 2,100)  2 h 1 min left  "
        "GPU 1 GiB  RAM 2 GiB  NVMe 4 GiB"
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(tmp_path, number, code):
    """As the system sends it to a process."""
    recipe = small_recipe(tmp_path, steps=100_000)
    write_recipe(tmp_path / "recipe.yaml", recipe)
    command = [sys.executable, "-m", "slidetune", "train", "recipe.yaml"]
    run = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    with run:
        log = tmp_path / "out" / "log.jsonl"
        while run.poll() is None and not (log.exists() and '"event": "step"' in log.read_text()):
            time.sleep(0.05)
        run.send_signal(number)
        out, err = run.communicate(timeout=100)
    assert run.returncode == code, err
    assert "Stopping after this step; a checkpoint is saved then" in err
    assert "--resume goes on from there" in out
    made = len(events(recipe, "step"))
    assert read_manifest(latest(recipe.output)).extra["step"] == made
    assert events(recipe, "end")[0]["ended"] == number.name


def test_help_names_it(tmp_path):
    ran = slidetune("--help", cwd=tmp_path)
    assert all(name in ran.words for name in ("init", "train", "export"))
