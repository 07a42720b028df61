"""The parts around the loop: batches prepared ahead, the log's file, reporters, signals, slow steps."""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
import signal
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from slidetune.errors import SlidetuneError
from slidetune.runtime.trainer import SlidingTrainer
from slidetune.runtime.training import saves, slow_steps
from slidetune.runtime.training.callbacks import Note, Predicted, Started, StepDone, Trained
from slidetune.runtime.training.evaluation import evaluate
from slidetune.runtime.training.log import JsonLog
from slidetune.runtime.training.reporters import reporters
from slidetune.runtime.training.slow_steps import SlowSteps, explained, work_by_step
from slidetune.runtime.training.stopping import Stop, signals_ask
from slidetune.runtime.training.waiting import Ahead
from slidetune.schedule import LANES
from slidetune.trace import TraceRow

from .small_training import small_plan, small_recipe

pytestmark = pytest.mark.usefixtures("no_threads_left")


class Numbers:
    """Batches that are numbers; `last` is followed by an error."""

    def __init__(self, last=None):
        self.at, self.last = 0, last

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == self.last:
            raise ValueError("no more")
        self.at += 1
        return {"number": self.at}

    def position(self):
        return {"next": self.at + 1}


# --- Batches ahead


@given(st.integers(1, 4), st.integers(0, 12))
def test_the_position_is_that_of_what_was_handed_out(count, taken):
    with Ahead(Numbers(), count) as ahead:
        for number in range(1, taken + 1):
            assert ahead.next() == {"number": number}
            assert ahead.waited_s >= 0
        assert ahead.position == {"next": taken + 1}


def test_batches_are_made_before_they_are_asked_for():
    made = threading.Event()

    class Noting(Numbers):
        def __next__(self):
            if self.at == 2:
                made.set()
            return super().__next__()

    with Ahead(Noting(), 2) as ahead:
        assert made.wait(30)
        assert ahead.position == {"next": 1}


def test_what_goes_wrong_in_the_thread_is_raised_when_its_batch_is_due():
    with Ahead(Numbers(last=2)) as ahead:
        assert [ahead.next()["number"], ahead.next()["number"]] == [1, 2]
        with pytest.raises(ValueError, match="no more"):
            ahead.next()
        assert ahead.position == {"next": 3}


def test_it_ends_however_full_it_is():
    ahead = Ahead(Numbers(), 1)
    ahead.close()
    ahead.close()
    assert not any(thread.name == "slidetune batches" for thread in threading.enumerate())


# --- Stopping


def test_the_first_reason_counts():
    stop = Stop()
    assert stop.reason is None
    stop.ask("one")
    stop.ask("two")
    assert stop.reason == "one"


def test_signals_ask_and_are_themselves_again_afterwards():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop = Stop()
    with signals_ask(stop):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


# --- Evaluation


class Held:
    def __init__(self, *labels):
        self.labels = labels

    def epoch(self):
        return ({"labels": torch.tensor(rows)} for rows in self.labels)


class Losses:
    """In the place of a trainer: gives one loss after the other."""

    def __init__(self, *losses):
        self.losses = iter(losses)

    def evaluate_all(self, batches):
        return [next(self.losses) for _ in batches]


def test_every_label_counts_the_same_and_batches_without_one_are_left_out():
    held = Held([[5, 5, 5, 5]], [[-100, -100, 1, -100]], [[3, -100, -100, -100]], [[-100, 2, 2, -100]])
    found = evaluate(Losses(1.0, 3.0, 4.0), held, 7, Stop())
    assert (found.step, found.labels, found.tokens) == (7, 6, 12)
    assert found.tokens_per_s == 12 / found.seconds
    assert found.loss == pytest.approx((3 * 1.0 + 1 * 3.0 + 2 * 4.0) / 6)


def test_an_evaluation_that_is_stopped_tells_nothing():
    stop = Stop()
    stop.ask("enough")
    assert evaluate(Losses(), Held([[1, 1]]), 1, stop) is None


# --- Saves


class SlowCheckpoints:
    """In the place of checkpoints: each is written for 7 seconds, of which training pauses 1, and waited for whole."""

    def __init__(self, clock):
        self.clock, self.until = clock, 0.0

    def wait(self):
        self.clock.now = max(self.clock.now, self.until)

    def save(self, trainer, *, extra):
        self.clock.now += 1.0
        self.until = self.clock.now + 6.0
        return types.SimpleNamespace(path=Path("step"), nbytes=9, paused_s=1.0, seconds=7.0)


def test_a_pause_for_the_checkpoint_before_is_told_too(monkeypatch):
    clock, told = types.SimpleNamespace(now=100.0), []
    watching = types.SimpleNamespace(on_save=told.append)
    monkeypatch.setattr(saves, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    slow = SlowCheckpoints(clock)
    under_test = saves.Saves(slow, None, {}, 0, watching)
    for step in (1, 2):
        under_test.begin(step, {})
        clock.now += 2.0
    under_test.last(3, {})
    # Each goes on for 4 seconds when the next one is due.
    assert [(saved.step, saved.paused_s, saved.seconds) for saved in told] == [
        (1, 1.0, 7.0),
        (2, 5.0, 11.0),
        (3, 5.0, 11.0),
    ]


# --- The log


def started(tmp_path, **changes):
    values = {
        "recipe": small_recipe(tmp_path),
        "plan": small_plan(tmp_path),
        "first_step": 1,
        "total_steps": 4,
        "epoch_steps": 2,
        "device": "cpu",
        "kernels": "eager",
        "data": ["rows"],
        "resumed_from": None,
        "predicted": None,
        "nvme_step_bytes": 0,
        "checkpoint_bytes": 10,
        "checkpoints": 1,
        "output": tmp_path / "out",
        "log": tmp_path / "log.jsonl",
        "stop": print,
    }
    return Started(**(values | changes))


def done(step=1, **changes):
    values = {
        "step": step,
        "total_steps": 4,
        "epoch": 0.5,
        "loss": 2.0,
        "lr": 0.1,
        "grad_norm": None,
        "step_s": 2.0,
        "waited_s": 0.0,
        "tokens": 64,
        "left_s": 3.0,
        "predicted_tokens_per_s": None,
        "nvme_written_bytes": 0,
        "peak_bytes": {"ram": 1},
    }
    return StepDone(**(values | changes))


def trained(tmp_path):
    return Trained(
        ended="finished",
        first_step=1,
        step=4,
        total_steps=4,
        losses=[],
        evaluations=[],
        checkpoint=None,
        model=None,
        tokens_per_s=None,
        peak_bytes={},
        log=tmp_path / "log.jsonl",
    )


@pytest.mark.parametrize("rest", ["", '{"event": "st', "x" * 200_000])
def test_half_a_line_is_cut_off_and_the_rest_stays(tmp_path, rest):
    log = JsonLog(tmp_path)
    log.path.write_text('{"event": "step", "step": 1}\n' + rest)
    log.on_start(started(tmp_path))
    log.on_step(done(2, loss=math.nan))
    log.on_note(Note(step=2, kind="slow_step", text="why", fields={"lane": "gpu"}))
    log.on_end(trained(tmp_path))
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["step", "start", "step", "note", "end"]
    assert lines[2]["loss"] is None
    assert lines[2]["tokens_per_s"] == 32
    assert (lines[3]["kind"], lines[3]["lane"]) == ("slow_step", "gpu")


def test_a_log_of_nothing_but_half_a_line(tmp_path):
    log = JsonLog(tmp_path)
    log.path.write_text("{")
    log.on_start(started(tmp_path))
    log.on_end(trained(tmp_path))
    assert [json.loads(line)["event"] for line in log.path.read_text().splitlines()] == ["start", "end"]


def test_a_full_disk_costs_whole_lines_and_nothing_else(tmp_path, caplog):
    log = JsonLog(tmp_path)
    log.on_start(started(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As of a disk with room for half a line.
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 40, before[1]))
    try:
        for step in (1, 2):
            log.on_step(done(step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.on_step(done(3))
    log.on_end(trained(tmp_path))
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(line["event"], line.get("step")) for line in lines] == [("start", None), ("step", 3), ("end", 4)]
    assert caplog.text.count("lines of the log are lost") == 1


def test_a_log_that_can_not_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SlidetuneError, match="the log can't be written"):
        JsonLog(tmp_path / "file").on_start(started(tmp_path))


# --- What is said at the start


def test_hours_and_terabytes(tmp_path):
    predicted = Predicted(step_s=360.0, work_s={}, machine="a machine")
    lines = started(
        tmp_path,
        first_step=3,
        total_steps=12,
        predicted=predicted,
        nvme_step_bytes=400 * 10**9,
        checkpoint_bytes=500 * 10**9,
        checkpoints=2,
        resumed_from=Path("out/step-00000002"),
    ).lines()
    text = " ".join(lines)
    assert "64 tokens a step, 2 steps an epoch" in text
    assert "Goes on from out/step-00000002: 2 steps are done" in text
    assert "Predicted from a machine: 360 s a step, 0 tokens/s, 1 h for 10 steps" in text
    assert "To be written: 5 TB, 4 TB of it to the NVMe tier and 1 TB in 2 checkpoints of 466 GiB" in text


def test_of_a_tier_that_is_not_used_nothing_is_said(tmp_path):
    (line,) = (line for line in started(tmp_path).lines() if line.startswith("To be written"))
    assert "NVMe" not in line


# --- Reporters


def test_reports_without_their_library_are_refused(tmp_path, monkeypatch):
    # None: as if it weren't there.
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SlidetuneError, match="reports to tensorboard and wandb, which can't be imported") as caught:
        reporters(("tensorboard", "wandb"), tmp_path)
    assert "pip install tensorboard wandb" in caught.value.hint
    assert reporters((), tmp_path) == []


def test_weights_and_biases_without_a_login_says_what_to_do(tmp_path, monkeypatch):
    def init(**how):
        raise RuntimeError("api_key not configured (no-tty).\nmore")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    (wandb,) = reporters(("wandb",), tmp_path)
    with pytest.raises(SlidetuneError, match=r"can't begin a run \(api_key not configured \(no-tty\)\)") as caught:
        wandb.on_start(started(tmp_path))
    assert "WANDB_MODE=offline" in caught.value.hint


def test_tensorboard_gets_the_figures(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    (board,) = reporters(("tensorboard", "tensorboard"), tmp_path)
    board.on_start(started(tmp_path, first_step=5))
    board.on_step(done(5, grad_norm=0.5, predicted_tokens_per_s=40.0))
    board.on_end(trained(tmp_path))
    assert written[0] == (str(tmp_path / "tensorboard"), 5)
    assert written[-1] == "closed"
    expected = {"train/loss": 2.0, "train/lr": 0.1, "train/grad_norm": 0.5, "speed/tokens_per_s": 32.0}
    assert expected.items() <= {name: value for name, value, step in written[1:-1] if step == 5}.items()


def test_a_run_that_goes_on_is_the_same_at_weights_and_biases(tmp_path, monkeypatch):
    begun, logged = [], []

    class Run:
        id = "abc"

        def log(self, values, step):
            logged.append((values["train/loss"], step))

        def finish(self, exit_code):
            logged.append(exit_code)

    def init(**how):
        begun.append(how)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for before in (None, tmp_path / "step-00000002"):
        (wandb,) = reporters(("wandb",), tmp_path)
        wandb.on_start(started(tmp_path, resumed_from=before))
        wandb.on_step(done(1))
        wandb.on_end(trained(tmp_path))
    assert logged == [(2.0, 1), 0] * 2
    assert [how.get("id") for how in begun] == [None, "abc"]
    assert begun[0]["project"] == "slidetune"
    assert begun[0]["config"]["recipe"]["steps"] == 8


# --- Slow steps


def row(step, lane, op, seconds):
    return TraceRow(step, op, 1, 0, -1, lane, 1.0, 1.0 + seconds, 0, 0.0, 0, 0.0, -1)


class Traced:
    """In the place of a trainer that has made so many steps."""

    def __init__(self, steps, rows=()):
        self.steps, self.trace = steps, list(rows)


times = st.floats(0.01, 5.0)


@given(st.dictionaries(st.tuples(st.sampled_from(LANES), st.sampled_from(["a", "b"])), times, min_size=1), st.data())
def test_the_lane_that_had_more_to_do_is_named(usual, data):
    lane, op = data.draw(st.sampled_from(sorted(usual)))
    more_s = data.draw(st.floats(1.0, 10.0))
    slow = {**usual, (lane, op): usual[lane, op] + more_s}
    last = data.draw(st.permutations([usual, slow]))
    note = explained(done(step_s=20.0 + more_s), 20.0, "the prediction", last, usual, saving=False)
    assert (note.fields["cause"], note.fields["lane"], note.fields["operation"]) == ("lane", lane, op)
    assert note.fields["lane_s"] - note.fields["lane_expected_s"] == pytest.approx(more_s)
    assert f"most of the difference in {op}" in note.text


def test_waiting_for_data_is_named():
    note = explained(done(9, step_s=5.0, waited_s=3.0), 2.0, "the prediction", [{("gpu", "a"): 1.0}], {}, saving=True)
    assert note.fields["cause"] == "data"
    assert "3 s of it waiting for its batch; a checkpoint was being written beside it" in note.text


@pytest.mark.parametrize("usual", [{("gpu", "a"): 1.0}, {}])
def test_where_nothing_explains_it_that_is_said(usual):
    note = explained(done(9, step_s=5.0), 2.0, "the prediction", [{("gpu", "a"): 1.1}], usual, saving=False)
    assert note.fields["cause"] == "unknown"
    assert "2.5 times 2 s, the prediction: no lane had more to do" in note.text


def look(slow, step, step_s, rows=(), **changes):
    return slow.look(Traced(step, rows), done(step, step_s=step_s), **({"paused": False, "saving": False} | changes))


def test_a_step_is_slow_beside_its_prediction_and_later_beside_the_others():
    slow = SlowSteps(Predicted(step_s=1.0, work_s={("gpu", "a"): 0.9}, machine="m"))
    rows = [row(2, "gpu", "a", 3.0)]
    assert look(slow, 1, 3.0, rows) is None, "everything is cold in the first one"
    note = look(slow, 2, 3.0, rows)
    assert "3.0 times 1 s, the prediction: GPU compute worked for 3 s in place of 900 ms" in note.text
    # It was looked into; that all are as slow is no news.
    assert [look(slow, step, 3.0, rows) for step in range(3, 20)] == [None] * 17
    note = look(slow, 20, 9.0, [row(18, "gpu", "a", 2.5), row(20, "gpu", "a", 8.0)])
    assert "the median of the steps before: GPU compute worked for 8 s in place of 2.5 s" in note.text


def test_without_a_prediction_it_is_the_steps_before_that_count():
    slow = SlowSteps(None)
    rows = [row(step, "nvme_read", "load", 4.0 if step == 9 else 1.0) for step in range(4, 10)]
    assert [look(slow, step, 1.0, rows) for step in range(1, 9)] == [None] * 8
    assert look(slow, 9, 9.0, rows, paused=True) is None, "a pause is no slowness"
    note = look(slow, 9, 4.0, rows)
    assert "NVMe reads worked for 4 s in place of 1 s, most of the difference in load" in note.text


def test_the_lane_of_a_real_step(tmp_path):
    small_recipe(tmp_path)
    batch = {"input_ids": torch.randint(0, 256, (4, 16))}
    slow = SlowSteps(None)
    with SlidingTrainer(tmp_path / "model", small_plan(tmp_path), device="cpu", trace=6) as trainer:
        for step in range(1, 8):
            trainer.step(batch)
            assert slow.look(trainer, done(step, step_s=1.0), paused=False, saving=False) is None
        task = next(i for i, task in enumerate(trainer.schedule.tasks) if task.work.op == "adam")
        adam = trainer._operations.run[task]

        def slowly(step):
            time.sleep(2.0)
            adam(step)

        trainer._operations.run[task] = slowly
        trainer.step(batch)
        note = slow.look(trainer, done(8, step_s=3.0), paused=False, saving=False)
    assert (note.fields["lane"], note.fields["operation"]) == ("cpu_adam", "adam")
    assert note.fields["lane_s"] > 2.0


def test_small_differences_are_none():
    slow = SlowSteps(None)
    assert all(look(slow, step, 0.001 * (1 + 9 * (step % 7 == 0))) is None for step in range(1, 40))
    assert slow_steps.LEAST_S > 0.01


def test_long_batches_take_long():
    slow = SlowSteps(None)
    for step in range(1, 12):
        assert slow.look(Traced(step), done(step, step_s=1.0, tokens=64), paused=False, saving=False) is None
    assert slow.look(Traced(12), done(12, step_s=4.0, tokens=256), paused=False, saving=False) is None


def test_work_by_step():
    rows = [row(1, "gpu", "a", 1.0), row(1, "gpu", "a", 2.0), row(2, "h2d", "b", 0.5)]
    found = work_by_step(rows)
    assert found[1] == {("gpu", "a"): pytest.approx(3.0)}
    assert found[2] == {("h2d", "b"): pytest.approx(0.5)}
    assert list(itertools.chain(found)) == [1, 2]
