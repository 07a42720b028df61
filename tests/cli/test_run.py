"""`slidetune run` on the CPU, end to end."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import typer
from typer.testing import CliRunner

from slidetune.cli.run import run
from slidetune.errors import SlidetuneError
from slidetune.plan_file import write_plan
from slidetune.plans import Plan
from slidetune.traces.store import load_trace

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}


@pytest.fixture
def call(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    plan = write_plan(tmp_path / "plan.yaml", Plan(model=str(tmp_path), seq_len=32, adam_threads=1))
    app = typer.Typer()
    app.command()(run)

    def call(*arguments):
        result = CliRunner().invoke(app, [str(plan), "--device", "cpu", *map(str, arguments)])
        if isinstance(result.exception, SlidetuneError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return call


def test_a_page(call):
    page = call("--random-weights", "--steps", 3)
    assert "in 3 steps" in page
    assert "tokens/s" in page


def test_json(call):
    found = json.loads(call("--random-weights", "--steps", 4, "--json"))
    assert found["steps"] == len(found["losses"]) == len(found["step_s"]) == 4
    assert found["tokens_per_s"] > 0
    assert found["peak_bytes"]["ram"] > 0


def test_it_learns_a_file_saves_the_model_and_goes_on(call, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("the cat sat on the mat and looked at the rain. " * 30)
    options = ("--data", data, "--lr", 3e-3, "--warm-up", 5, "--json")
    first = json.loads(call("--random-weights", "--steps", 40, "--output", tmp_path / "out", *options))
    assert first["losses"][-1] < first["losses"][0] - 2
    second = json.loads(call("--model", tmp_path / "out", "--steps", 2, *options))
    assert second["losses"][0] < first["losses"][0] - 2


def test_a_trace_of_the_last_steps(call, tmp_path):
    call("--random-weights", "--steps", 12, "--trace", tmp_path / "trace.csv.gz")
    trace, about = load_trace(tmp_path / "trace.csv.gz")
    assert about["device"] == "cpu"
    assert sorted(trace["step"].unique()) == list(range(5, 13))
    assert (trace["end_s"] >= trace["start_s"]).all()
    assert (trace.groupby("step").size().nunique()) == 1


def test_a_trace_for_perfetto(call, tmp_path):
    call("--random-weights", "--steps", 3, "--trace", tmp_path / "trace.json")
    names = {event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert any("forward" in name for name in names)


def test_the_predicted_speed_beside(call):
    found = json.loads(call("--random-weights", "--steps", 2, "--profile", "h200-16c", "--json"))
    assert found["predicted_tokens_per_s"] > 0


def test_no_weights(call):
    with pytest.raises(SlidetuneError, match="no safetensors files"):
        call("--steps", 1)


def test_no_data(call):
    with pytest.raises(SlidetuneError, match="no such file"):
        call("--random-weights", "--data", "nowhere.txt")


@pytest.mark.parametrize(("folder", "says"), [(None, "--nvme-dir"), ("nowhere", "No such file"), ("file", "Not a dir")])
def test_where_the_nvme_tier_can_not_be(call, tmp_path, folder, says):
    write_plan(
        tmp_path / "plan.yaml", Plan(model=str(tmp_path), seq_len=32, adam_threads=1, window=2, optimizer_nvme=1)
    )
    (tmp_path / "file").touch()
    options = () if folder is None else ("--nvme-dir", tmp_path / folder)
    with pytest.raises(SlidetuneError, match=says) as caught:
        call("--random-weights", "--steps", 1, *options)
    assert "--nvme-dir" in caught.value.hint
