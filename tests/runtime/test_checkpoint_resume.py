"""A run that was stopped and resumed gives the losses and weights of one that never stopped, bit for bit."""

from __future__ import annotations

import itertools
import json
import logging
import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import numpy as np

from slidetune.errors import SlidetuneError
from slidetune.families import spec_from_config
from slidetune.plans import Plan
from slidetune.runtime.adam import AdamW
from slidetune.runtime.checkpoint import Checkpoints, load_into, read_manifest
from slidetune.runtime.checkpoint.random_states import capture, restore
from slidetune.runtime.trainer import SlidingTrainer, decay_where_it_belongs

from ..slidetune.reference import SMALL_CONFIGS
from ..strategies import plans
from .reference import DEVICE, make_model, random_batches

OPTIMIZER = AdamW(lr=1e-2, weight_decay=0.1)
SIZES = {"seq_len": 12, "micro_batch": 2, "chunk_bytes": 8192, "adam_threads": 1}
LLAMA = SMALL_CONFIGS["llama"] | {"num_hidden_layers": 3}
WITH_DROPOUT = SMALL_CONFIGS["gpt2, own MLP width, untied"] | {"attn_implementation": "eager"}
CONFIGS = {
    "llama": LLAMA,
    "qwen2": SMALL_CONFIGS["qwen2"] | {"num_hidden_layers": 3},
    "gpt2 with dropout": WITH_DROPOUT,
    "qwen3_moe, dense layers": SMALL_CONFIGS["qwen3_moe, dense layers"],
}

pytestmark = pytest.mark.usefixtures("no_threads_left")


def lr_scale(step: int) -> float:
    return 1.0 / step


def train(trainer, batches, first):
    return [trainer.step(batch, lr_scale=lr_scale(n)) for n, batch in enumerate(batches, start=first)]


@st.composite
def two_plans(draw):
    """A model, and two plans for it that compute the same."""
    name = draw(st.sampled_from(sorted(CONFIGS)))
    config = CONFIGS[name]
    spec = spec_from_config(config, name)
    pair = [draw(plans(spec, max_accumulation=2)) for _ in range(2)]
    clip_norm = draw(st.sampled_from([None, 0.3])) if all(p.update == "forward" for p in pair) else None
    changes = {
        "seq_len": draw(st.integers(2, 16)),
        "micro_batch": draw(st.integers(1, 2)),
        "accumulation": pair[0].accumulation,
        "gpu_memory_gib": None,
        "clip_norm": clip_norm,
        "model": f"small {name}",
    }
    return config, *(
        replace(plan, **changes, chunk_bytes=draw(st.sampled_from([4096, 12288])), adam_threads=1) for plan in pair
    )


@given(two_plans(), st.integers(1, 2), st.sampled_from([None, 0, 1_000_000]))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@pytest.mark.timeout(400)
def test_any_plan_goes_on_from_any_other(tmp_path_factory, case, stop, copy_bytes):
    config, first, second = case
    folder = tmp_path_factory.mktemp("run")
    how = {"optimizer": OPTIMIZER, "device": DEVICE, "nvme_folder": folder}
    batches = list(random_batches(config, first, 4))
    with SlidingTrainer(make_model(config), first, seed=7, **how) as trainer:
        losses = train(trainer, batches, 1)
        weights = trainer.state_dict()
    with (
        Checkpoints(folder, copy_bytes=copy_bytes) as checkpoints,
        SlidingTrainer(make_model(config), first, seed=7, **how) as trainer,
    ):
        again = train(trainer, batches[:stop], 1)
        saved = checkpoints.save(trainer, extra={"next": stop + 1})
        # What goes on after it must show neither in the checkpoint nor in this run.
        same = again + train(trainer, batches[stop:], stop + 1)
        assert_same(same, losses, trainer.state_dict(), weights)
    assert saved.seconds is not None
    with SlidingTrainer(make_model(config, seed=5), second, **how) as trainer:
        # Whatever it did before.
        train(trainer, batches[:1], 1)
        extra = load_into(trainer, folder)
        resumed = again + train(trainer, batches[stop:], extra["next"])
        assert_same(resumed, losses, trainer.state_dict(), weights)


def assert_same(losses, expected_losses, weights, expected):
    if DEVICE == "cpu":
        assert losses == expected_losses
        assert [name for name, value in expected.items() if not torch.equal(weights[name], value)] == []
    else:
        assert max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True)) < 0.05


@pytest.mark.parametrize("places", [{}, {"optimizer_nvme": 3, "weights_nvme": 3}, {"resident_layers": 2}])
def test_frozen_parameters(tmp_path, places):
    """Of layers partly and wholly frozen; on NVMe their halves share blocks with trained ones."""
    usual = decay_where_it_belongs(OPTIMIZER)

    def rule(name, parameter):
        frozen = "layers.1." in name or "down_proj" in name or "norm" in name or "embed" in name
        return None if frozen else usual(name, parameter)

    plan = Plan(model="llama", **SIZES)
    other = replace(plan, **places)
    batches = list(random_batches(LLAMA, plan, 3))
    how = {"rule": rule, "device": DEVICE, "nvme_folder": tmp_path}
    for saving, resuming in itertools.product((plan, other), repeat=2):
        with (
            Checkpoints(tmp_path / "run", keep=1) as checkpoints,
            SlidingTrainer(make_model(LLAMA), saving, **how) as trainer,
        ):
            train(trainer, batches[:2], 1)
            path = checkpoints.save(trainer).path
            losses = train(trainer, batches[2:], 3)
            weights = trainer.state_dict()
        with SlidingTrainer(make_model(LLAMA, seed=5), resuming, checkpoint=path, **how) as trainer:
            assert_same(train(trainer, batches[2:], 3), losses, trainer.state_dict(), weights)


def test_a_checkpoint_is_all_that_resuming_needs(tmp_path):
    """Not even the model's directory, whose tokenizer is carried on."""
    home = tmp_path / "model"
    make_model(LLAMA).save_pretrained(home)
    (home / "tokenizer.json").write_text("{}")
    plan = Plan(model=str(home), **SIZES)
    batches = list(random_batches(LLAMA, plan, 3))
    with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
        with SlidingTrainer(home, plan, optimizer=OPTIMIZER, device=DEVICE) as trainer:
            train(trainer, batches[:2], 1)
            path = checkpoints.save(trainer, extra={"place": [1, 2.5, None]}).path
            losses = train(trainer, batches[2:], 3)
            weights = trainer.state_dict()
        checkpoints.wait()
        (home / "tokenizer.json").unlink()
        with SlidingTrainer(path / "model", plan, checkpoint=path, optimizer=OPTIMIZER, device=DEVICE) as trainer:
            assert (trainer.steps, trainer.updates) == (2, 2)
            assert_same(train(trainer, batches[2:], 3), losses, trainer.state_dict(), weights)
            for _ in range(2):
                last = checkpoints.save(trainer).path
            checkpoints.wait()
    assert [p.name for p in (tmp_path / "run").glob("step-*")] == ["step-00000003.1"]
    assert (last / "model" / "tokenizer.json").read_text() == "{}"
    manifest = read_manifest(last)
    assert manifest.step == 3
    assert manifest.plan["seq_len"] == plan.seq_len


def test_a_run_that_went_back_goes_on_from_where_it_is(tmp_path):
    plan = Plan(model="llama", **SIZES)
    batches = list(random_batches(LLAMA, plan, 3))
    with (
        Checkpoints(tmp_path) as checkpoints,
        SlidingTrainer(make_model(LLAMA), plan, optimizer=OPTIMIZER, device=DEVICE) as trainer,
    ):
        train(trainer, batches[:1], 1)
        early = checkpoints.save(trainer).path
        train(trainer, batches[1:], 2)
        checkpoints.save(trainer)
        checkpoints.wait()
        load_into(trainer, early)
        train(trainer, batches[1:2], 2)
        checkpoints.save(trainer)
        checkpoints.wait()
        load_into(trainer, tmp_path)
        assert trainer.steps == 2


def test_what_does_not_fit_is_refused(tmp_path, caplog):
    plan = Plan(model="llama", **SIZES)
    batch = next(random_batches(LLAMA, plan, 1))
    how = {"device": DEVICE}
    with (
        Checkpoints(tmp_path) as checkpoints,
        SlidingTrainer(make_model(LLAMA), plan, optimizer=OPTIMIZER, **how) as trainer,
    ):
        trainer.step(batch)
        checkpoints.save(trainer)
        with pytest.raises(SlidetuneError, match="extra can't be written as JSON"):
            checkpoints.save(trainer, extra={"a": object()})
    with SlidingTrainer(make_model(LLAMA), plan, optimizer=replace(OPTIMIZER, lr=0.5), **how) as trainer:
        before = trainer.state_dict()
        with pytest.raises(SlidetuneError, match=r"other hyper-parameters: lr 0.01, here 0.5"):
            load_into(trainer, tmp_path)
        assert all(torch.equal(before[name], value) for name, value in trainer.state_dict().items())
        load_into(trainer, tmp_path, same_optimizer=False)
        assert trainer.steps == 1
    smaller = LLAMA | {"num_hidden_layers": 2}
    with (
        SlidingTrainer(make_model(smaller), plan, optimizer=OPTIMIZER, **how) as trainer,
        pytest.raises(SlidetuneError, match="this model is another one"),
    ):
        load_into(trainer, tmp_path)
    wider = LLAMA | {"intermediate_size": 192}
    with (
        SlidingTrainer(make_model(wider), plan, optimizer=OPTIMIZER, **how) as trainer,
        pytest.raises(SlidetuneError, match=r"\(176, 96\); this model's is"),
    ):
        load_into(trainer, tmp_path)

    def rule(name, parameter):
        return None if "up_proj" in name else OPTIMIZER

    with (
        SlidingTrainer(make_model(LLAMA), plan, rule=rule, **how) as trainer,
        pytest.raises(SlidetuneError, match="was trained there, and here it is frozen"),
    ):
        load_into(trainer, tmp_path)
    with (
        caplog.at_level(logging.WARNING),
        SlidingTrainer(make_model(LLAMA), replace(plan, micro_batch=3), optimizer=OPTIMIZER, **how) as trainer,
    ):
        load_into(trainer, tmp_path)
    assert "micro_batch was 2 and is 3" in caplog.text


def test_random_generators_go_on():
    states = json.loads(json.dumps(capture(torch.device("cpu"))))
    drawn = (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist())
    restore(states, torch.device("cpu"))
    assert drawn == (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist())
