"""What goes wrong while a checkpoint is saved or read, and what is left then."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from slidetune.errors import BadFile, SlidetuneError
from slidetune.plans import Plan
from slidetune.runtime.adam import AdamW
from slidetune.runtime.checkpoint import (
    CheckpointFailed,
    Checkpoints,
    DirectoryLock,
    checkpoints,
    latest,
    load_into,
    tensor_files,
    verify,
)
from slidetune.runtime.trainer import SlidingTrainer

from ..slidetune.reference import SMALL_CONFIGS
from .reference import DEVICE, make_model, random_batches

CONFIG = SMALL_CONFIGS["llama"] | {"num_hidden_layers": 2}
PLAN = Plan(model="llama", seq_len=8, micro_batch=1, chunk_bytes=8192, adam_threads=1)
BATCHES = list(random_batches(CONFIG, PLAN, 6))

pytestmark = pytest.mark.usefixtures("no_threads_left")


@pytest.fixture
def trainer():
    with SlidingTrainer(make_model(CONFIG), PLAN, optimizer=AdamW(lr=1e-2), device=DEVICE) as trainer:
        yield trainer


def save_and_wait(run, trainer):
    run.save(trainer)
    run.wait()


def save_all(folder, trainer, steps, **options):
    with Checkpoints(folder, **options) as run:
        for batch in BATCHES[:steps]:
            trainer.step(batch)
            run.save(trainer)


@pytest.mark.parametrize("copy_bytes", [None, 0], ids=["background", "paused"])
def test_at_every_moment_a_whole_checkpoint_is_there(tmp_path, trainer, monkeypatch, copy_bytes):
    save_all(tmp_path, trainer, 1)
    moments, busy = [], threading.Lock()

    def watched(name, function):
        def run(*args, **kwargs):
            with busy:
                moments.append(name)
                verify(latest(tmp_path))
            return function(*args, **kwargs)

        return run

    for owner, name in (
        (os, "fsync"),
        (os, "pwrite"),
        (os, "unlink"),
        (os, "rmdir"),
        (Path, "rename"),
        (Path, "mkdir"),
    ):
        monkeypatch.setattr(owner, name, watched(name, getattr(owner, name)))
    save_all(tmp_path, trainer, 2, keep=1, copy_bytes=copy_bytes)
    # Each save names its folder and takes the one before away.
    assert moments.count("rename") == 4
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003"]


def test_only_the_last_are_kept(tmp_path, trainer):
    (tmp_path / "step-00000009.partial").mkdir()
    (tmp_path / "step-00000001.trash").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    save_all(tmp_path, trainer, 4, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["lock", "notes.txt", "step-00000003", "step-00000004"]


def test_a_copy_in_the_background_is_let_go_of(tmp_path, trainer):
    with Checkpoints(tmp_path) as run:
        trainer.step(BATCHES[0])
        saved = run.save(trainer)
        assert saved.background_bytes == saved.nbytes
        run.wait()
        assert saved.paused_s < saved.seconds
    with Checkpoints(tmp_path, copy_bytes=0) as run:
        trainer.step(BATCHES[0])
        saved = run.save(trainer)
        assert saved.background_bytes == 0
        assert saved.paused_s >= saved.seconds > 0


def test_the_background_keeps_to_its_rate_until_somebody_waits(tmp_path, trainer):
    with Checkpoints(tmp_path, background_bytes_s=1e5) as run:
        saved = run.save(trainer)
        assert saved.nbytes > 2e6
        for batch in BATCHES[:2]:
            trainer.step(batch)
        assert saved.seconds is None
        run.wait()
        assert saved.seconds < 20
    assert verify(saved.path).step == 0


def test_too_little_room_is_seen_before(tmp_path, trainer, monkeypatch):
    save_all(tmp_path, trainer, 1)
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10 << 30, 0, 3 << 20))
    with pytest.raises(
        CheckpointFailed, match=r"disk full: .* step 2 needs .* MiB; 3 MiB are free .*00000001 is whole"
    ):
        save_all(tmp_path, trainer, 1)
    assert sorted(os.listdir(tmp_path)) == ["lock", "step-00000001"]


@pytest.mark.parametrize("copy_bytes", [None, 0], ids=["background", "paused"])
def test_the_disk_is_full_half_way(tmp_path, trainer, monkeypatch, copy_bytes):
    save_all(tmp_path, trainer, 1)
    write, left = tensor_files._write, [1_000_000]

    def full(fd, data, at):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(fd, data, at)

    monkeypatch.setattr(tensor_files, "_write", full)
    with Checkpoints(tmp_path, copy_bytes=copy_bytes) as run:
        with pytest.raises(CheckpointFailed, match=r"disk full: the checkpoint of step 1 .*step-00000001 is whole"):
            save_and_wait(run, trainer)
        assert sorted(os.listdir(tmp_path)) == ["lock", "step-00000001"]
        verify(latest(tmp_path))
        # Training goes on, and so does saving once there is room.
        monkeypatch.undo()
        trainer.step(BATCHES[1])
        run.save(trainer)
    assert verify(latest(tmp_path)).step == 2


def test_a_failure_in_the_background_shows_at_the_next_save(tmp_path, trainer):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as run:
        trainer.step(BATCHES[0])
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        try:
            run.save(trainer)
            run._thread.join()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        trainer.step(BATCHES[1])
        with pytest.raises(CheckpointFailed, match=r"step 1 was not saved: .*File too large.*There is no earlier one"):
            run.save(trainer)
        run.save(trainer)
    assert verify(latest(tmp_path)).step == 2


def test_what_ended_a_run_is_not_hidden_by_its_last_save(tmp_path, trainer, monkeypatch, caplog):
    def broken(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(tensor_files, "_write", broken)

    def train():
        with Checkpoints(tmp_path) as run:
            run.save(trainer)
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert "step 0 was not saved: [Errno 5] broken" in caplog.text


def damaged_at(path, place):
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0.0, 0.001, 0.5, 1.0])
def test_a_damaged_file_is_found(tmp_path, trainer, place):
    save_all(tmp_path, trainer, 1)
    path = latest(tmp_path)
    verify(path)
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        whole = file.read_bytes()
        damaged_at(file, place)
        with pytest.raises(BadFile, match=file.name):
            verify(path)
        file.write_bytes(whole[:-1])
        with pytest.raises(BadFile, match=file.name):
            verify(path)
        file.unlink()
        with pytest.raises(BadFile, match=file.name):
            verify(path)
        file.write_bytes(whole)
    verify(path)


def test_a_damaged_shard_is_not_loaded(tmp_path, trainer):
    save_all(tmp_path, trainer, 1)
    shard = next(latest(tmp_path).glob("*.safetensors"))
    damaged_at(shard, 0.7)
    with pytest.raises(BadFile, match=f"{shard.name} is damaged"):
        load_into(trainer, tmp_path)
    with pytest.raises(SlidetuneError, match="closed"):
        trainer.step(BATCHES[0])


def test_no_checkpoint(tmp_path, trainer):
    assert latest(tmp_path / "nowhere") is None
    with pytest.raises(BadFile, match="no checkpoint is here"):
        load_into(trainer, tmp_path)
    with pytest.raises(SlidetuneError, match="keep must be at least 1"):
        Checkpoints(tmp_path, keep=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(SlidetuneError, match="no place for checkpoints"):
        Checkpoints(tmp_path / "file")


def test_a_second_run_in_the_directory_is_refused(tmp_path):
    said = f"another run saves its checkpoints here .process {os.getpid()} on "
    other = (
        f"from pathlib import Path; from slidetune.runtime.checkpoint import *; DirectoryLock(Path({str(tmp_path)!r}))"
    )
    with Checkpoints(tmp_path):
        with pytest.raises(SlidetuneError, match=said):
            Checkpoints(tmp_path)
        elsewhere = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True)
        assert re.search(said, elsewhere.stderr)
    Checkpoints(tmp_path).close()


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    (reading, writing), (waiting, telling) = os.pipe(), os.pipe()
    with DirectoryLock(tmp_path):
        child = os.fork()
        if not child:
            os.write(telling, b".")
            os.read(reading, 1)
            os._exit(0)
        os.read(waiting, 1)
    try:
        DirectoryLock(tmp_path).close()
    finally:
        os.write(writing, b".")
        os.waitpid(child, 0)
        for end in (reading, writing, waiting, telling):
            os.close(end)
