"""kill -9 at random moments of a run that saves all the time: what it saved is whole, and no step saved is lost."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from slidetune.plans import Plan
from slidetune.runtime.adam import AdamW
from slidetune.runtime.checkpoint import latest, verify
from slidetune.runtime.trainer import SlidingTrainer

from ..slidetune.reference import SMALL_CONFIGS
from .reference import DEVICE, make_model

KILLS = 20
CONFIG = SMALL_CONFIGS["llama"] | {"num_hidden_layers": 3}
PLAN = {"seq_len": 8, "micro_batch": 1, "chunk_bytes": 8192, "adam_threads": 1, "late_updates": 1}

# All is imported once; each run is a fork of that, killed so many seconds after its first step.
RUNS = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
from slidetune.plans import Plan
from slidetune.runtime.adam import AdamW
from slidetune.runtime.checkpoint import Checkpoints, latest
from slidetune.runtime.trainer import SlidingTrainer
from tests.runtime.reference import DEVICE, make_model
from tests.runtime.test_checkpoint_crash import CONFIG, PLAN, batch

def train(folder, journal, begun):
    with Checkpoints(folder, keep=2) as checkpoints:
        trainer = SlidingTrainer(
            make_model(CONFIG), Plan(model="llama", **PLAN), optimizer=AdamW(lr=1e-2), device=DEVICE,
            checkpoint=latest(folder),
        )
        while True:
            trainer.step(batch(trainer.steps + 1))
            os.write(begun, b".")
            # In the background, in part, and with a pause.
            checkpoints._copy_bytes = (None, 1_000_000, 0)[trainer.steps % 3]
            checkpoints.save(trainer)
            if trainer.steps % 2:
                checkpoints.wait()
                os.write(journal, f"{trainer.steps}\\n".encode())

journal = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for line in sys.stdin:
    reading, begun = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            train(sys.argv[1], journal, begun)
        finally:
            os._exit(1)
    os.close(begun)
    os.read(reading, 1)
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os.close(reading)
"""


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return {"input_ids": torch.randint(3, CONFIG["vocab_size"], (1, PLAN["seq_len"]), generator=generator)}


@pytest.mark.skipif(DEVICE != "cpu", reason="a CUDA context does not survive a fork")
@pytest.mark.timeout(400)
def test_killed_at_random_moments(tmp_path):
    folder, journal = tmp_path / "run", tmp_path / "journal"
    chance = random.Random(20)
    plan = Plan(model="llama", **PLAN)
    command = [sys.executable, "-c", RUNS, str(folder), str(journal)]
    runs = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    found = set()
    with runs, SlidingTrainer(make_model(CONFIG), plan, optimizer=AdamW(lr=1e-2), device=DEVICE) as uninterrupted:
        for _ in range(KILLS):
            runs.stdin.write(f"{chance.uniform(0, 0.6)}\n")
            assert runs.stdout.readline() == "-9\n"
            saved = [int(line) for line in journal.read_text().split()]
            path = latest(folder)
            if path is None:
                assert not saved
                continue
            manifest = verify(path)
            assert manifest.step >= max(saved, default=0)
            found.add(manifest.step)
            while uninterrupted.steps < manifest.step:
                uninterrupted.step(batch(uninterrupted.steps + 1))
            with SlidingTrainer(path / "model", plan, checkpoint=path, optimizer=AdamW(lr=1e-2), device=DEVICE) as one:
                assert one.steps == manifest.step
                weights = one.state_dict()
            expected = uninterrupted.state_dict()
            assert all(torch.equal(weights[name], value) for name, value in expected.items())
            # A crash leaves at most one checkpoint to be deleted, one under way and one on its way out.
            assert len(os.listdir(folder)) <= 6
        runs.stdin.close()
    assert len(found) > KILLS // 5, "the runs made progress"
