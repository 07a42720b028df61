"""The machine that `plan: auto` takes where no profile of it is here."""

import dataclasses
import types

import pytest

torch = pytest.importorskip("torch")

from slidetune.errors import SlidetuneError
from slidetune.recipe import Data, Recipe
from slidetune.runtime import trainer
from slidetune.training import Trainer, _guessed_machine
from slidetune.units import GIB

RECIPE = Recipe(model="m", data=Data(source="d"), steps=1)


@pytest.fixture
def card(monkeypatch):
    """The GPU that torch sees."""

    def put(name, memory_gib):
        found = types.SimpleNamespace(name=name, total_memory=int(memory_gib * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        monkeypatch.setattr(trainer, "chosen_device", lambda device: torch.device("cuda", 0))

    return put


def test_a_card_of_the_catalog_with_the_ram_and_cores_that_are_here(card):
    card("NVIDIA GeForce RTX 4090", 23.6)
    found = _guessed_machine(RECIPE)
    assert found.gpu.name == "GeForce RTX 4090"
    assert found.name == "the catalog's guess of GeForce RTX 4090"
    assert found.host.ram_gib.value == pytest.approx(trainer.arena.available_bytes() / GIB, rel=0.2)
    assert found.host.cores.value >= 1
    assert found.nvme is None, "where temporary files go may be RAM"


def test_a_drive_counts_where_its_folder_is_named(card, tmp_path):
    card("NVIDIA GeForce RTX 4090", 23.6)
    found = _guessed_machine(dataclasses.replace(RECIPE, nvme_dir=str(tmp_path)))
    assert found.nvme.size_gb.value > 0


def test_a_card_that_nobody_knows_is_measured_first(card):
    card("Somebody's GPU", 23.6)
    with pytest.raises(SlidetuneError, match="Somebody's GPU is not in the catalog") as caught:
        _guessed_machine(RECIPE)
    assert "slidetune profile --device cuda:0" in caught.value.hint


def test_a_recipe_that_is_none_is_refused_at_once():
    with pytest.raises(SlidetuneError, match="this is no recipe to train by: give either steps or epochs"):
        Trainer(dataclasses.replace(RECIPE, steps=None))
