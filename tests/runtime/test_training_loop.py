"""`Trainer.fit`: it makes the steps that a plain loop makes, saves, goes on, evaluates, and says what it does."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import shutil
import signal
import threading
from collections import namedtuple
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from transformers import AutoModelForCausalLM

import slidetune
from slidetune.errors import BadFile, SlidetuneError
from slidetune.machines import machine
from slidetune.plan_file import read_plan, write_plan
from slidetune.recipe import Data, lr_factor, write_recipe
from slidetune.runtime.adam import AdamW
from slidetune.runtime.batches import IGNORED, shifted
from slidetune.runtime.checkpoint import CheckpointFailed, Checkpoints, checkpoints, latest, read_manifest
from slidetune.runtime.data import byte_tokens, prepare
from slidetune.runtime.trainer import NonFiniteLoss, SlidingTrainer

from .small_training import events, masters, same, small_plan, small_recipe

pytestmark = pytest.mark.usefixtures("no_threads_left")


def fit(recipe, *callbacks, resume=False):
    return slidetune.Trainer(recipe, callbacks=callbacks).fit(resume=resume)


class Calls(slidetune.Callback):
    """Notes what it is told."""

    def __init__(self):
        self.seen = []

    def on_prepare(self, doing):
        self.seen.append(("prepare", doing))

    def on_start(self, started):
        self.seen.append(("start", started))

    def on_step(self, done):
        self.seen.append(("step", done))

    def on_evaluate(self, found):
        self.seen.append(("evaluate", found))

    def on_save(self, saved):
        self.seen.append(("save", saved))

    def on_note(self, note):
        self.seen.append(("note", note))

    def on_end(self, trained):
        self.seen.append(("end", trained))

    def all(self, kind):
        return [event for name, event in self.seen if name == kind]


class At(slidetune.Callback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_start(self, started):
        self.started = started

    def on_step(self, done):
        if done.step == self.step:
            self.action(self)


def stop_at(step):
    return At(step, lambda self: self.started.stop("enough"))


def send_at(step, number):
    return At(step, lambda self: os.kill(os.getpid(), number))


def data_of(recipe):
    plan = read_plan(recipe.plan)
    tokens = byte_tokens(256)
    return prepare(recipe.data.source, tokens, seq_len=plan.seq_len, batch=plan.batch, held_out=recipe.data.held_out)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A training that nothing happens to, and where it is."""
    recipe = small_recipe(tmp_path_factory.mktemp("alone"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trained = fit(recipe)
    torch.set_num_threads(threads)
    return recipe, trained, masters(recipe.output, Path(recipe.output) / "fp32")


def test_the_steps_of_a_plain_loop(alone):
    recipe, trained, weights = alone
    optimizer = AdamW(lr=recipe.lr, weight_decay=recipe.weight_decay)
    batches = data_of(recipe).train
    with SlidingTrainer(recipe.model, recipe.plan, optimizer=optimizer, device="cpu") as trainer:
        expected = [trainer.step(next(batches), lr_scale=lr_factor(recipe, n, 8)) for n in range(1, 9)]
        assert same(weights, trainer.state_dict())
    assert trained.losses == expected


def test_what_is_left_in_the_end(alone):
    recipe, trained, weights = alone
    output = Path(recipe.output)
    assert trained.finished
    assert (trained.first_step, trained.step, trained.total_steps) == (1, 8, 8)
    assert trained.model == output / "model"
    assert trained.checkpoint == latest(output) == output / "step-00000008"
    assert read_plan(output / "plan.yaml") == read_plan(recipe.plan)
    assert trained.tokens_per_s > 0
    json.dumps(trained.as_dict(), allow_nan=False)
    model = AutoModelForCausalLM.from_pretrained(trained.model)
    state = model.state_dict()
    assert all(torch.equal(state[name].bfloat16(), value.bfloat16()) for name, value in weights.items())


def test_the_loss_of_what_is_held_out_is_that_of_transformers(alone):
    recipe, trained, _ = alone
    model = AutoModelForCausalLM.from_pretrained(trained.model, dtype=torch.bfloat16)
    total = labels = 0
    for batch in data_of(recipe).held_out.epoch():
        wanted = shifted(batch["labels"])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits.float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
        labels += int((wanted != IGNORED).sum())
    (found,) = trained.evaluations
    assert (found.step, found.labels) == (8, labels)
    assert found.loss == pytest.approx(total / labels, abs=0.01)


def test_the_log_has_every_step(alone):
    recipe, trained, _ = alone
    (start,) = events(recipe, "start")
    assert (start["first_step"], start["total_steps"], start["resumed_from"]) == (1, 8, None)
    assert start["recipe"]["lr"] == recipe.lr
    steps = events(recipe, "step")
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["loss"] for line in steps] == trained.losses
    assert [line["lr"] for line in steps] == [recipe.lr * lr_factor(recipe, n, 8) for n in range(1, 9)]
    assert all(0 <= line["waited_s"] <= line["step_s"] for line in steps)
    assert all(line["peak_bytes"]["ram"] > 0 and line["grad_norm"] is None for line in steps)
    assert steps[-1]["left_s"] == 0
    (end,) = events(recipe, "end")
    assert end["ended"] == "finished"
    assert events(recipe)[-1] == end


def test_a_file_is_a_recipe_and_the_log_goes_where_it_is_told_to(tmp_path):
    recipe = small_recipe(tmp_path, steps=2, log=str(tmp_path / "elsewhere"))
    trained = fit(write_recipe(tmp_path / "recipe.yaml", recipe))
    assert trained.log == tmp_path / "elsewhere" / "log.jsonl"
    assert len(events(recipe, "step")) == 2
    assert not (Path(recipe.output) / "log.jsonl").exists()


@given(
    st.integers(1, 7),
    st.sampled_from(
        [
            {},
            {"window": 1, "prefetch": 0},
            {"update": "forward"},
            {"optimizer_nvme": 2, "late_updates": 1},
            {"chunk_bytes": 4096, "gradient_ring": 2},
        ]
    ),
    st.booleans(),
)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@pytest.mark.timeout(300)
def test_resumed_by_any_plan_it_is_as_if_it_had_never_stopped(alone, tmp_path_factory, step, changes, evaluates):
    recipe, expected, weights = alone
    folder = tmp_path_factory.mktemp("resumed")
    other = write_plan(folder / "other.yaml", small_plan(Path(recipe.model).parent, **changes))
    here = dataclasses.replace(recipe, output=str(folder / "out"), nvme_dir=str(folder))
    # Evaluating and saving on the way change nothing either.
    here = dataclasses.replace(here, evaluate_every=2 if evaluates else None, save_every=3 if evaluates else None)
    before = fit(here, stop_at(step))
    assert (before.ended, before.step, before.model) == ("enough", step, None)
    after = fit(dataclasses.replace(here, plan=str(other)), resume=True)
    assert after.first_step == step + 1
    assert [*before.losses, *after.losses] == expected.losses
    assert after.evaluations[-1].loss == expected.evaluations[-1].loss
    assert same(masters(here.output, folder / "fp32"), weights)


def test_callbacks_in_order(tmp_path):
    calls = Calls()
    recipe = small_recipe(tmp_path, steps=4, save_every=2, evaluate_every=2)
    trained = fit(recipe, calls)
    names = [name for name, _ in calls.seen if name != "prepare"]
    assert [name for name in names if name != "save"] == [
        "start",
        *["step"] * 2,
        "evaluate",
        *["step"] * 2,
        "evaluate",
        "end",
    ]
    assert [saved.step for saved in calls.all("save")] == [2, 4]
    assert [found.step for found in trained.evaluations] == [2, 4]
    assert calls.all("end") == [trained]
    said = " ".join(calls.all("start")[0].lines())
    assert "4 sequences a step (micro_batch 2 x accumulation 2), 64 tokens a step" in said
    assert "2 checkpoints of" in said


def test_what_a_callback_raises_ends_the_training_with_its_checkpoints_intact(tmp_path):
    def fail(_):
        raise RuntimeError("on purpose")

    calls = Calls()
    recipe = small_recipe(tmp_path, save_every=2)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(recipe, calls, At(5, fail))
    (end,) = calls.all("end")
    assert (end.ended, end.step, end.finished) == ("RuntimeError: on purpose", 5, False)
    assert read_manifest(latest(recipe.output)).extra["step"] == 4
    assert events(recipe, "end")[0]["ended"] == "RuntimeError: on purpose"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step(tmp_path, number):
    before = signal.getsignal(number)
    recipe = small_recipe(tmp_path)
    trained = fit(recipe, send_at(3, number))
    assert (trained.ended, trained.step, trained.model) == (number.name, 3, None)
    assert read_manifest(trained.checkpoint).extra["step"] == 3
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    recipe = small_recipe(tmp_path, save_every=2)

    def twice(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(recipe, At(3, twice))
    assert read_manifest(latest(recipe.output)).extra["step"] == 2


def test_in_another_thread_it_trains_too(tmp_path):
    recipe, found = small_recipe(tmp_path, steps=2), []
    thread = threading.Thread(target=lambda: found.append(fit(recipe)))
    thread.start()
    thread.join()
    assert found[0].finished


def test_a_folder_with_checkpoints_is_not_begun_anew(alone):
    recipe, trained, _ = alone
    with pytest.raises(SlidetuneError, match=r"holds checkpoints already, the last one step-00000008") as caught:
        fit(recipe)
    assert "--resume" in caught.value.hint
    assert latest(recipe.output) == trained.checkpoint


def test_resumed_when_all_steps_are_made_it_writes_the_model(tmp_path):
    recipe = small_recipe(tmp_path, steps=2)
    fit(recipe)
    config = Path(recipe.output) / "model" / "config.json"
    config.unlink()
    again = fit(recipe, resume=True)
    assert again.finished
    assert (again.losses, again.step, again.tokens_per_s) == ([], 2, None)
    assert config.is_file()
    calls = Calls()
    more = fit(dataclasses.replace(recipe, steps=3), calls, resume=True)
    assert (more.first_step, more.step) == (3, 3)
    (note,) = calls.all("note")
    assert "another schedule than before step-00000002: steps was 2 and is 3." in note.text


def test_resume_where_there_is_nothing_begins(tmp_path):
    assert fit(small_recipe(tmp_path, steps=2), resume=True).first_step == 1


def test_two_runs_in_one_folder_are_refused(tmp_path):
    recipe = small_recipe(tmp_path)
    with Checkpoints(recipe.output), pytest.raises(SlidetuneError, match="another run saves its checkpoints here"):
        fit(recipe)
    with pytest.raises(SlidetuneError, match="another run saves its checkpoints here"):
        fit(recipe, At(2, lambda _: fit(recipe)))


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    recipe = small_recipe(tmp_path, save_every=2)
    fit(recipe, stop_at(5))
    damaged = latest(recipe.output)
    file = next(damaged.glob("state-*"))
    file.write_bytes(file.read_bytes()[:-1])
    calls = Calls()
    trained = fit(recipe, calls, resume=True)
    assert trained.first_step == 5
    (note,) = calls.all("note")
    assert f"{file} is damaged" in note.text
    assert "The checkpoint before it is taken" in note.text
    for path in checkpoints(recipe.output):
        file = next(path.glob("state-*"))
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadFile, match="is damaged"):
        fit(dataclasses.replace(recipe, steps=10), resume=True)


def test_other_data_can_not_be_gone_on_with(tmp_path):
    recipe = small_recipe(tmp_path)
    fit(recipe, stop_at(2))
    with pytest.raises(SlidetuneError, match="position is of other data"):
        fit(dataclasses.replace(recipe, seed=1), resume=True)


def test_a_checkpoint_of_somebody_else_is_refused(tmp_path):
    recipe = small_recipe(tmp_path)
    with (
        Checkpoints(recipe.output) as saved,
        SlidingTrainer(recipe.model, recipe.plan, device="cpu") as trainer,
    ):
        saved.save(trainer)
    with pytest.raises(BadFile, match="was not saved by `slidetune train`"):
        fit(recipe, resume=True)


def test_a_loss_that_is_not_finite_says_how_to_go_on(tmp_path):
    recipe = small_recipe(tmp_path, save_every=2, lr=1e-3, steps=6)
    fit(recipe, stop_at(3))
    calls = Calls()
    with pytest.raises(NonFiniteLoss) as caught:
        fit(dataclasses.replace(recipe, lr=1e38, save_every=None), calls, resume=True)
    (note,) = calls.all("note")
    assert "otherwise than step-00000003 was trained: lr was 0.001 and is 1e+38" in note.text
    path = Path(recipe.output) / "step-00000003"
    assert f"{path} is whole: go on from it with --resume, with a lower learning rate (--lr 5e+37)" in caught.value.hint
    assert "step-00000002 is older: without the folder" in caught.value.hint
    assert "the loss is" in calls.all("end")[0].ended
    # What was saved before is as it was, and goes on as if nothing had been.
    assert latest(recipe.output) == path
    resumed = fit(recipe, resume=True)
    straight = fit(dataclasses.replace(recipe, output=str(tmp_path / "straight")))
    assert resumed.losses == straight.losses[3:]


def test_a_loss_that_is_not_finite_before_any_checkpoint(tmp_path):
    with pytest.raises(NonFiniteLoss) as caught:
        fit(small_recipe(tmp_path, lr=1e38, warm_up_steps=0))
    assert "Nothing was saved before: begin anew, with a lower learning rate" in caught.value.hint


Disk = namedtuple("Disk", "total used free")


def test_a_full_disk_keeps_the_old_checkpoint_and_training_goes_on(tmp_path, monkeypatch):
    def disk_full(full):
        free = 0 if full else 1 << 40
        return lambda _: monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(1 << 41, 0, free))

    recipe, calls = small_recipe(tmp_path, save_every=2), Calls()
    assert fit(recipe, calls, At(3, disk_full(True)), At(5, disk_full(False))).finished
    (note,) = calls.all("note")
    assert (note.step, note.kind) == (4, "save_failed")
    assert "disk full: the checkpoint of step 4" in note.text
    assert "step-00000002 is whole. Training goes on" in note.text
    assert [saved.step for saved in calls.all("save")] == [2, 6, 8]
    assert [line["kind"] for line in events(recipe, "note")] == ["save_failed"]


def test_too_little_room_is_said_at_the_start(tmp_path, monkeypatch):
    calls = Calls()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(1 << 41, 0, 20 << 20))
    fit(small_recipe(tmp_path, steps=2, keep=100), calls, stop_at(1))
    (note,) = calls.all("note")
    assert (note.step, note.kind) == (0, "little_room")
    assert "has 20 MiB free; the checkpoints to come need" in note.text


def test_a_full_disk_at_the_end_is_an_error(tmp_path, monkeypatch):
    recipe = small_recipe(tmp_path, save_every=2, steps=5)
    full = At(4, lambda _: monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(1, 1, 0)))
    with pytest.raises(CheckpointFailed, match="disk full: the checkpoint of step 5") as caught:
        fit(recipe, full)
    assert "is whole: go on from it with --resume" in caught.value.hint
    assert "Make room" in caught.value.hint


def test_a_failure_in_the_background_is_told_with_the_next_save(tmp_path, monkeypatch):
    from slidetune.runtime.checkpoint import folder

    complete, calls = folder.complete, Calls()

    def fails_once(partial):
        monkeypatch.setattr(folder, "complete", complete)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "complete", fails_once)
    assert fit(small_recipe(tmp_path, save_every=2), calls).finished
    assert [(note.kind, "No space" in note.text or "disk full" in note.text) for note in calls.all("note")] == [
        ("save_failed", True)
    ]
    assert [saved.step for saved in calls.all("save")] == [4, 6, 8]


def test_gradients_are_clipped_and_their_norm_is_logged(tmp_path):
    plan = write_plan(tmp_path / "clipping.yaml", small_plan(tmp_path, update="forward"))
    recipe = small_recipe(tmp_path, steps=3, plan=str(plan), clip_norm=0.5)
    fit(recipe)
    assert all(line["grad_norm"] > 0 for line in events(recipe, "step"))
    assert read_plan(Path(recipe.output) / "plan.yaml").clip_norm == 0.5


class Payload:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_that_comes_with_a_model_is_run(tmp_path):
    """Neither its code nor what is pickled."""
    recipe, ran = small_recipe(tmp_path, steps=2), tmp_path / "ran"
    model = Path(recipe.model)
    (model / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    config = json.loads((model / "config.json").read_text())
    code = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    (model / "config.json").write_text(json.dumps(config | {"auto_map": code}))
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt", "tokens.pkl"):
        (model / name).write_bytes(pickle.dumps(Payload(ran)))
    assert fit(recipe).finished
    assert not ran.exists()
    pickle.loads((model / "model.pt").read_bytes())
    assert ran.exists(), "it would have been seen"


def test_weights_that_are_only_pickled_are_refused(tmp_path):
    recipe, ran = small_recipe(tmp_path), tmp_path / "ran"
    for file in Path(recipe.model).glob("*.safetensors"):
        file.unlink()
    (Path(recipe.model) / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(SlidetuneError, match="no safetensors files"):
        fit(recipe)
    assert not ran.exists()


def test_what_is_written_to_the_drive_is_counted(tmp_path):
    plan = write_plan(tmp_path / "nvme.yaml", small_plan(tmp_path, optimizer_nvme=2))
    calls, recipe = Calls(), small_recipe(tmp_path, steps=4, plan=str(plan), nvme_dir=str(tmp_path))
    without_drive = machine("rtx4090", nvme="none")
    slidetune.Trainer(recipe, callbacks=[calls], profile=without_drive).fit()
    (note,) = calls.all("note")
    assert "No prediction: rtx4090-workstation has no drive" in note.text
    (started,) = calls.all("start")
    assert started.nvme_step_bytes > 0
    last = calls.all("step")[-1]
    assert last.peak_bytes["nvme"] > 0
    assert 2 * started.nvme_step_bytes <= last.nvme_written_bytes <= 4 * started.nvme_step_bytes * 1.5


def test_the_prediction_is_the_simulators(tmp_path):
    calls, here = Calls(), machine("rtx4090")
    recipe = small_recipe(tmp_path, steps=2)
    slidetune.Trainer(recipe, callbacks=[calls], profile=here).fit()
    expected = slidetune.simulate(recipe.plan, here, more=False).prediction
    found = calls.all("start")[0].predicted
    assert found.step_s == pytest.approx(expected.step_s)
    busy = {lane: sum(s for (name, _), s in found.work_s.items() if name == lane) for lane in ("gpu", "h2d")}
    assert busy == {lane: pytest.approx(expected.lanes[lane].busy_s) for lane in busy}
    assert calls.all("step")[0].predicted_tokens_per_s == pytest.approx(expected.tokens_per_s)


def test_padded_documents(tmp_path):
    recipe = small_recipe(tmp_path, steps=3)
    trained = fit(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, packed=False)))
    assert trained.finished
    assert all(map(math.isfinite, trained.losses))


def test_epochs(tmp_path):
    recipe = small_recipe(tmp_path, steps=None, epochs=0.1)
    expected = round(0.1 * len(data_of(recipe).train))
    assert fit(recipe).step == expected


@pytest.mark.parametrize(
    ("changes", "saying"),
    [
        ({"model": "nowhere/at/all"}, "nowhere/at/all: there is no such directory"),
        ({"data": Data(source="nothing.jsonl")}, "nothing.jsonl: no such file"),
        ({"plan": "nothing.yaml"}, "nothing.yaml: no such file"),
        ({"seq_len": 12}, "seq_len is 12 in the recipe and 16 in the plan"),
        ({"clip_norm": 1.0}, "clip_norm needs a plan with update: forward"),
        ({"warm_up_steps": 9}, "warm_up_steps"),
        ({"plan": "auto"}, "plan: auto needs to know the machine"),
        ({"device": "cuda:7"}, "device cuda:7 is not here"),
        ({"lr": -1.0}, "lr must be a number above 0"),
    ],
)
def test_what_can_not_be_trained_is_refused_before_a_step(tmp_path, monkeypatch, changes, saying):
    monkeypatch.chdir(tmp_path)
    recipe, calls = small_recipe(tmp_path, **changes), Calls()
    with pytest.raises(SlidetuneError, match=saying):
        fit(recipe, calls)
    assert not calls.all("start")
    assert not checkpoints(recipe.output)
