"""The command itself: help, version, and what is no command."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import slidetune as package
from slidetune.cli import lists
from slidetune.cli.app import app

from .commands import refused, slidetune

COMMANDS = ("plan", "simulate", "report", "fit", "gpus", "models", "schema")


def test_help_names_every_command(tmp_path):
    ran = slidetune("--help", cwd=tmp_path)
    assert ran.code == 0
    assert all(f" {command} " in ran.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(tmp_path, command):
    ran = slidetune(command, "--help", cwd=tmp_path)
    assert ran.code == 0
    assert f"slidetune {command}" in ran.words
    assert "--help" in ran.out


def test_version(tmp_path):
    ran = slidetune("--version", cwd=tmp_path)
    assert (ran.code, ran.out.strip()) == (0, package.__version__)


def test_the_entry_point_is_the_same(tmp_path):
    script = Path(sys.executable).with_name("slidetune")
    if not script.exists():
        pytest.skip("not installed as a script beside this interpreter")
    out = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    assert out == slidetune("--version", cwd=tmp_path).out


def test_no_command_is_a_mistake_that_shows_help(tmp_path):
    refused(cwd=tmp_path, saying="Usage")


def test_an_unknown_command_suggests_a_near_one(tmp_path):
    refused("plann", cwd=tmp_path, saying="Did you mean 'plan'")


def test_an_unknown_option_suggests_a_near_one(tmp_path):
    refused("plan", "--gpuu", "rtx4090", cwd=tmp_path, saying="--gpu")


@pytest.mark.parametrize("command", sorted(get_command(app).commands))
def test_defaults_that_help_names_are_shown(command):
    """What is in brackets rich takes for a style, and leaves out, unless it is escaped."""
    said = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400", "NO_COLOR": "1"}).output
    helps = [option.help for option in get_command(app).commands[command].params if getattr(option, "help", None)]
    for default in (text[text.index("default:") :] for text in helps if "default:" in text):
        assert default in said


def test_ctrl_c_is_said(monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(lists, "load_model", interrupted)
    ended = CliRunner().invoke(app, ["models"])
    assert (ended.exit_code, ended.stderr) == (130, "Stopped.\n")
