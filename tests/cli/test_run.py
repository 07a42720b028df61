"""`slidetune run` on the CPU, end to end."""

from __future__ import annotations

import json
import os
import signal
import string

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from slidetune import files
from slidetune.cli.run import run
from slidetune.errors import BadFile, SlidetuneError
from slidetune.machines import machine
from slidetune.plan_file import write_plan
from slidetune.plans import Plan
from slidetune.runtime import trainer
from slidetune.runtime.trainer import NonFiniteLoss, SlidingTrainer
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
def call(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    plan = write_plan(tmp_path / "plan.yaml", Plan(model=str(tmp_path), seq_len=32, adam_threads=1))
    app = typer.Typer()
    app.command()(run)

    def call(*arguments, code=0):
        result = CliRunner().invoke(app, [str(plan), "--device", "cpu", *map(str, arguments)])
        if isinstance(result.exception, SlidetuneError):
            raise result.exception
        assert result.exit_code == code, result.output
        return result.stdout if code == 0 else result.stderr

    monkeypatch.chdir(tmp_path)
    return call


@pytest.fixture
def no_model(monkeypatch):
    """What is refused must be before a model is loaded."""

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(trainer, "SlidingTrainer", load)


def weights_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


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


def test_a_profile_that_lies_here_is_used(call, tmp_path):
    options = ("--random-weights", "--steps", 1, "--json")
    assert json.loads(call(*options))["predicted_tokens_per_s"] is None
    files.write(tmp_path / "profile.yaml", machine("rtx4090", cores=2))
    assert json.loads(call(*options))["predicted_tokens_per_s"] > 0


def test_a_plan_that_uses_a_drive_beside_a_profile_without_one(call, tmp_path):
    """It runs; only its speed can't be foreseen."""
    plan = Plan(model=str(tmp_path), seq_len=32, adam_threads=1, window=2, optimizer_nvme=1)
    write_plan(tmp_path / "plan.yaml", plan)
    files.write(tmp_path / "profile.yaml", machine("rtx4090", cores=2, nvme="none"))
    found = json.loads(call("--random-weights", "--steps", 1, "--json", "--nvme-dir", tmp_path))
    assert found["predicted_tokens_per_s"] is None
    assert len(found["losses"]) == 1


@pytest.mark.usefixtures("no_model")
def test_what_is_wrong_shows_before_a_model_is_loaded(call, tmp_path):
    for name, text in (("bad.jsonl", '{"words": 1}'), ("file", ""), ("bad.yaml", "gpu: 3")):
        (tmp_path / name).write_text(text)
    for options, says in (
        (("--data", "nowhere.txt"), "no such file"),
        (("--data", "bad.jsonl"), "row 1 has no text"),
        (("--profile", "nowhere.yaml"), "nowhere"),
        (("--profile", "bad.yaml"), "bad.yaml"),
        (("--trace", "t.txt"), r"t\.txt: what kind of file"),
        (("--output", "file"), "--output file: is a file"),
        (("--output", "file/inside"), "--output file/inside: can't be written to"),
        (("--output", "/proc/nowhere"), "can't be written to"),
    ):
        with pytest.raises(SlidetuneError, match=says):
            call("--random-weights", *options)


@pytest.mark.usefixtures("no_model")
def test_a_model_that_is_not_there_is_not_asked_of_the_hub(call, tmp_path, monkeypatch):
    from transformers import AutoConfig

    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_: pytest.fail("the hub was asked"))
    (tmp_path / "m").mkdir()
    with pytest.raises(BadFile, match="m/nope: there is no such directory") as caught:
        call("--model", "m/nope")
    assert "--random-weights" in caught.value.hint
    with pytest.raises(BadFile, match="m/nope: no such directory"):
        call("--model", "m/nope", "--random-weights")


def test_ctrl_c_ends_training_after_the_step_and_saves(call, tmp_path, monkeypatch):
    step = SlidingTrainer.step

    def interrupted(self, batch, **options):
        if self.steps == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, **options)

    before = signal.getsignal(signal.SIGINT)
    three = ("--random-weights", "--lr", 1e-2, "--steps", 3, "--output", tmp_path / "three")
    call(*three)
    monkeypatch.setattr(SlidingTrainer, "step", interrupted)
    said = call("--random-weights", "--lr", 1e-2, "--steps", 50, "--output", tmp_path / "out", code=130)
    assert "Stopping after this step" in said
    assert "Stopped after 3 steps" in said
    assert "Written:" in said
    found, expected = weights_of(tmp_path / "out"), weights_of(tmp_path / "three")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "Stopped after 3 steps; nothing saved" in call("--random-weights", "--steps", 50, code=130)
    # In the last step there is nothing to stop any more.
    call(*three)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once(call, monkeypatch):
    def interrupted(self, batch, **options):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(SlidingTrainer, "step", interrupted)
    assert "nothing saved" in call("--random-weights", "--output", "out", code=130)


def test_a_loss_that_is_no_number_saves_what_was_good(call, tmp_path, monkeypatch):
    step = SlidingTrainer.step

    def refuse(self, batch, **options):
        if self.steps == 2:
            raise NonFiniteLoss("the loss is nan.", "Lower the learning rate.")
        return step(self, batch, **options)

    call("--random-weights", "--lr", 1e-2, "--steps", 2, "--output", tmp_path / "two")
    monkeypatch.setattr(SlidingTrainer, "step", refuse)
    with pytest.raises(NonFiniteLoss, match="the loss is nan") as caught:
        call("--random-weights", "--lr", 1e-2, "--output", tmp_path / "out")
    assert "Lower the learning rate.\nStopped after 2 steps" in caught.value.hint
    found, expected = weights_of(tmp_path / "out"), weights_of(tmp_path / "two")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(NonFiniteLoss, match="Stopped after 2 steps; nothing saved"):
        call("--random-weights")


# --- Data


def test_rows_cut_off_are_counted(call, tmp_path, capsys):
    rows = [{"input_ids": [1] * 33}, {"input_ids": [1] * 32}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    call("--random-weights", "--steps", 1, "--data", "rows.jsonl")
    from slidetune.cli.run import batches_of

    batches_of("rows.jsonl", str(tmp_path), Plan(model="any", seq_len=32), 300, 0)
    assert "1 of 2 rows have more than 32 tokens" in " ".join(capsys.readouterr().err.split())


def byte_level(folder):
    """A tokenizer as GPT-2's oldest directories hold it."""
    letters = [*string.ascii_lowercase, "th", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "gpt2"}))


def test_vocabulary_and_merges_are_a_tokenizer(tmp_path):
    from slidetune.cli.run import encoder_of

    byte_level(tmp_path)
    for ref in (tmp_path, tmp_path / "config.json"):
        encode, end = encoder_of(str(ref), 300)
        assert (encode("th"), end) == ([26], 27)


def test_a_broken_tokenizer(tmp_path):
    from slidetune.cli.run import encoder_of

    byte_level(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(SlidetuneError, match="its tokenizer can't be read"):
        encoder_of(str(tmp_path), 300)
