"""What a training writes to NVMe is what its schedule says, step by step, and no more when it ends."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from slidetune.plans import Plan
from slidetune.runtime.nvme import aligned
from slidetune.runtime.trainer import SlidingTrainer

from ..slidetune.reference import SMALL_CONFIGS
from .reference import DEVICE, make_model, random_batches


@pytest.mark.parametrize("update", ["backward", "forward"])
def test_every_step_writes_what_the_schedule_says(tmp_path, update):
    config = SMALL_CONFIGS["llama"]
    plan = Plan(model="llama", seq_len=16, optimizer_nvme=2, chunk_bytes=8192, adam_threads=1, update=update)
    with SlidingTrainer(make_model(config), plan, device=DEVICE, nvme_folder=tmp_path) as trainer:
        writes = [task.work.bytes for task in trainer.schedule.tasks if task.work.op == "write state"]
        loaded = trainer.nvme_written_bytes
        for batch in random_batches(config, plan, 3):
            trainer.step(batch)
        trainer.finish()
        written = (trainer.nvme_written_bytes - loaded) / 3
    # A late update's first step has nothing to apply, and writes nothing; the last one's is made at the end.
    padding = sum(3 * aligned(1) for _ in writes)
    assert sum(writes) <= written <= sum(writes) + padding
