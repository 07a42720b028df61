"""Fifty steps on a real text give the plain loop's loss curve, and learn it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from slidetune.plans import Activations, Plan, Recompute
from slidetune.runtime.adam import AdamW
from slidetune.runtime.data import as_bytes, read_samples
from slidetune.runtime.trainer import SlidingTrainer

from ..slidetune.reference import SMALL_CONFIGS
from .reference import DEVICE, PlainLoop, assert_same_losses, assert_same_weights, make_model, weights_on_cpu

TEXT = Path(__file__).parents[1] / "data" / "moby_dick.txt"
STEPS = 50
PLANS = {
    "llama": {"window": 3, "prefetch": 2},
    "qwen2": {
        "update": "forward",
        "clip_norm": 1.0,
        "optimizer_nvme": 2,
        "weights_nvme": 1,
        "activations": Activations(nvme=2),
        "recompute": Recompute(keep=1, offload=1),
    },
}


@pytest.mark.parametrize("name", PLANS)
def test_fifty_steps(name, tmp_path):
    plan = Plan(model=name, seq_len=64, micro_batch=2, chunk_bytes=1 << 16, adam_threads=1, **PLANS[name])
    config = SMALL_CONFIGS[name]
    optimizer = AdamW(lr=3e-3, weight_decay=0.1)
    how = {"optimizer": optimizer, "clip_norm": plan.clip_norm}
    loop = PlainLoop(make_model(config), **how)
    batches = list(islice(read_samples(TEXT, as_bytes, 64, vocab_size=320).batches(plan), STEPS))
    with SlidingTrainer(make_model(config), plan, optimizer=optimizer, device=DEVICE, nvme_folder=tmp_path) as trainer:
        curve = [trainer.step(batch) for batch in batches]
        weights = trainer.state_dict()
    assert_same_losses(curve, [loop.step(batch) for batch in batches])
    assert_same_weights(weights, loop.state_dict(), lambda: weights_on_cpu(make_model(config), batches, **how))
    assert curve[0] - sum(curve[-5:]) / 5 > 2
