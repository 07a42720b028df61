"""A trainer that is dropped without `close` takes its threads and files with it."""

from __future__ import annotations

import gc
import threading

import pytest

torch = pytest.importorskip("torch")

from slidetune.plans import Plan
from slidetune.runtime.steps import Step
from slidetune.runtime.trainer import SlidingTrainer

from ..slidetune.reference import SMALL_CONFIGS
from .reference import DEVICE, make_model, random_batches


def test_threads_and_files_go_with_the_trainer(tmp_path):
    config = SMALL_CONFIGS["llama"]
    plan = Plan(model="llama", seq_len=16, optimizer_nvme=1, chunk_bytes=8192, adam_threads=1)
    before = set(threading.enumerate())
    trainer = SlidingTrainer(make_model(config), plan, device=DEVICE, nvme_folder=tmp_path)
    for batch in random_batches(config, plan, 1):
        trainer.step(batch)
    assert set(threading.enumerate()) - before
    del trainer
    gc.collect()
    assert not {thread for thread in set(threading.enumerate()) - before if thread.name.startswith("slidetune")}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("update", ["backward", "forward"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_steps_of_the_past_are_let_go_of(update, name):
    """Each step knows the one before, whose gradients it may have to apply; not all that ever were."""
    config = SMALL_CONFIGS[name]
    plan = Plan(model=name, seq_len=16, chunk_bytes=8192, adam_threads=1, update=update)
    with SlidingTrainer(make_model(config), plan, device=DEVICE) as trainer:
        for batch in random_batches(config, plan, 12):
            trainer.step(batch)
        gc.collect()
        assert sum(type(one) is Step for one in gc.get_objects()) <= 6
