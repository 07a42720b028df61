"""An evaluation gives a step's loss, bit for bit, and training goes on as if it had never been."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from slidetune.builder import build_forward
from slidetune.errors import SlidetuneError
from slidetune.plans import Activations, Plan, Recompute
from slidetune.runtime.adam import AdamW
from slidetune.runtime.lanes import TaskFailed
from slidetune.runtime.trainer import NonFiniteLoss, SlidingTrainer

from ..slidetune.reference import SMALL_CONFIGS
from .reference import DEVICE, make_model, random_batches
from .test_dropout import GPT2
from .test_exactness import CONFIGS, KNOBS, drawn

SIZES = {"seq_len": 16, "micro_batch": 2, "chunk_bytes": 8192, "adam_threads": 1}
LLAMA = SMALL_CONFIGS["llama"]
# A step much longer than any rounding: evaluating too early or updating twice would show.
OPTIMIZER = AdamW(lr=1e-2, weight_decay=0.1)

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("no_threads_left")]


def trainer_of(config, plan, **options):
    options = {"optimizer": OPTIMIZER, "device": DEVICE} | options
    return SlidingTrainer(make_model(config), plan, **options)


def same_weights(one, other):
    return [name for name, value in one.items() if not torch.equal(other[name], value)] == []


def check_against_steps(config, plan, *, padded=False, **options):
    """Losses before each step are the steps', and the steps' are those of training alone, as are the weights."""
    batches = list(random_batches(config, plan, 3, padded=padded))
    with trainer_of(config, plan, **options) as trainer:
        expected = [trainer.step(batch) for batch in batches]
        weights = trainer.state_dict()
    with trainer_of(config, plan, **options) as trainer:
        found = []
        for batch, other in zip(batches, reversed(batches), strict=True):
            # Twice: the first leaves nothing behind that changes the second.
            losses = {trainer.evaluate(batch), trainer.evaluate(batch)}
            trainer.evaluate(other)
            found.append((losses, trainer.step(batch)))
        assert found == [({loss}, loss) for loss in expected]
        assert same_weights(trainer.state_dict(), weights)
        # Of the last step's update too.
        last = trainer.evaluate(batches[0])
        assert last == trainer.step(batches[0]) != expected[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name):
    check_against_steps(CONFIGS[name], Plan(model=f"small {name}", **SIZES), padded=True)


@pytest.mark.parametrize("model", ["llama", "phi3, tied"])
@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob(knob, model, tmp_path):
    check_against_steps(CONFIGS[model], Plan(model=model, **(SIZES | KNOBS[knob])), nvme_folder=tmp_path)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("update", ["backward", "forward"])
@pytest.mark.parametrize("resident", [2, 5])
def test_resident_layers(resident, update, accumulation):
    plan = Plan(model="llama", resident_layers=resident, update=update, accumulation=accumulation, **SIZES)
    check_against_steps(LLAMA, plan)


@given(drawn())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_any_plan(tmp_path_factory, case):
    config, plan = case
    check_against_steps(config, plan, padded=plan.seq_len > 10, nvme_folder=tmp_path_factory.getbasetemp())


@given(st.lists(st.booleans(), min_size=3, max_size=8), st.sampled_from(["backward", "forward"]))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_sequence_of_steps_and_evaluations(evaluations, update):
    """Also several in a row, and steps that go on while the next one is given."""
    plan = Plan(model="llama", update=update, clip_norm=0.3 if update == "forward" else None, window=3, **SIZES)
    held_out, *batches = random_batches(LLAMA, plan, 1 + len(evaluations))
    with trainer_of(LLAMA, plan) as alone, trainer_of(LLAMA, plan) as evaluated:
        for evaluates, batch in zip(evaluations, batches, strict=True):
            if evaluates:
                evaluated.evaluate(held_out)
            assert evaluated.step(batch) == alone.step(batch)
            assert evaluated.grad_norm() == alone.grad_norm()
        assert (evaluated.steps, evaluated.updates) == (alone.steps, alone.updates)
        assert same_weights(evaluated.state_dict(), alone.state_dict())


def test_a_loss_in_chunks():
    check_against_steps(LLAMA, Plan(model="llama", **SIZES), loss_chunk_tokens=7)


def test_packed_and_shorter_batches():
    plan = Plan(model="llama", **SIZES)
    ids = next(random_batches(LLAMA, plan, 1))["input_ids"]
    packed = {"input_ids": ids, "position_ids": torch.tensor([[*range(6), *range(10)]] * 2)}
    short = {"input_ids": ids[:, :5]}
    with trainer_of(LLAMA, plan) as trainer:
        for batch in (packed, short, packed):
            assert trainer.evaluate(batch) == trainer.step(batch)


# --- dropout


def test_dropout_is_off_and_training_draws_as_without_evaluation():
    plan = Plan(model="small gpt2", **SIZES)
    config = GPT2 | {"embd_pdrop": 0.3}
    still = config | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    held_out, *batches = random_batches(config, plan, 3)
    with trainer_of(still, plan) as trainer:
        expected = trainer.step(held_out)
    with trainer_of(config, plan) as trainer:
        losses = [trainer.step(batch) for batch in batches]
        weights = trainer.state_dict()
    with trainer_of(config, plan) as trainer:
        torch.manual_seed(3)
        before = torch.get_rng_state()
        assert trainer.evaluate(held_out) == expected
        assert torch.equal(torch.get_rng_state(), before)
        found = []
        for batch in batches:
            found.append(trainer.step(batch))
            assert trainer.evaluate(held_out) == trainer.evaluate(held_out)
        assert found == losses
        assert same_weights(trainer.state_dict(), weights)


# --- memory


def gpu_peak_bytes(*calls):
    """The most GPU memory in use meanwhile; 0 on the CPU."""
    on_cuda = torch.device(DEVICE).type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    for call in calls:
        call()
    return torch.cuda.max_memory_allocated() if on_cuda else 0


def test_it_takes_no_buffers_and_no_threads_of_its_own(tmp_path):
    plan = Plan(
        model="llama",
        optimizer_nvme=2,
        weights_nvme=1,
        activations=Activations(gpu=1, nvme=1),
        recompute=Recompute(keep=1),
        **SIZES,
    )
    with trainer_of(LLAMA, plan, nvme_folder=tmp_path) as trainer:
        batches = list(random_batches(LLAMA, plan, 2))
        peaks = [gpu_peak_bytes(lambda: trainer.step(batches[0]), trainer.finish)]
        locked, written, threads = trainer.page_locked_bytes, trainer.nvme_written_bytes, set(threading.enumerate())
        peaks += [gpu_peak_bytes(lambda batch=batch: trainer.evaluate(batch)) for batch in batches]
        assert trainer.page_locked_bytes == locked
        assert trainer.nvme_written_bytes == written
        assert set(threading.enumerate()) == threads
        assert max(peaks) == peaks[0]


def test_it_follows_the_schedule_that_is_predicted():
    plan = Plan(model="llama", window=3, prefetch=2, **SIZES)
    with trainer_of(LLAMA, plan) as trainer:
        trainer.evaluate(next(random_batches(LLAMA, plan, 1)))
        assert trainer._evaluation.schedule == build_forward(trainer.spec, plan, trainer.kernels)


# --- errors


def refusals(config, plan):
    ids = next(random_batches(config, plan, 1))["input_ids"]
    yield ids
    yield {"labels": ids}
    yield {"input_ids": ids[:1]}
    yield {"input_ids": torch.cat((ids, ids), 1)}
    yield {"input_ids": ids, "labels": ids[:, :4]}
    yield {"input_ids": ids + config["vocab_size"]}
    yield {"input_ids": ids.float()}
    yield {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    yield {"input_ids": ids, "token_type_ids": ids}


def test_a_batch_that_a_step_refuses_is_refused_alike():
    plan = Plan(model="llama", **SIZES)
    with trainer_of(LLAMA, plan) as trainer:
        for batch in refusals(LLAMA, plan):
            messages = []
            for take in (trainer.step, trainer.evaluate):
                with pytest.raises(SlidetuneError) as caught:
                    take(batch)
                messages.append(str(caught.value))
            assert messages[0] == messages[1]
        good = next(random_batches(LLAMA, plan, 1))
        assert trainer.evaluate(good) == trainer.step(good)


def test_a_closed_trainer():
    plan = Plan(model="llama", **SIZES)
    trainer = trainer_of(LLAMA, plan)
    trainer.evaluate(next(random_batches(LLAMA, plan, 1)))
    trainer.close()
    with pytest.raises(SlidetuneError, match="closed"):
        trainer.evaluate(next(random_batches(LLAMA, plan, 1)))


def breakable_model():
    """A model, and a list whose one element says whether it computes NaN."""
    model, broken = make_model(LLAMA), [False]
    model.model.layers[1].register_forward_hook(lambda module, inputs, out: out * float("nan") if broken[0] else out)
    return model, broken


def test_a_loss_that_is_no_number_is_returned_and_nothing_is_harmed():
    plan = Plan(model="llama", **SIZES)
    good, bad = random_batches(LLAMA, plan, 2)
    model, broken = breakable_model()
    with SlidingTrainer(model, plan, optimizer=OPTIMIZER, device=DEVICE) as trainer:
        expected = trainer.evaluate(good)
        broken[0] = True
        assert trainer.evaluate(bad) != trainer.evaluate(bad)
        broken[0] = False
        assert trainer.evaluate(good) == expected == trainer.step(good)


def test_after_a_step_that_was_refused():
    plan = Plan(model="llama", **SIZES)
    good, bad = random_batches(LLAMA, plan, 2)
    model, broken = breakable_model()
    with SlidingTrainer(model, plan, optimizer=OPTIMIZER, device=DEVICE) as trainer:
        expected = trainer.evaluate(good)
        broken[0] = True
        with pytest.raises(NonFiniteLoss):
            trainer.step(bad)
        trainer.finish()
        broken[0] = False
        assert trainer.evaluate(good) == expected


def test_an_update_that_clipping_refused_is_told_of():
    plan = Plan(model="llama", update="forward", clip_norm=1.0, **SIZES)
    model = make_model(LLAMA)
    model.model.layers[1].mlp.register_full_backward_hook(
        lambda module, into, out: tuple(g * float("nan") for g in into)
    )
    batch = next(random_batches(LLAMA, plan, 1))
    with SlidingTrainer(model, plan, optimizer=OPTIMIZER, device=DEVICE) as trainer:
        expected = trainer.step(batch)
        with pytest.warns(UserWarning, match="step 1: its gradients are not finite"):
            assert trainer.evaluate(batch) == expected


@pytest.mark.parametrize("op", ["gather", "read weights", "fetch", "forward", "loss"])
def test_a_failure_in_any_task(op, tmp_path):
    plan = Plan(model="llama", optimizer_nvme=2, weights_nvme=1, **SIZES)
    trainer = trainer_of(LLAMA, plan, nvme_folder=tmp_path)
    batch = next(random_batches(LLAMA, plan, 1))
    trainer.step(batch)
    trainer.evaluate(batch)
    tasks = trainer._evaluation.schedule.tasks
    index = max(i for i, task in enumerate(tasks) if task.work.op == op)

    def fail(step):
        raise ValueError("on purpose")

    trainer._evaluation.operations.run[index] = fail
    with pytest.raises(TaskFailed, match=f"{op} of unit {tasks[index].unit}.*on purpose") as caught:
        trainer.evaluate(batch)
    assert caught.value.lane == tasks[index].work.lane
    for again in (trainer.step, trainer.evaluate):
        with pytest.raises(TaskFailed, match="on purpose"):
            again(batch)
    trainer.close()
    assert list(tmp_path.iterdir()) == []


def step_then_evaluate(trainer, batch):
    """A step returns with its loss; what fails later shows at the next call."""
    trainer.step(batch)
    trainer.evaluate(batch)


def test_a_failure_in_what_was_left_of_the_step(tmp_path):
    plan = Plan(model="llama", **SIZES)
    trainer = trainer_of(LLAMA, plan)
    batch = next(random_batches(LLAMA, plan, 1))

    def fail(step):
        raise ValueError("on purpose")

    last = max(i for i, task in enumerate(trainer.schedule.tasks) if task.work.op == "backward")
    trainer._operations.run[last] = fail
    with pytest.raises(TaskFailed, match=r"backward of unit 1.*on purpose"):
        step_then_evaluate(trainer, batch)
    trainer.close()


def test_a_dropped_trainer_that_has_evaluated_takes_its_threads_along():
    plan = replace(Plan(model="llama", **SIZES), window=1, prefetch=0)
    before = set(threading.enumerate())
    trainer = trainer_of(LLAMA, plan)
    trainer.evaluate(next(random_batches(LLAMA, plan, 1)))
    del trainer
    gc.collect()
    assert not {thread for thread in set(threading.enumerate()) - before if thread.name.startswith("slidetune")}


# --- several batches


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "dropout"])
def test_several_batches_give_what_each_gives_alone(config):
    plan = Plan(model="several", window=3, prefetch=2, accumulation=2, **SIZES)
    several = list(random_batches(config, plan, 5, padded=config is LLAMA))
    with trainer_of(config, plan) as trainer:
        assert trainer.evaluate_all([]) == []
        alone = [trainer.evaluate(batch) for batch in several]
        assert trainer.evaluate_all(iter(several)) == alone
        trainer.step(several[0])
        assert trainer.evaluate_all(several[:2]) == [trainer.evaluate(batch) for batch in several[:2]] != alone[:2]


def test_a_batch_is_under_way_before_the_one_before_it_is_done(monkeypatch):
    plan, order = Plan(model="llama", **SIZES), []
    submit, evaluated = SlidingTrainer._submit, SlidingTrainer._evaluated
    with trainer_of(LLAMA, plan) as trainer:
        trainer.evaluate(next(random_batches(LLAMA, plan, 1)))
        monkeypatch.setattr(SlidingTrainer, "_submit", lambda *a: (order.append("begun"), submit(*a))[1])
        monkeypatch.setattr(SlidingTrainer, "_evaluated", lambda *a: (order.append("done"), evaluated(*a))[1])
        trainer.evaluate_all(random_batches(LLAMA, plan, 3))
    assert order == ["begun", "begun", "done", "begun", "done", "done"]


@pytest.mark.parametrize("fault", ["batch", "iterable"])
def test_a_fault_among_several_batches_leaves_the_trainer_as_it_was(fault):
    plan = Plan(model="small gpt2", **SIZES)
    good = list(random_batches(GPT2, plan, 3))

    def faulty():
        yield from good[:2]
        if fault == "iterable":
            raise KeyError("no more")
        yield {"labels": good[0]["input_ids"]}

    with trainer_of(GPT2, plan) as trainer:
        expected = trainer.evaluate(good[2]), trainer.step(good[0])
    with trainer_of(GPT2, plan) as trainer:
        with pytest.raises(KeyError if fault == "iterable" else SlidetuneError):
            trainer.evaluate_all(faulty())
        # In the step, with dropout again.
        assert (trainer.evaluate(good[2]), trainer.step(good[0])) == expected
