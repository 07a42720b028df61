"""`slidetune init`: a commented recipe."""

import dataclasses

import pytest
import typer
from typer.main import get_command

from slidetune.cli.app import app
from slidetune.recipe import Data, Recipe, read_recipe

from .commands import refused, slidetune


def test_without_a_word_it_writes_one_to_edit_and_says_what_it_assumed(tmp_path):
    ran = slidetune("init", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "Written: recipe.yaml" in ran.words
    assert "Assumed: llama-3.1-8b (--model), data.jsonl (--data), epochs 1 (--epochs)" in ran.words
    expected = Recipe(model="llama-3.1-8b", data=Data(source="data.jsonl"), epochs=1.0)
    assert read_recipe(tmp_path / "recipe.yaml") == expected
    assert "# Adam's epsilon" in (tmp_path / "recipe.yaml").read_text()


EVERY_FLAG = (
    *("--model", "some/model", "--data", "rows", "--split", "a", "--held-out", "0.02", "--max-faulty", "0.5"),
    *("--no-packed", "--no-assistant-only", "--chat-template", "c.jinja", "--plan", "p.yaml", "--seq-len", "512"),
    *("--batch", "12", "--lr", "1e-4", "--schedule", "wsd", "--warm-up-steps", "3", "--decay-share", "0.3"),
    *("--weight-decay", "0.1", "--betas", "0.8", "0.95", "--eps", "1e-6", "--clip-norm", "1", "--steps", "70"),
    *("--seed", "5", "--evaluate-every", "10", "--save-every", "20", "--keep", "4", "--log", "l", "--output", "o"),
    *("--report", "tensorboard", "--report", "wandb"),
    *("--device", "cpu", "--nvme-dir", "n", "--trust-remote-code"),
)


def test_every_field_is_a_flag(tmp_path):
    ran = slidetune("init", "mine.yaml", *EVERY_FLAG, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "Assumed" not in ran.words
    assert read_recipe(tmp_path / "mine.yaml") == Recipe(
        model="some/model",
        data=Data(
            source="rows",
            split="a",
            held_out=0.02,
            max_faulty=0.5,
            packed=False,
            assistant_only=False,
            chat_template="c.jinja",
        ),
        plan="p.yaml",
        seq_len=512,
        batch=12,
        lr=1e-4,
        schedule="wsd",
        warm_up_steps=3,
        decay_share=0.3,
        weight_decay=0.1,
        betas=(0.8, 0.95),
        eps=1e-6,
        clip_norm=1.0,
        steps=70,
        seed=5,
        evaluate_every=10,
        save_every=20,
        keep=4,
        log="l",
        report=("tensorboard", "wandb"),
        output="o",
        device="cpu",
        nvme_dir="n",
        trust_remote_code=True,
    )


def test_the_flags_are_the_fields():
    command = get_command(app).commands["init"]
    flags = {option.name for option in command.params if not isinstance(option, typer.core.TyperArgument)}
    fields = {field.name for cls in (Recipe, Data) for field in dataclasses.fields(cls)} - {"source"}
    assert flags - {"force", "help"} == fields


def test_a_file_that_is_there_stays_unless_forced(tmp_path):
    (tmp_path / "recipe.yaml").write_text("precious")
    refused("init", cwd=tmp_path, saying="recipe.yaml: is there already.*--force")
    assert (tmp_path / "recipe.yaml").read_text() == "precious"
    assert slidetune("init", "--force", cwd=tmp_path).code == 0
    assert read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [
        (("--held-out", "2", "--lr", "0"), "lr must be a number above 0.*data.held_out must be from 0 to less than 1"),
        (("--steps", "10", "--epochs", "1"), "either steps or epochs"),
        (("--schedule", "cosin"), "schedule is 'cosin'; allowed: constant, linear, cosine, wsd"),
        (("--lr", "fast"), "--lr"),
        (("--warm-up", "3"), "--warm-up-steps"),
        (("nowhere/recipe.yaml",), "there is no directory nowhere"),
        ((".",), "is a directory"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_written(tmp_path, arguments, saying):
    refused("init", *arguments, cwd=tmp_path, saying=saying)
    assert not list(tmp_path.iterdir())
