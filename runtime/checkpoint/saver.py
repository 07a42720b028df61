"""`Checkpoints`: saves a trainer's state, in the background where RAM allows.

At a step's end the state is copied to RAM that is free, as far as it goes, and the rest written while training pauses;
training goes on as soon as only copies are left to write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slidetune.errors import SlidetuneError
from slidetune.runtime import arena
from slidetune.runtime.adam import AdamW
from slidetune.runtime.checkpoint import folder, random_states
from slidetune.runtime.checkpoint.lock import DirectoryLock
from slidetune.runtime.checkpoint.manifest import FILE, MODEL, Manifest, read_manifest
from slidetune.runtime.checkpoint.pacing import Pace
from slidetune.runtime.checkpoint.ranges import copied, state_nbytes
from slidetune.runtime.checkpoint.units import at_once, write_unit
from slidetune.runtime.masters import Master
from slidetune.units import format_bytes

if TYPE_CHECKING:
    from slidetune.runtime.trainer import SlidingTrainer

_log = logging.getLogger(__name__)
# RAM that copies leave free: data loaders, page cache and other programs live on it.
_SPARE_BYTES = 2 << 30
# Names, shapes and checksums, a file.
_OVERHEAD_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)
# The scheduler's weight of a thread of this niceness is 1/70 of a usual one's: Adam gets the cores when it wants them.
_NICENESS = 19


class CheckpointFailed(SlidetuneError):
    """A checkpoint could not be saved. Those before it are as they were."""


@dataclasses.dataclass(slots=True, kw_only=True)
class Saved:
    """A checkpoint that was saved, or is being saved."""

    path: Path
    """Where it is once it is complete."""
    step: int
    nbytes: int
    """Of masters and moments."""
    background_bytes: int
    """The part of them that is written while training goes on."""
    paused_s: float
    """Seconds for which training paused: for the step's end, the copy, and writing what there was no RAM to copy."""
    seconds: float | None = None
    """Seconds from the start until it was complete; None as long as it isn't."""


class Checkpoints:
    """The checkpoints of one run in one directory, which no other run may use meanwhile. A context manager.

    Args:
        directory: made if it isn't there.
        keep: how many to keep; older ones are deleted once a newer one is complete.
        copy_bytes: the most RAM for copies; 0 writes all while training pauses. By default all that is available but
            for 2 GiB.
        background_bytes_s: the most bytes a second to write while training goes on: a share of what the drive writes,
            where training waits for that drive. By default as many as one thread can.

    Raises SlidetuneError if another run uses the directory, or it can't be made.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 2,
        copy_bytes: int | None = None,
        background_bytes_s: float | None = None,
    ) -> None:
        if keep < 1:
            raise SlidetuneError(f"keep must be at least 1, not {keep}.")
        self.directory, self.keep, self._copy_bytes = Path(directory), keep, copy_bytes
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = DirectoryLock(self.directory)
        except OSError as error:
            raise SlidetuneError(f"{directory}: no place for checkpoints ({error}).") from None
        self._background_bytes_s = background_bytes_s
        self._pace = Pace(None)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._model_files: dict[str, bytes] | None = None

    def save(self, trainer: SlidingTrainer, *, extra: Mapping[str, Any] | None = None) -> Saved:
        """Save all that training by `trainer` goes on from, and `extra` (JSON) with it.

        Returns once training may go on. A checkpoint that is still being written is waited for first.

        Raises:
            CheckpointFailed: this one could not be saved (a full disk, say), or the one before, in the background, in
                which case this one was not tried.
            TaskFailed: of the trainer's step under way.
        """
        start = time.perf_counter()
        self.wait()
        masters, slot = trainer.settled()
        owners = [master for master in masters if master.layout.total]
        manifest = self._manifest(trainer, masters, dict(extra or {}))
        needed = sum(state_nbytes(master.layout) + _OVERHEAD_BYTES for master in owners)
        partial = None
        try:
            folder.remove_rests(self.directory)
            free = shutil.disk_usage(self.directory).free
            if needed > free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            partial = folder.new_partial(self.directory, manifest.step)
            self._write_model_files(trainer, partial, manifest)
            names = {
                id(master): f"state-{number:05d}-of-{len(owners):05d}.safetensors"
                for number, master in enumerate(owners, start=1)
            }
            copies = {names[id(master)]: copy for master, copy in self._copies(owners, slot)}

            def write(name: str, master: Master, pace: Pace) -> None:
                manifest.shards[name] = write_unit(partial / name, master, slot, pace.moved)

            in_place = [master for master in owners if names[id(master)] not in copies]
            at_once(lambda master: write(names[id(master)], master, Pace(None)), in_place)
            saved = Saved(
                path=partial.with_name(partial.stem),
                step=manifest.step,
                nbytes=sum(state_nbytes(master.layout) for master in owners),
                background_bytes=sum(state_nbytes(copy.layout) for copy in copies.values()),
                paused_s=0.0,
            )

            pace = self._pace = Pace(self._background_bytes_s)

            def finish() -> None:
                while copies:
                    write(*copies.popitem(), pace)
                self._complete(partial, manifest)
                saved.seconds = time.perf_counter() - start

            if copies:
                self._in_background(finish, partial, manifest.step, needed)
            else:
                finish()
        except BaseException as error:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise self._failed(error, manifest.step, needed) from error
            raise
        saved.paused_s = time.perf_counter() - start
        return saved

    def wait(self) -> None:
        """Wait until nothing is being written. Raises CheckpointFailed if that came to nothing."""
        if self._thread is not None:
            self._pace.hurry()
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """`wait`, and let go of the directory; may be called again."""
        try:
            self.wait()
        finally:
            self._lock.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except CheckpointFailed as error:
            if kind is None:
                raise
            # What ended the run is what the caller should see.
            _log.error("%s", error)

    # ---- plumbing -----------------------------------------------------------------------------------------

    def _copies(self, masters: list[Master], slot: torch.Tensor | None) -> Iterator[tuple[Master, Master]]:
        """As many units as there is RAM for, each with its copy."""
        room = self._copy_bytes
        if room is None:
            room = arena.available_bytes() - _SPARE_BYTES
        for master in masters:
            size = state_nbytes(master.layout)
            if size > room:
                continue
            try:
                copy = copied(master, slot)
            except MemoryError:
                return
            room -= size
            yield master, copy

    def _in_background(self, finish: Callable[[], None], partial: Path, step: int, needed: int) -> None:
        def run() -> None:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
            try:
                finish()
            except BaseException as error:
                shutil.rmtree(partial, ignore_errors=True)
                self._failure = self._failed(error, step, needed)
                self._failure.__cause__ = error

        self._thread = threading.Thread(target=run, name="slidetune-checkpoint")
        self._thread.start()

    def _complete(self, partial: Path, manifest: Manifest) -> None:
        before = folder.checkpoints(self.directory)
        manifest.serial = 1 + (read_manifest(before[-1]).serial if before else 0)
        manifest.shards = dict(sorted(manifest.shards.items()))
        folder.write_file(partial / FILE, manifest.text().encode())
        folder.complete(partial)
        folder.keep_last(self.directory, self.keep)

    def _failed(self, error: BaseException, step: int, needed: int) -> CheckpointFailed:
        before = folder.latest(self.directory)
        kept = "There is no earlier one." if before is None else f"{before} is whole."
        if isinstance(error, OSError) and error.errno in _FULL:
            free = shutil.disk_usage(self.directory).free
            return CheckpointFailed(
                f"disk full: the checkpoint of step {step} needs {format_bytes(needed)}; {format_bytes(free)} are free "
                f"at {self.directory}. It was not saved. {kept}",
                "Make room, keep fewer checkpoints, or save to another disk.",
            )
        return CheckpointFailed(f"the checkpoint of step {step} was not saved: {error}. {kept}")

    def _manifest(self, trainer: SlidingTrainer, masters: list[Master], extra: dict[str, Any]) -> Manifest:
        groups: list[AdamW] = []
        parameters: dict[str, int | None] = {}
        for entry in (entry for master in masters for entry in master.layout.entries):
            if entry.hyper is not None and entry.hyper not in groups:
                groups.append(entry.hyper)
            parameters[entry.name] = None if entry.hyper is None else groups.index(entry.hyper)
        manifest = Manifest(
            step=trainer.steps,
            updates=trainer.updates,
            seed=trainer.seed,
            model=trainer.plan.model,
            config_sha256=config_digest(trainer),
            plan=dataclasses.asdict(trainer.plan),
            kernels=trainer.kernels,
            device=str(trainer.device),
            groups=[dataclasses.asdict(group) for group in groups],
            parameters=parameters,
            random=random_states.capture(trainer.device),
            extra=extra,
            slidetune=version("slidetune"),
            saved_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        # What can't be written shows before anything is, and later changes by the caller don't matter.
        manifest.extra = json.loads(manifest.text())["extra"]
        return manifest

    def _write_model_files(self, trainer: SlidingTrainer, partial: Path, manifest: Manifest) -> None:
        if self._model_files is None:
            # Kept: the trainer may have them from a checkpoint that is deleted one day.
            with tempfile.TemporaryDirectory(dir=partial) as place:
                trainer.save_config(place)
                self._model_files = {path.name: path.read_bytes() for path in sorted(Path(place).iterdir())}
        (partial / MODEL).mkdir()
        for name, data in self._model_files.items():
            folder.write_file(partial / MODEL / name, data)
            manifest.files[f"{MODEL}/{name}"] = (len(data), zlib.crc32(data))


def config_digest(trainer: SlidingTrainer) -> str:
    """SHA-256 of what the model's config says, but for what changes with where it is read from and by which version."""
    config = trainer.parts.model.config.to_dict()
    config = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version", "dtype")}
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
