"""A trainer that is dropped without `close` takes its threads and files with it."""

from __future__ import annotations

import gc
import threading

import pytest

torch = pytest.importorskip("torch")

from slidetune.plans import Plan
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
