"""`slidetune gpus`, `models` and `schema`."""

import json

import pytest

from slidetune.machines import gpu_names
from slidetune.models import model_names
from slidetune.plans import Plan, knobs

from .commands import refused, slidetune


@pytest.mark.parametrize(("command", "names"), [("gpus", gpu_names()), ("models", model_names())])
def test_every_name_stands_whole_on_a_line_of_its_own(tmp_path, command, names):
    ran = slidetune(command, cwd=tmp_path, columns=80)
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == names
    assert max(map(len, lines)) <= 80
    assert "…" not in ran.out
    assert "e+" not in ran.out


def test_gpus_as_json_have_the_source_of_every_figure(tmp_path):
    found = json.loads(slidetune("gpus", "--json", cwd=tmp_path).out)
    assert list(found) == gpu_names()
    for gpu in found.values():
        figures = [value for value in gpu.values() if isinstance(value, dict)]
        assert len(figures) >= 6
        assert all(figure["kind"] and figure["source"] and figure["value"] >= 0 for figure in figures)


def test_models_as_json(tmp_path):
    found = json.loads(slidetune("models", "--json", cwd=tmp_path).out)
    assert list(found) == model_names()
    llama = found["llama-3.1-8b"]
    assert (llama["params"], llama["layers"], llama["hub"]) == (8_030_261_248, 32, "meta-llama/Llama-3.1-8B")
    assert all(model["active_params"] <= model["params"] for model in found.values())


def test_schemas_describe_the_files(tmp_path):
    plan = json.loads(slidetune("schema", "plan", cwd=tmp_path).out)
    assert {name.split(".")[0] for name in knobs(Plan(model="x"))} == set(plan["properties"])
    assert plan["required"] == ["model"]
    assert plan["properties"]["update"]["enum"] == ["backward", "forward"]
    profile = json.loads(slidetune("schema", "profile", cwd=tmp_path).out)
    assert {"gpu", "link", "host", "nvme"} <= set(profile["properties"])


def test_a_schema_of_what(tmp_path):
    refused("schema", "plann", cwd=tmp_path, saying="unknown file kind 'plann'. Did you mean plan")
    refused("schema", cwd=tmp_path, saying="Missing argument")
