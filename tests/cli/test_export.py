"""`slidetune export`: what a training leaves becomes a model that transformers reads."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import slidetune
from slidetune.cli.app import app
from slidetune.runtime.checkpoint import latest

from ..runtime.small_training import same, small_recipe
from .commands import refused


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    recipe = small_recipe(folder, steps=2)
    (folder / "model" / "generation_config.json").write_text('{"temperature": 0.5}')
    return slidetune.Trainer(recipe).fit()


def export(*arguments):
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_of_a_run_its_last_checkpoint_is_taken(trained, tmp_path):
    said = export(trained.checkpoint.parent, "-o", tmp_path / "a")
    assert str(trained.checkpoint) in said.replace("\n", "")
    assert same(weights(tmp_path / "a"), weights(trained.model))
    assert "0.5" in (tmp_path / "a" / "generation_config.json").read_text()


def test_fp32_is_the_optimizers(trained, tmp_path):
    export(latest(trained.checkpoint.parent), "-o", tmp_path / "a", "--dtype", "fp32")
    found, rounded = weights(tmp_path / "a"), weights(trained.model)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert same({name: value.bfloat16() for name, value in found.items()}, rounded)
    assert not same({name: value.bfloat16().float() for name, value in found.items()}, found)


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [
        (("nowhere", "-o", "out"), "nowhere: no checkpoint is here"),
        (("{run}", "-o", "out", "--dtype", "int4"), "dtype must be one of bf16, fp32"),
        (("{run}", "-o", "{run}/plan.yaml"), "is a file"),
        (("{run}",), "--output"),
    ],
)
def test_mistakes_are_refused(trained, tmp_path, arguments, saying):
    run = str(trained.checkpoint.parent)
    refused("export", *(text.format(run=run) for text in arguments), cwd=tmp_path, saying=saying)
    assert not (tmp_path / "out").exists()
