"""The README's section on fine-tuning: its commands are taken, and its Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from slidetune.cli.app import app
from slidetune.recipe import read_recipe, write_recipe
from slidetune.runtime.checkpoint import latest

from ..runtime.small_training import put_rows, small_recipe

SECTION = re.search(
    r"## Fine-tune your own data\n(.*?)\n## ",
    (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8"),
    re.DOTALL,
)[1]
COMMANDS = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^    (slidetune .*)$", SECTION, re.MULTILINE)]


def run(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in which the recipe of the README is one for a small model, a small plan and four steps."""
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(tmp_path)
    put_rows(tmp_path / "chats.jsonl", [{"prompt": f"{n} and one?", "completion": f" {n + 1}"} for n in range(400)])
    changes = {"model": recipe.model, "plan": recipe.plan, "device": "cpu", "steps": "4", "held-out": "0.1"}
    return tmp_path, [text for name, value in changes.items() for text in (f"--{name}", value)]


def test_the_commands(folder):
    here, changes = folder
    assert [command[0] for command in COMMANDS] == ["profile", "init", "train", "train", "export"]
    _, init, train, resumed, export = COMMANDS
    run(init)
    assert read_recipe("recipe.yaml").data.source == "chats.jsonl"
    for command in (train, resumed):
        run([*command, *changes])
    run(export)
    assert (here / "trained" / "model" / "config.json").is_file()
    assert (here / "model-fp32" / "config.json").is_file()


def test_flags_that_are_named_are_flags(folder):
    _, changes = folder
    (flags,) = re.findall(r"flag of `train`:\s+`(.*?)`", SECTION)
    run(["train", *changes, *shlex.split(flags), "--data", "chats.jsonl"])


def test_the_python(folder):
    here, _ = folder
    write_recipe("recipe.yaml", small_recipe(here, steps=20, evaluate_every=1, lr=1.0))
    (code,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    found: dict = {}
    exec(code, found)
    assert found["trained"].ended == "what is held out gets worse"
    assert found["trained"].checkpoint == latest(here / "out")
