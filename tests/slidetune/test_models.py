"""The offline catalog against transformers and published totals; every way to name a model."""

from __future__ import annotations

import json
import re
import sys
import types

import pytest

from slidetune.errors import BadFile, SlidetuneError, UnknownName
from slidetune.models import catalog_row, load_model, model_names

from .reference import SMALL_CONFIGS, count, on_meta

LLAMA = SMALL_CONFIGS["llama"]


def test_the_catalog_holds_real_models_from_half_a_billion_to_123_billion():
    sizes = [load_model(name).params for name in model_names() if not name.startswith("gpt2")]
    assert len(sizes) >= 34
    assert min(sizes) == pytest.approx(0.5e9, rel=0.02)
    assert max(sizes) == pytest.approx(123e9, rel=0.01)


@pytest.mark.parametrize("name", model_names())
def test_a_catalog_model_has_the_published_parameters_and_those_of_the_real_module(name):
    row = catalog_row(name)
    config = {field: value for field, value in row.items() if field not in ("hub", "params")}
    spec = load_model(name)
    assert spec.name == name
    assert spec.params == row["params"]
    assert spec.params == count(on_meta(config))


@pytest.mark.parametrize("name", model_names())
def test_a_catalog_model_answers_to_its_hub_id_in_any_case(name):
    assert re.fullmatch(r"[a-z0-9.-]+", name)
    assert load_model(catalog_row(name)["hub"]) == load_model(name)
    assert load_model(catalog_row(name)["hub"].lower()) == load_model(name)
    assert load_model(name.upper()) == load_model(name)


@pytest.mark.parametrize(
    ("name", "active"),
    # Published: 3.3 B active of Qwen3-30B-A3B (embedding included), 12.9 B of Mixtral (likewise).
    [("qwen3-30b-a3b", 3.3e9), ("mixtral-8x7b", 12.9e9), ("gpt-oss-20b", 3.6e9), ("gpt-oss-120b", 5.1e9)],
)
def test_active_parameters_are_near_the_published_ones(name, active):
    spec = load_model(name)
    counted = spec.active_params + (0 if name.startswith("gpt-oss") else spec.embedding.params)
    assert counted == pytest.approx(active, rel=0.02)


def test_a_config_file_and_its_directory_give_the_same_model(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA))
    assert load_model(str(file)) == load_model(str(tmp_path))
    # The name leads back to the model.
    assert load_model(load_model(str(tmp_path)).name).params == load_model(str(file)).params


def test_an_unknown_name_suggests_near_ones():
    with pytest.raises(UnknownName) as caught:
        load_model("lama-3.1-8b")
    assert "llama-3.1-8b" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "not a config"),
        (json.dumps({**LLAMA, "vocab_size": "many"}), "vocab_size"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_bad_config_file_is_named(tmp_path, content, says):
    file = tmp_path / "config.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadFile) as caught:
        load_model(str(file))
    assert str(file) in caught.value.message
    assert says in caught.value.message


def test_a_path_without_a_config_is_refused(tmp_path):
    with pytest.raises(BadFile, match=r"no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(BadFile, match="no such file"):
        load_model(str(tmp_path / "other.json"))


def hub(monkeypatch, answer):
    """Puts `answer(hub_id)` in place of the hub."""
    fake = types.SimpleNamespace(AutoConfig=types.SimpleNamespace(from_pretrained=answer))
    monkeypatch.setitem(sys.modules, "transformers", fake)


def test_a_hub_id_is_read_through_transformers(monkeypatch):
    hub(monkeypatch, lambda ref: types.SimpleNamespace(to_dict=lambda: LLAMA))
    spec = load_model("someone/their-llama")
    assert spec.name == "someone/their-llama"
    assert spec.family == "llama"


def test_a_hub_that_does_not_answer_is_said_so(monkeypatch):
    def refuse(ref):
        raise OSError(f"We couldn't connect to the hub for {ref}.\nMore lines follow.")

    hub(monkeypatch, refuse)
    with pytest.raises(SlidetuneError) as caught:
        load_model("someone/their-llama")
    assert "couldn't connect" in caught.value.message
    assert "More lines" not in caught.value.message
    assert "config.json" in caught.value.hint


def test_a_hub_id_without_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SlidetuneError, match="needs transformers") as caught:
        load_model("someone/their-llama")
    assert "slidetune[runtime]" in caught.value.hint
