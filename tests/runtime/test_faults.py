"""Whatever fails, the caller hears of it soon, by lane, task and cause, and nothing is left behind."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import signal
import threading
import time

import pytest

torch = pytest.importorskip("torch")

from slidetune.builder import build
from slidetune.errors import DoesNotFit, SlidetuneError
from slidetune.families import spec_from_config
from slidetune.plan_file import write_plan
from slidetune.plans import Activations, Plan, Recompute
from slidetune.runtime import arena
from slidetune.runtime import trainer as trainer_module
from slidetune.runtime.adam import AdamW
from slidetune.runtime.lanes import Lanes, TaskFailed
from slidetune.runtime.operations import Operations
from slidetune.runtime.trainer import NonFiniteLoss, SlidingTrainer

from ..slidetune.reference import SMALL_CONFIGS
from .reference import DEVICE, PlainLoop, assert_same_losses, assert_same_weights, make_model, random_batches

CONFIG = SMALL_CONFIGS["llama"]
SIZES = {"seq_len": 16, "micro_batch": 1, "chunk_bytes": 1 << 16, "adam_threads": 1}
# Every lane and every operation there is, in one plan.
EVERYTHING = Plan(
    model="llama",
    resident_layers=1,
    optimizer_nvme=2,
    weights_nvme=1,
    activations=Activations(gpu=1, nvme=1),
    recompute=Recompute(keep=1, offload=1),
    accumulation=2,
    **SIZES,
)

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_threads_left")]


class Injected(Exception):
    pass


def inject(trainer, op, lane, action):
    """Have the last task of this operation and lane do something else."""
    tasks = trainer.schedule.tasks
    index = max(i for i, task in enumerate(tasks) if (task.work.op, task.work.lane) == (op, lane))
    trainer._operations.run[index] = action
    return index


def operations():
    schedule = build(spec_from_config(CONFIG, "llama"), EVERYTHING)
    return sorted({(task.work.op, task.work.lane) for task in schedule.tasks})


def whole_step(trainer, batch):
    """A step returns with its loss; what fails later shows at the next call."""
    trainer.step(batch)
    trainer.finish()


def fail(step):
    raise Injected("on purpose")


@pytest.mark.parametrize(("op", "lane"), operations())
def test_a_failure_in_any_task_of_any_lane(op, lane, tmp_path):
    trainer = SlidingTrainer(make_model(CONFIG), EVERYTHING, device=DEVICE, nvme_folder=tmp_path)
    batches = list(random_batches(CONFIG, EVERYTHING, 2))
    trainer.step(batches[0])
    index = inject(trainer, op, lane, fail)
    began = time.monotonic()
    with pytest.raises(TaskFailed, match="on purpose") as caught:
        whole_step(trainer, batches[1])
    assert time.monotonic() - began < 10
    assert isinstance(caught.value.__cause__, Injected)
    assert caught.value.lane == lane
    assert f"{op} of unit {trainer.schedule.tasks[index].unit}" in str(caught.value)
    with pytest.raises(TaskFailed):
        trainer.step(batches[1])
    trainer.close()
    with pytest.raises(SlidetuneError, match="closed"):
        trainer.step(batches[1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_failing_disk(operation, tmp_path):
    trainer = SlidingTrainer(make_model(CONFIG), EVERYTHING, device=DEVICE, nvme_folder=tmp_path)

    def refuse(*_):
        raise OSError(errno.EIO, "the disk is gone")

    setattr(trainer._nvme, operation, refuse)
    # Operations hold the file's methods: bind them anew.
    trainer._lanes.stop()
    trainer._operations = Operations(trainer.schedule, trainer._operations.machine)
    trainer._lanes = Lanes(trainer.schedule, trainer._operations.run, trainer.device)
    with pytest.raises(TaskFailed, match="the disk is gone") as caught:
        whole_step(trainer, next(random_batches(CONFIG, EVERYTHING, 1)))
    assert caught.value.lane == f"nvme_{operation}"
    trainer.close()


def test_no_nvme_folder():
    with pytest.raises(SlidetuneError, match=r"nvme_folder, or --nvme-dir"):
        SlidingTrainer(make_model(CONFIG), EVERYTHING, device=DEVICE)


def test_an_nvme_folder_that_is_not_there(tmp_path):
    with pytest.raises(SlidetuneError, match="cannot be made: No such file") as caught:
        SlidingTrainer(make_model(CONFIG), EVERYTHING, device=DEVICE, nvme_folder=tmp_path / "nowhere")
    assert "--nvme-dir" in caught.value.hint


def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch):
    class Full:
        f_bavail, f_frsize = 1, 4096

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    with pytest.raises(OSError, match="disk full"):
        SlidingTrainer(make_model(CONFIG), EVERYTHING, device=DEVICE, nvme_folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_too_little_ram(monkeypatch):
    monkeypatch.setattr(arena, "available_bytes", lambda: 1000)
    with pytest.raises(DoesNotFit, match=r"of RAM; 1,?000 B are available") as caught:
        SlidingTrainer(make_model(CONFIG), Plan(model="llama", **SIZES), device=DEVICE)
    assert "--ram" in caught.value.hint
    assert "optimizer_nvme" in caught.value.hint


def test_ram_that_others_take_meanwhile(monkeypatch):
    monkeypatch.setattr(arena, "available_bytes", iter([1 << 40, 1000]).__next__)
    with pytest.raises(DoesNotFit, match=r"could not be allocated: .* of host memory"):
        SlidingTrainer(make_model(CONFIG), Plan(model="llama", **SIZES), device=DEVICE)


def test_memory_that_torch_is_refused(monkeypatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSee the documentation.")

    monkeypatch.setattr(trainer_module, "Pools", refuse)
    with pytest.raises(DoesNotFit, match=r"could not be allocated: CUDA out of memory\. Tried to allocate 9 GiB\.\n"):
        SlidingTrainer(make_model(CONFIG), Plan(model="llama", **SIZES), device=DEVICE)


@pytest.mark.parametrize("update", ["backward", "forward"])
def test_ctrl_c_stops_between_tasks(update):
    plan = Plan(model="llama", update=update, **SIZES)
    trainer = SlidingTrainer(make_model(CONFIG), plan, device=DEVICE)
    started, sent, ended = (threading.Event() for _ in range(3))

    def slow(step):
        started.set()
        sent.wait()
        time.sleep(0.3)
        ended.set()

    inject(trainer, "forward", "gpu", slow)

    def interrupt():
        started.wait()
        os.kill(os.getpid(), signal.SIGINT)
        sent.set()

    threading.Thread(target=interrupt, name="interrupter").start()
    with pytest.raises(KeyboardInterrupt):
        trainer.step(next(random_batches(CONFIG, plan, 1)))
    assert ended.is_set()
    with pytest.raises(SlidetuneError, match="stopped"):
        trainer.step(next(random_batches(CONFIG, plan, 1)))
    trainer.close()


@pytest.mark.parametrize("knobs", [{}, {"update": "forward"}, {"update": "forward", "clip_norm": 0.5}])
def test_a_loss_that_is_no_number_changes_nothing(knobs):
    plan = Plan(model="llama", optimizer_nvme=0, accumulation=2, **SIZES, **knobs)
    model = make_model(CONFIG)
    poison = 5
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    loop = PlainLoop(copy.deepcopy(model), accumulation=2, clip_norm=plan.clip_norm)
    good = []
    for batch in random_batches(CONFIG, plan, 4):
        ids = batch["input_ids"]
        good.append({"input_ids": ids.masked_fill(ids == poison, 6)})
    bad = {"input_ids": good[0]["input_ids"].clone()}
    bad["input_ids"][-1, 3] = poison
    with SlidingTrainer(model, plan, device=DEVICE) as trainer:
        for number, batch in enumerate(good):
            if number in (0, 2):
                with pytest.raises(NonFiniteLoss, match="refused"):
                    trainer.step(bad)
            assert_same_losses([trainer.step(batch)], [loop.step(batch)])
        assert trainer.updates == 4
        assert trainer.steps == 6
        weights = trainer.state_dict()
    plain = loop.state_dict()
    assert_same_weights(*({name: value.nan_to_num(7.0) for name, value in found.items()} for found in (weights, plain)))


def test_a_loss_that_is_no_number_is_taken_if_told_so():
    plan = Plan(model="llama", **SIZES)
    model = make_model(CONFIG)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with SlidingTrainer(model, plan, device=DEVICE, accept_non_finite=True) as trainer:
        assert trainer.step(next(random_batches(CONFIG, plan, 1))) != 0
        assert trainer.updates == 1


def test_a_plan_for_another_model():
    with pytest.raises(SlidetuneError, match=r"the plan is for qwen3-0\.6b, 28 layers"):
        SlidingTrainer(make_model(CONFIG), Plan(model="qwen3-0.6b", **SIZES), device=DEVICE)


def test_a_plan_for_a_model_of_the_same_sizes_and_another_family(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "mistral"}))
    refused("of family mistral; this model has .* of family llama", plan=Plan(model=str(tmp_path), **SIZES))


def test_a_plan_by_a_hub_id_of_the_catalog():
    refused(
        r"the plan is for meta-llama/Llama-3\.1-70B, 80 layers", plan=Plan(model="meta-llama/Llama-3.1-70B", **SIZES)
    )


def test_a_plan_for_what_can_not_be_looked_up(caplog):
    for model, told in (("someone/some-model", True), ("gpt2", False)):
        caplog.clear()
        with contextlib.suppress(SlidetuneError):
            SlidingTrainer(make_model(CONFIG), Plan(model=model, **SIZES), device=DEVICE).close()
        assert ("The plan is for someone/some-model, which is neither" in caplog.text) == told


def test_a_closed_trainer_says_so():
    plan = Plan(model="llama", update="forward", clip_norm=1.0, **SIZES)
    with SlidingTrainer(make_model(CONFIG), plan, device=DEVICE, trace=2) as trainer:
        batch = next(random_batches(CONFIG, plan, 1))
        trainer.step(batch)
    uses = (
        lambda: trainer.step(batch),
        trainer.state_dict,
        lambda: trainer.save("nowhere"),
        trainer.grad_norm,
        lambda: trainer.trace,
    )
    for use in uses:
        with pytest.raises(SlidetuneError, match="this trainer is closed"):
            use()
    trainer.finish()
    trainer.close()


def test_a_plan_for_more_layers():
    with pytest.raises(SlidetuneError, match="resident_layers"):
        SlidingTrainer(make_model(CONFIG), Plan(model="llama", resident_layers=40, **SIZES), device=DEVICE)


def test_a_cap_that_is_too_low():
    with pytest.raises(DoesNotFit, match="gpu_memory_gib") as caught:
        SlidingTrainer(make_model(CONFIG), Plan(model="llama", gpu_memory_gib=1e-4, **SIZES), device=DEVICE)
    assert "--gpu-memory" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "no input_ids"),
        ({"input_ids": torch.ones(3, 16, dtype=torch.long)}, r"1 sequences"),
        ({"input_ids": torch.ones(1, 17, dtype=torch.long)}, "at most 16 tokens"),
        ({"input_ids": torch.full((1, 16), 320)}, "vocabulary is 320"),
        ({"labels": torch.full((1, 16), -100)}, "no label"),
        ({"labels": torch.ones(1, 4, dtype=torch.long)}, "labels must have the shape"),
        ({"labels": torch.full((1, 16), 320)}, r"labels go from 320 to 320; the vocabulary is 320"),
        ({"labels": torch.full((1, 16), -1)}, "labels go from -1 to -1"),
        ({"pixel_values": torch.ones(1)}, "pixel_values"),
        ({"input_ids": torch.ones(1, 16)}, "input_ids must be integers, not float32"),
        ({"input_ids": torch.ones(1, 16, dtype=torch.bool)}, "input_ids must be integers, not bool"),
        ({"labels": torch.ones(1, 16)}, "labels must be integers"),
        ({"attention_mask": torch.ones(1, 16)}, "attention_mask must be integers"),
        ({"input_ids": "some text"}, "input_ids can't be made a tensor"),
        ({"input_ids": [[1, 2], [3]]}, "input_ids can't be made a tensor"),
        ({"position_ids": torch.full((1, 16), 1 << 20)}, "position_ids go from 1048576 to 1048576; the model has"),
        ({"position_ids": torch.full((1, 16), -1)}, "position_ids go from -1"),
    ],
)
def test_batches_that_do_not_fit(change, message):
    plan = Plan(model="llama", **SIZES)
    with SlidingTrainer(make_model(CONFIG), plan, device=DEVICE) as trainer:
        batch = {"input_ids": torch.ones(1, 16, dtype=torch.long)} | change
        with pytest.raises(SlidetuneError, match=message):
            trainer.step({k: v for k, v in batch.items() if v is not None})
        # The trainer goes on.
        assert trainer.step(next(random_batches(CONFIG, plan, 1))) > 0


def test_a_batch_that_is_no_mapping():
    with SlidingTrainer(make_model(CONFIG), Plan(model="llama", **SIZES), device=DEVICE) as trainer:
        with pytest.raises(SlidetuneError, match=r"a batch is a mapping of input_ids.*, not Tensor"):
            trainer.step(torch.ones(1, 16, dtype=torch.long))
        with pytest.raises(SlidetuneError, match="no input_ids"):
            trainer.step({"input_ids": None})


def test_integers_of_any_width_are_the_same_batch():
    plan = Plan(model="llama", **SIZES)
    ids = next(random_batches(CONFIG, plan, 1))["input_ids"]
    mask = torch.ones_like(ids)
    batches = [
        {"input_ids": ids, "labels": ids, "attention_mask": mask},
        {"input_ids": ids.int(), "labels": ids.short(), "attention_mask": mask.bool()},
        {"input_ids": ids.tolist(), "labels": ids.numpy(), "attention_mask": mask.to(torch.uint8)},
    ]
    losses = []
    for batch in batches:
        with SlidingTrainer(make_model(CONFIG), plan, device=DEVICE) as trainer:
            losses.append(trainer.step(batch))
    assert len(set(losses)) == 1


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, "1"])
def test_a_scale_that_is_no_rate(scale):
    plan = Plan(model="llama", **SIZES)
    with (
        SlidingTrainer(make_model(CONFIG), plan, device=DEVICE) as trainer,
        pytest.raises(SlidetuneError, match="lr_scale must be a finite number"),
    ):
        trainer.step(next(random_batches(CONFIG, plan, 1)), lr_scale=scale)


def refused(match, model=None, plan=None, **options):
    with pytest.raises(SlidetuneError, match=match) as caught:
        SlidingTrainer(
            model or make_model(CONFIG), plan or Plan(model="llama", **SIZES), **{"device": DEVICE} | options
        )
    return caught.value


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -1e-5, "fast"])
def test_a_learning_rate_that_is_none(lr):
    refused("the learning rate of model.*must be a finite number", optimizer=AdamW(lr=lr))
    refused("the learning rate of lm_head.weight", rule=lambda name, _: AdamW(lr=lr if "lm_head" in name else 0.1))


def test_no_tokens_at_a_time():
    refused("loss_chunk_tokens must be at least 1, not 0", loss_chunk_tokens=0)


def test_what_is_no_model_or_no_plan(tmp_path):
    error = refused("Linear is no causal language model of transformers", model=torch.nn.Linear(2, 2))
    assert "AutoModelForCausalLM" in error.hint
    refused("no language model with a head", model=make_model(CONFIG).model)
    refused("dict is no plan", plan={"model": "llama"})
    refused("no such file", plan=tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_plan_may_be_its_file(tmp_path, kind):
    plan = Plan(model="llama", **SIZES)
    path = write_plan(tmp_path / "plan.yaml", plan)
    with SlidingTrainer(make_model(CONFIG), kind(path), device=DEVICE) as trainer:
        assert trainer.plan == plan


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99", "cpu:x", "cuda"])
def test_a_device_that_is_not_here(device, monkeypatch):
    if device == "cuda":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = refused(f"device {device} is not here", device=device)
    assert "There is cpu" in error.hint
